"""`mixed`: what it rounds to, what its budget buys, and what it says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.quantization.mixed import mixed, mixed_allocation

IDS = np.random.default_rng(0).integers(0, 300, (6, 24)).astype(np.int32)


def two(seed=3):
    """A model with a matrix that counts and one that hardly does, and its inputs."""
    rng = np.random.default_rng(seed)
    strong, weak = (jnp.asarray(rng.standard_normal((32, 16)), jnp.float32) for _ in range(2))

    def apply(params, x):
        return x @ params["strong"]["kernel"] + 0.01 * (x @ params["weak"]["kernel"]) ** 2

    model = jc.Model(apply, {"strong": {"kernel": strong}, "weak": {"kernel": weak}})
    return model, rng.standard_normal((64, 32)).astype(np.float32)


def test_rounds_as_its_allocation_says(tmp_path):
    llama = jc.load(tiny.write_llama(tmp_path, layers=1))
    asked = {"average_bits": 5.5, "group_size": 16, "windows": 4, "candidates": "2,4,8"}
    method = Method(mixed, produces="quantized")
    small = jc.compress(llama, method, calibration=IDS, **asked)
    found = mixed_allocation(llama, calibration=IDS, **asked)
    table = found.table
    assert found.bits <= 5.5
    assert len(set(found.choice.tolist())) > 1
    same = jc.compress(llama, "rtn", overrides=found.overrides())
    chosen = dict(zip(table.paths, found.choice, strict=True))
    for (path, one), (_, other) in zip(
        leaves_with_paths(small.params), leaves_with_paths(same.params), strict=True
    ):
        assert jc.is_compressed(one) == (path in chosen)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
        if path in chosen:
            assert one.bits == (2, 4, 8)[chosen[path]]
            group = next(group for group in table.groups if path in group)
            assert len({chosen[p] for p in group}) == 1
    stored = sum(x.nbytes for _, x in leaves_with_paths(small.params) if jc.is_compressed(x))
    assert stored == found.bytes
    assert small.notes[0].startswith(f"mixed: {found.bits:.3f} bits a weight")
    assert sum(path in note for note in small.notes for path in table.paths) == len(table.paths)


def test_knows_every_format():
    model, x = two()
    formats = "int3, mxfp4,fp8,nf4,8,dense"
    found = mixed_allocation(model, calibration=x, candidates=formats, average_bits=9.0)
    names = [c.name for c in found.table.candidates]
    assert names == ["int3 g128", "mxfp4", "fp8 rows", "nf4", "int8 g128", "dense"]
    fits = np.isfinite(found.table.costs).all(0).tolist()
    assert fits == [False, True, True, False, False, True]  # of 32 columns
    free = mixed_allocation(model, calibration=x, candidates="fp8,dense", average_bits=32.0)
    assert free.dense() == ["strong/kernel", "weak/kernel"]
    assert free.cost == 0
    dense = mixed(model, calibration=x, candidates="fp8,dense", average_bits=32.0)
    assert not any(map(jc.is_compressed, [leaf["kernel"] for leaf in dense.params.values()]))
    with pytest.raises(InputError, match="the least possible is"):
        mixed_allocation(model, calibration=x, average_bits=1.0, group_size=16)
    with pytest.raises(InputError, match="windows -1"):
        mixed(model, calibration=x, windows=-1)


def test_beats_uniform_where_parameters_differ():
    """A matrix that hardly counts gives its bits to one that does."""
    model, x = two()
    asked = {"calibration": x, "group_size": 32, "candidates": "2,3,4,5,6", "windows": 0}
    small = mixed(model, average_bits=5.0, tied=False, **asked)  # 4, and 1 for the scales
    bits = {name: small.params[name]["kernel"].bits for name in ("strong", "weak")}
    assert bits["weak"] < 4 < bits["strong"]
    tied = mixed(model, average_bits=5.0, **asked)  # both read x
    assert {leaf["kernel"].bits for leaf in tied.params.values()} == {4}

    def kl(other):
        dense, ours = (scipy.special.log_softmax(m(x), axis=-1) for m in (model, other))
        return (np.exp(dense) * (dense - ours)).sum(-1).mean()

    assert kl(small) < 0.5 * kl(tied)
