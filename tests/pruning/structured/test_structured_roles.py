"""Which group is what, told by the program alone."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
import structured_cases as cases

from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.pruning.structured import of_kind, roles

# Kinds of the groups that can be cut: per network, how many of each.
EXPECTED = {
    "llama": {"width": 1, "heads": 2, "queries": 2, "channels": 3, "neurons": 2},
    "llama_scan": {"width": 1, "heads": 1, "queries": 1, "channels": 2, "neurons": 1},
    "gpt2": {"width": 1, "heads": 2, "channels": 4, "neurons": 2},
    "decoder": {"width": 1, "heads": 2, "channels": 4, "neurons": 1},
    "encoder": {"heads": 2, "channels": 4, "neurons": 2},
    "lstm": {"units": 2, "embedding": 1},
    "resnet_a": {"filters": 6},
    "resnet_b": {"filters": 5},
    "vgg": {"filters": 2, "neurons": 1},
    "mobilenet": {"filters": 5},
}


def found(model, *inputs):
    return [r for r in roles(coupling(model.apply)(model.params, *inputs)) if r.group.cuttable]


@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_of_the_reference_models(name):
    model = cases.reference(name)
    kinds = Counter(role.kind for role in found(model, cases.inputs_of(model)))
    assert kinds == EXPECTED[name]


def test_residual_filters_are_told_from_inner_ones():
    model = cases.reference("resnet_b")
    inner = {r.group.members[0].path: r.residual for r in found(model, cases.inputs_of(model))}
    assert sum(inner.values()) == 2  # one stream for each stage
    assert not inner["batch_stats/layer1/0/bn1/mean"]
    assert inner["batch_stats/bn1/mean"]


def test_a_strangers_network():
    model = cases.plain_model()
    kinds = Counter(r.kind for r in found(model, jnp.zeros((2, 6), jnp.int32)))
    assert kinds["heads"] == 2
    assert kinds["neurons"] == 2
    assert kinds["width"] == 1


def test_a_third_party_network():
    model = cases.equinox_model()
    kinds = Counter(r.kind for r in found(model, jnp.zeros((2, 6, 5))))
    assert kinds["heads"] == 1
    assert kinds["neurons"] == 1
    assert kinds["width"] == 1


def test_one_shared_key_head_leaves_the_query_heads():
    config = cases.CONFIGS["llama"]
    model = cases.build_model(type(config)(**{**vars(config), "num_key_value_heads": 1}))
    heads = of_kind(found(model, cases.inputs_of(model)), "heads")
    assert [role.group.size for role in heads] == [6, 6]


def test_a_recurrence_that_is_unrolled():
    def unrolled(p, x):
        h = jnp.zeros((x.shape[0], 6))
        for t in range(3):
            h = jnp.tanh(x[:, t] @ p["w"] + h @ p["u"])
        return h @ p["out"]

    params = cases.drawn({"w": (5, 6), "u": (6, 6), "out": (6, 3)})
    (role,) = [
        r for r in roles(coupling(unrolled)(params, np.zeros((2, 3, 5)))) if r.group.cuttable
    ]
    assert role.kind == "units"


def test_what_is_missing_or_pinned_is_refused_with_the_reason():
    encoder = cases.reference("encoder")
    every = roles(coupling(encoder.apply)(encoder.params, cases.inputs_of(encoder)))
    with pytest.raises(InputError, match="width: bert cannot be cut there: axis 2 of output"):
        of_kind(every, "width", name="bert")
    with pytest.raises(InputError, match=r"filters: bert has none .* it has .*heads"):
        of_kind(every, "filters", name="bert")
