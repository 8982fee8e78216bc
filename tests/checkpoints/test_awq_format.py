"""AWQ directories against AutoAWQ's packer (digests), compressed-tensors' converter, and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import Tensors, affine, digest, same, stream
from tiny import write_llama

import jaxcompress as jc
from jaxcompress.checkpoints.awq import AWQ, encode_module, quantization_config
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.quantization.rtn import rtn

# qweight and qzeros of `affine(4, symmetric)` as `WQLinear_GEMM` of AutoAWQ 0.2.9 packs them.
THEIRS = {
    True: ("df795be54c51b86b", "cb9e7bc79794e2e5"),
    False: ("df795be54c51b86b", "21aa6eb0ee7afbfd"),
}
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def opened(tensors, **config):
    return AWQ(Tensors(tensors), {"quantization_config": CONFIG | config})


@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_are_those_of_their_packer(symmetric):
    leaf, u, scale, _ = affine(4, symmetric)
    ours = encode_module("X", leaf)
    assert (digest(ours["X.qweight"]), digest(ours["X.qzeros"])) == THEIRS[symmetric]
    assert same(ours["X.scales"], scale.T)
    low = ours["X.qweight"][5, 1] & 15  # the lowest nibble of word 1: row 8 of the matrix
    assert low == u[8, 5]
    assert (ours["X.qweight"][5, 1] >> 4) & 15 == u[10, 5]


@pytest.mark.parametrize("symmetric", [True, False])
def test_their_converter_reads_ours(symmetric):
    torch = pytest.importorskip("torch")
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    leaf, u, scale, zero = affine(4, symmetric)
    tensors = {name: torch.tensor(x) for name, x in encode_module("X", leaf).items()}
    theirs = converters.AutoAWQConverter(group_size=32, zero_point=True).process(tensors)
    assert same(theirs["X.weight_packed"].numpy(), stream(u, 4))
    assert same(theirs["X.weight_scale"].numpy(), scale)
    assert same(theirs["X.weight_zero_point"].numpy(), stream(zero.T, 4).T)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_bit_comes_back(symmetric):
    leaf, _, _, _ = affine(4, symmetric)
    reader = opened(encode_module("X", leaf))
    back = reader.read("X.weight")
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(leaf)))
    assert reader.info("X.weight") == ((64, 96), np.float16)
    assert reader.keys() == ["X.weight"]


@pytest.mark.parametrize("config", [{"version": "gemv"}, {"bits": 8}])
def test_other_layouts_are_refused(config):
    with pytest.raises(InputError, match="gemm of 4 bits is read"):
        opened(encode_module("X", affine(4, True)[0]), **config)


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (affine(8, True)[0], "integers of 4 bits"),
        (rtn(jnp.ones((12, 64)), group_size=32), "by 8, not a matrix of 12 x 64"),
        (rtn(jnp.ones((32, 64)), dtype="nf4"), "no form for Codebook"),
        (rtn(jnp.linspace(0, 1, 2048).reshape(32, 64), group_size=32), "scale_bits=16"),
    ],
)
def test_what_it_cannot_hold_is_refused_in_one_line(leaf, said):
    with pytest.raises(InputError, match=f"X: .*{said}") as caught:
        encode_module("X", leaf)
    assert "\n" not in str(caught.value)


def test_groups_of_several_sizes_are_refused():
    leaves = {"a": affine(4, True)[0], "b": affine(4, True, groups=6)[0]}
    with pytest.raises(InputError, match="one group size for all modules, not 16, 32"):
        quantization_config(leaves, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"X.qweight": np.zeros((96, 7), np.int32)},
        {"X.qzeros": np.zeros((2, 8), np.int32)},
        {"X.scales": np.zeros((5, 64), np.float16)},
        {"X.qweight": np.zeros((96, 8), np.uint8)},
    ],
)
def test_contradictions_are_one_line_that_names_the_module(changes):
    with pytest.raises(InputError, match="X: its tensors contradict"):
        opened(encode_module("X", affine(4, True)[0]) | changes).read("X.weight")


def test_a_directory_goes_out_and_comes_in(tmp_path):
    model = jc.load(write_llama(tmp_path / "llama", layers=1))
    options = {"bits": 4, "group_size": 32, "symmetric": False, "scale_bits": 16}
    small = jc.compress(model, "rtn", **options, exclude=["**/down_proj/*"])
    said = jc.save(small, tmp_path / "out", format="awq")
    assert "awq, 6 of" in said[0]
    again = jc.load(tmp_path / "out")
    assert jax.tree.structure(again.params) == jax.tree.structure(small.params)
    for (path, a), (_, b) in zip(leaves_with_paths(again.params), leaves_with_paths(small.params)):
        assert all(same(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))), path
