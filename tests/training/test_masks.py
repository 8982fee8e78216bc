"""Zeros of dense matrices that were pruned stay while they train, and only those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import Drawn, decoder, perceptron, points, same, sentences, squared_error

import jaxcompress as jc
from jaxcompress.core.arrays.training import Masked
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.training.masks import hold_zeros, release
from jaxcompress.training.mesh import make_mesh, param_shardings, spread
from jaxcompress.training.objective import next_token
from jaxcompress.training.settings import Training, train


def pruned():
    """Half of `first/kernel` removed, the rest dense."""
    model = perceptron()
    kernel = model.params["first"]["kernel"]
    model.params["first"]["kernel"] = jnp.where(jnp.abs(kernel) > 0.08, kernel, 0)
    return model


def settings(**changes):
    return Training(steps=6, learning_rate=0.01, weight_decay=0.1, **changes)


def trained(model, workdir, **changes):
    return train(
        model, squared_error(model), Drawn(points), settings(**changes), workdir=workdir,
        mesh=make_mesh(),
    )  # fmt: skip


@pytest.mark.parametrize("kinds", ["all", "dense"])
def test_pruned_entries_stay_0_and_the_others_train(tmp_path, kinds):
    model = pruned()
    out = trained(model, tmp_path, train=kinds)
    before, after = (np.asarray(m.params["first"]["kernel"]) for m in (model, out))
    assert 0.3 < (before == 0).mean() < 0.9
    np.testing.assert_array_equal(before == 0, after == 0)
    assert np.all(after[before != 0] != before[before != 0])
    assert jax.tree.structure(model.params) == jax.tree.structure(out.params)


def test_without_holding_them_they_grow_back(tmp_path):
    out = trained(pruned(), tmp_path, keep_zeros=False)
    assert (np.asarray(out.params["first"]["kernel"]) == 0).mean() < 0.01


def test_a_pruned_decoder_with_stacked_blocks(tmp_path):
    """2:4, on a mesh: found where it is split, its pattern whole after training."""
    model = jc.compress(decoder(scan_layers=True, num_hidden_layers=2), "magnitude", pattern="2:4")
    mesh = make_mesh(2, 2, 2)
    model = model.replace(params=spread(model.params, param_shardings(model, mesh)))
    _, held = hold_zeros(model.params)
    assert set(held) == {path for path, _ in leaves_with_paths(model.params) if "_proj" in path}
    out = train(model, next_token(model), Drawn(sentences), settings(), workdir=tmp_path, mesh=mesh)
    for path in ("attn/q_proj", "mlp/down_proj"):
        part, name = path.split("/")
        kernel = np.asarray(out.params["layers"][part][name]["kernel"])  # [layers, in, out]
        groups = (kernel.swapaxes(1, 2).reshape(2, kernel.shape[2], -1, 4) != 0).sum(-1)
        np.testing.assert_array_equal(groups, 2)


def test_what_is_dense_or_nothing_but_zeros_is_not_held():
    sparse = jnp.where(jnp.arange(64.0).reshape(8, 8) % 2 == 0, 1.0, 0)
    params = {
        "pruned": sparse,
        "padding": jnp.ones((64, 8)).at[0].set(0),  # one row of a table
        "fresh": jnp.zeros((4, 8)),
        "vector": jnp.zeros(8),
        "codes": jnp.zeros((8, 8), jnp.int32),
        "masked": Masked(sparse, sparse > 0),
    }
    masked, held = hold_zeros(params)
    assert held == ("pruned",)
    assert same(release(masked, held), params)
    assert {k: type(v) for k, v in release(masked, held).items()} == {
        k: type(v) for k, v in params.items()
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": 0}, "steps 0: must be 1 or more"),
        ({"log_every": 0}, "log_every 0"),
        ({"batch_size": 12}, "batch_size 12: .*nearest that does is 16"),
        ({"optimizer": "adamm"}, "optimizer 'adamm': unknown"),
    ],
)
def test_settings_are_checked_before_any_work(change, text):
    with pytest.raises(InputError, match=text):
        Training(**{"steps": 6, **change}).check(make_mesh())
    settings().check(make_mesh())
