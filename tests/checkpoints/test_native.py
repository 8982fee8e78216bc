"""The native convention keeps every leaf of every class, bit for bit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress.checkpoints import native
from jaxcompress.checkpoints.huggingface import open_checkpoint
from jaxcompress.checkpoints.huggingface_writer import write_checkpoint
from jaxcompress.checkpoints.native import Native, native_bytes, read_native, write_native
from jaxcompress.checkpoints.safetensors import SafetensorsFile
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    KERNEL,
    ROWS,
    STORED,
    CompressedArray,
    Partition,
    is_compressed,
    register,
)
from jaxcompress.core.arrays.block_sparse import BlockSparse
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.csr import CSR
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.shared_rows import share_rows
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.core.arrays.training import FakeEncoded, FakeQuantized, Masked
from jaxcompress.core.errors import InputError
from jaxcompress.quantization.rtn import rtn

RNG = np.random.default_rng(0)


def bits(*shape, dtype=np.int32):
    dtype = np.dtype(dtype)
    raw = RNG.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return raw.view(dtype)[..., 0]


def affine(lead=(), rows=6, columns=40, *, zero=True, dims=KERNEL, dtype="float32"):
    return Affine(
        jnp.asarray(bits(*lead, rows, 6)),  # 3 bits: 64 codes in 6 words
        jnp.asarray(RNG.normal(size=(*lead, rows, 4)), dtype),
        jnp.asarray(RNG.integers(0, 8, (*lead, rows, 4), np.uint8)) if zero else None,
        3,
        64 - columns,
        dims,
        ("bfloat16", dtype),
    )


LEAVES = {
    "affine": affine(),
    "symmetric": affine(zero=False, dims=STORED, dtype="bfloat16"),
    "stacked": affine((2, 3)),
    "conv": affine(dims=(("k", -1), ("k", 4), ("n", -1), ("n", 3))),
    "masked": Masked(jnp.asarray(RNG.normal(size=(4, 8))), jnp.asarray(RNG.random((4, 8)) < 0.5)),
    "fake": FakeQuantized(jnp.ones((4, 8)), jnp.ones((4, 2)), None, 4, False),
    "fake floats": FakeEncoded(
        jnp.ones((6, 64)), rtn(jnp.asarray(RNG.normal(size=(6, 64)), jnp.float32), dtype="mxfp4")
    ),
    "dynamic inputs": QuantizedInput.of(affine(zero=False)),
    "static inputs": QuantizedInput.of(
        affine(), input_scale=jnp.full((1, 1), 0.1), input_zero_point=jnp.full((1, 1), 3, jnp.uint8)
    ),
    "codebook": Codebook(
        jnp.asarray(bits(6, 6)), jnp.asarray(RNG.normal(size=(1, 8))), None, 3, 24
    ),
    "scaled codebook": Codebook(
        jnp.asarray(bits(2, 6, 6)), jnp.ones((2, 6, 8)), jnp.ones((2, 6, 4)), 3, 24
    ),
    "fp8 of blocks": rtn(
        jnp.asarray(RNG.normal(size=(2, 6, 40)), jnp.bfloat16),
        dtype="fp8",
        granularity="block",
        group_size=16,
    ),
    "nvfp4": rtn(jnp.asarray(RNG.normal(size=(6, 48)), jnp.float32), dtype="nvfp4"),
    "nf4, nested": rtn(
        jnp.asarray(RNG.normal(size=(6, 48)), jnp.float32), dtype="nf4", group_size=16, scale_bits=8
    ),
    "shared rows": share_rows(jnp.asarray(RNG.normal(size=(2, 8)), jnp.float32), 6, 4),
    "low rank": LowRank(jnp.ones((4, 2)), jnp.ones((2, 8))),
    "sum": Sum.of(affine(), LowRank(jnp.ones((6, 2)), jnp.ones((2, 40)), KERNEL, ("float32",))),
}


def identical(a, b):
    if is_compressed(a):
        spec_a, spec_b = jax.tree.structure(a), jax.tree.structure(b)
        leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return type(a) is type(b) and spec_a == spec_b and all(identical(*x) for x in leaves)
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def identical_trees(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        identical(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_every_class_comes_back_bit_for_bit(tmp_path):
    out = write_native(tmp_path / "out", LEAVES)
    back = read_native(out)
    assert list(back) == list(LEAVES)
    for name, leaf in LEAVES.items():
        assert identical(back[name], leaf), name
        assert all(isinstance(buffer, jax.Array) for buffer in jax.tree.leaves(back[name]))
        assert identical(back[name].dense(), leaf.dense())


def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path):
    tree = {**LEAVES, "plain": [jnp.ones((3, 5), jnp.bfloat16), (None, np.int8([[1]]))]}
    shapes = jax.eval_shape(lambda: {**LEAVES, "plain": [jnp.ones((3, 5), jnp.bfloat16)]})
    whole = write_native(tmp_path / "out", tree)
    assert native_bytes(tree) == (whole / "native.safetensors").stat().st_size
    del tree["plain"][1]
    filled = {name for name, leaf in LEAVES.items() if leaf.to_disk()[1]}
    for name in LEAVES:  # shapes do not tell what is filling
        told, written = native_bytes({name: shapes[name]}), native_bytes({name: tree[name]})
        assert told >= written if name in filled else told == written
    assert native_bytes(shapes["plain"]) == native_bytes(tree["plain"])


def test_every_class_that_there_is_is_tried_here():
    import importlib
    import pkgutil

    from jaxcompress.core import arrays

    for module in pkgutil.iter_modules(arrays.__path__):
        importlib.import_module(f"{arrays.__name__}.{module.name}")
    ours = {
        c for c in CompressedArray.__subclasses__() if c.__module__.startswith("jaxcompress.core.")
    }
    tried = {type(leaf) for leaf in [*LEAVES.values(), *nested_leaves()]}
    assert ours <= tried, f"add a leaf of {ours - tried} to LEAVES or nested_leaves"


def nested_leaves():
    """Sparse arrays whose values are integers: buffers that are compressed themselves."""
    values = affine(rows=6, columns=40)
    positions = jnp.asarray(bits(6, 5))
    yield NMSparse(values, positions, 2, 4)
    yield UnstructuredSparse(jnp.asarray(bits(6, 2)), jnp.ones((6, 12)), 64 - 40)
    yield UnstructuredSparse(jnp.asarray(bits(6, 2)), affine(rows=6, columns=40), 64 - 40)
    matrix, mask = jnp.asarray(RNG.normal(size=(2, 6, 40))), RNG.random((2, 6, 40)) < 0.3
    for cap in (None, 40):  # with and without more room than any row needs
        yield UnstructuredSparse.from_mask(matrix, mask, cap=cap)
        yield CSR.from_mask(matrix, mask, cap=cap, dims=STORED)
        yield BlockSparse.from_mask(matrix, mask, (2, 4), cap=cap and 10)
    yield CSR.from_mask(
        matrix, mask, encode=lambda v: affine(rows=6, columns=v.shape[-1], lead=(2,))
    )
    yield BlockSparse.from_mask(matrix, mask, (3, 8))[0].map(lambda b: b[1:])  # cuts a block
    yield CSR.from_mask(matrix.astype(jnp.bfloat16), np.zeros_like(mask))


@pytest.mark.parametrize("leaf", list(nested_leaves()), ids=lambda leaf: type(leaf).__name__)
def test_compressed_buffers_nest(tmp_path, leaf):
    out = write_native(tmp_path / "out", {"w": leaf})
    assert identical(read_native(out)["w"], leaf)
    stored = set(open_checkpoint(out).keys())
    assert stored == set(native.names_of_leaf("w", leaf))
    if is_compressed(leaf.values):
        assert "w#values#codes" in stored


def test_rows_of_different_lengths_fill_no_file(tmp_path):
    mask = RNG.random((64, 320)) < np.linspace(0.01, 0.6, 64)[:, None]
    matrix = jnp.asarray(RNG.normal(size=mask.shape), jnp.float32)
    kept = int(mask.sum())
    blocks = mask.reshape(16, 4, 40, 8).any((1, 3))
    leaves = {
        "bits": (UnstructuredSparse.from_mask(matrix, mask), 4 * kept + mask.size // 8),
        "csr": (CSR.from_mask(matrix, mask), 6 * kept + 4 * 64),
        "blocks": (
            BlockSparse.from_mask(matrix, mask, (4, 8)),
            4 * 32 * int(blocks.sum()) + 16 * 8,
        ),
    }
    for name, (leaf, size) in leaves.items():
        out = write_native(tmp_path / name, {"w": leaf})
        assert identical(read_native(out)["w"], leaf)
        checkpoint = open_checkpoint(out)
        held = {key: checkpoint.read(key).nbytes for key in checkpoint.keys() if key != "w#spec"}
        assert sum(held.values()) == size < leaf.nbytes


def test_a_row_count_that_lies_is_refused(tmp_path):
    leaf = CSR.from_mask(jnp.ones((4, 40)), RNG.random((4, 40)) < 0.5)
    tensors = native.encode_leaf("w", leaf)
    tensors["w#counts"] = tensors["w#counts"] + 1
    write_checkpoint(tmp_path / "out", None, tensors.items())
    with pytest.raises(InputError, match="w: its parts do not make up"):
        Native(open_checkpoint(tmp_path / "out")).read("w")


def test_containers_come_back(tmp_path):
    tree = {
        "layers": [{"kernel": affine()}, {"kernel": jnp.ones((2, 3))}],
        "0": (jnp.zeros(3), None, {}, []),
        "a/b#c%d": {"": jnp.ones(())},
        "step": 7,
        "rate": 0.5,
        "on": True,
    }
    back = read_native(write_native(tmp_path / "out", tree))
    assert identical_trees(back, tree)
    assert back["0"][1] is None
    assert back["0"][2:] == ({}, [])


@pytest.mark.parametrize(
    "dtype",
    ["int4", "uint4", "int2", "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu", "bfloat16",
     "float64", "int64", "uint64", "complex64", "complex128", "bool", "float16", "uint16"],
)  # fmt: skip
def test_every_dtype_comes_back(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype))
    tree = {"x": array, "scalar": array[1, 2], "empty": array[:0], "t": array.T}
    assert identical_trees(read_native(write_native(tmp_path / "out", tree)), tree)
    opened = Native(open_checkpoint(tmp_path / "out"))
    assert opened.info("x") == (array.shape, array.dtype)
    assert identical(opened.read_rows("t", 1, 3), array.T[1:3])


@pytest.mark.parametrize("max_shard_bytes", [1, 500])
def test_shards_and_config_and_companions(tmp_path, max_shard_bytes):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    out = write_native(
        tmp_path / "out",
        LEAVES,
        {"model_type": "llama"},
        companions_from=tmp_path / "source",
        max_shard_bytes=max_shard_bytes,
    )
    assert len(list(out.glob("*.safetensors"))) > 2
    assert identical_trees(read_native(out), LEAVES)
    assert open_checkpoint(out).config == {"model_type": "llama"}
    assert (out / "tokenizer.json").exists()


def test_leaves_are_read_one_by_one(tmp_path):
    out = write_native(tmp_path / "out", {"a": {"w": LEAVES["affine"]}, "b": jnp.ones((3, 2))})
    opened = Native(open_checkpoint(out))
    assert sorted(opened.keys()) == ["a/w", "b"]
    assert [opened.is_compressed(name) for name in ("a/w", "b")] == [True, False]
    assert opened.info("a/w") == (LEAVES["affine"].shape, np.float32)
    assert identical(opened.read("a/w"), LEAVES["affine"])
    assert identical(opened.read_rows("a/w", 1, 3), LEAVES["affine"].dense()[1:3])
    assert identical(opened.read_rows("b", 1, 3), np.ones((2, 2), np.float32))
    with pytest.raises(InputError, match="no tensor 'c'"):
        opened.read("c")


def test_tensors_of_a_checkpoint_under_their_own_names(tmp_path):
    """An export leaf by leaf: no tree, a flat dict by names."""
    tensors = {}
    for name, leaf in {"a.weight": LEAVES["affine"], "b.weight": np.ones((2, 3))}.items():
        tensors.update(native.encode_leaf(name, leaf))
        assert list(native.encode_leaf(name, leaf)) == native.names_of_leaf(name, leaf)
    abstract = jax.eval_shape(lambda: LEAVES["sum"])
    assert native.names_of_leaf("x", abstract) == native.names_of_leaf("x", LEAVES["sum"])
    out = write_checkpoint(tmp_path / "out", {}, tensors.items())
    back = read_native(out)
    assert identical(back["a.weight"], LEAVES["affine"])
    assert identical(back["b.weight"], np.ones((2, 3)))


def test_a_killed_run_computes_no_leaf_twice(tmp_path):
    calls = []

    def leaf(name, value):
        def compute():
            calls.append(name)
            if value is None:
                raise KeyboardInterrupt
            return value

        return compute

    def tree(last):
        values = {"a": LEAVES["affine"], "b": jnp.ones(3), "c": last}
        return {"x": {name: leaf(name, value) for name, value in values.items()}}

    with pytest.raises(KeyboardInterrupt):
        write_native(tmp_path / "out", tree(None), fingerprint="f", max_shard_bytes=1)
    assert not (tmp_path / "out").exists()
    write_native(tmp_path / "out", tree(LEAVES["sum"]), fingerprint="f", max_shard_bytes=1)
    assert calls == ["a", "b", "c", "c"]
    back = read_native(tmp_path / "out")
    assert identical(back["x"]["a"], LEAVES["affine"])
    assert identical(back["x"]["c"], LEAVES["sum"])


def test_a_place_on_a_mesh_is_left_out(tmp_path):
    placed = LEAVES["affine"].replace(partition=Partition(None, ("data",)))
    back = read_native(write_native(tmp_path / "out", {"w": placed}))
    assert identical(back["w"], LEAVES["affine"])


def test_a_class_of_the_users_own(tmp_path):
    @register
    class Doubled(CompressedArray):
        roles = {"half": (ROWS, CONTRACTED)}
        half: jax.Array
        note: tuple[tuple[str, int], ...] = (("x", 1),)
        dims: tuple = KERNEL
        casts: tuple[str, ...] = ("float32",)

        @property
        def contracted(self):
            return self.half.shape[-1]

        def decode(self):
            return self.half * 2

    leaf = Doubled(jnp.ones((2, 3)), (("y", 2), ("z", 3)))
    assert identical(read_native(write_native(tmp_path / "out", {"w": leaf}))["w"], leaf)


def with_spec(tmp_path, change):
    """A native directory whose spec of `w` is changed, in place or to other bytes."""
    tensors = native.encode_leaf("w", LEAVES["affine"])
    spec = json.loads(tensors["w#spec"].tobytes())
    changed = change(spec)
    text = changed if isinstance(changed, bytes) else json.dumps(spec).encode()
    tensors["w#spec"] = np.frombuffer(text, np.uint8)
    return write_checkpoint(tmp_path / "out", {}, tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"class": "Gone"}), "unknown class 'Gone'"),
        (lambda s: s.update({"class": "object"}), "unknown class 'object'"),
        (lambda s: s.update({"class": ["Affine"]}), "do not make up"),
        (lambda s: s.update(version=2), "native version 2"),
        (lambda s: s["static"].update(bits=4), "do not make up"),
        (lambda s: s["static"].update(pad=0), "do not make up"),
        (lambda s: s["static"].update(secret=4), "fields that Affine does not have"),
        (lambda s: s["buffers"].update(other=None), "fields that Affine does not have"),
        (lambda s: s["buffers"].update(zero_point={"class": "Affine"}), "do not make up"),
        (lambda s: s["buffers"].pop("codes"), "do not make up"),
        (lambda s: s.update(shape=[1, 2]), "do not make up"),
        (lambda s: s.update(dtype="int8"), "do not make up"),
        (lambda s: s.pop("static"), "do not make up"),
        (lambda s: b"{", "do not make up"),
        (lambda s: b"\xff", "do not make up"),
        (lambda s: b"[]", "do not make up"),
    ],
)
def test_a_wrong_spec_is_one_line(tmp_path, change, message):
    out = with_spec(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        read_native(out)
    assert "\n" not in str(caught.value)


def test_what_is_not_native_is_one_line(tmp_path):
    out = write_checkpoint(tmp_path / "dense", {}, {"x": np.ones(1)}.items())
    with pytest.raises(InputError, match="not written in the native convention"):
        read_native(out)


class Thing:
    pass


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [Thing()]}, "a/0: Thing has no native form"),
        ({"a": {1: jnp.ones(1)}}, "a: the key 1 is not text"),
        ({"a": "text"}, "a: str has no native form"),
        ({"a": np.array([None])}, "no array of numbers"),
        ({"a": None}, "no array in the tree"),
    ],
)
def test_trees_that_have_no_native_form_are_refused(tmp_path, tree, message):
    with pytest.raises(InputError, match=message):
        write_native(tmp_path / "out", tree)
    assert not (tmp_path / "out").exists()


def test_the_files_are_as_documented(tmp_path):
    """What docs/formats.md promises to other readers."""
    out = write_native(tmp_path / "out", {"l": [{"w": LEAVES["affine"]}], "b": jnp.ones(2)})
    with SafetensorsFile(out / "native.safetensors") as file:
        assert sorted(file.keys()) == [
            "b", "l/0/w#codes", "l/0/w#scale", "l/0/w#spec", "l/0/w#zero_point",
        ]  # fmt: skip
        tree = {"dict": {"l": {"list": [{"dict": {"w": "l/0/w"}}]}, "b": "b"}}
        assert json.loads(file.metadata["jaxcompress.tree"]) == tree
        spec = json.loads(file.read("l/0/w#spec").tobytes())
    assert spec["version"] == 1
    assert spec["class"] == "Affine"
    assert spec["static"]["bits"] == 3
    assert spec["static"]["dims"] == [["k", -1], ["n", -1]]
    assert spec["buffers"] == {"codes": None, "scale": None, "zero_point": None}
    assert (spec["shape"], spec["dtype"]) == ([40, 6], "float32")
