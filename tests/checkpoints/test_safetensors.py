"""Reader and writer against the safetensors library, and against files made to hurt."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.checkpoints import safetensors as ours
from jaxcompress.checkpoints.tensors import row_chunks
from jaxcompress.core.errors import InputError

# What the safetensors library can carry through NumPy; the rest goes through PyTorch below.
NUMPY_DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_, np.complex64,
]  # fmt: skip

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
tensors = st.dictionaries(names, st.tuples(shapes, st.sampled_from(NUMPY_DTYPES)), max_size=4)


def random_array(shape, dtype, seed=0):
    """Random bits, so that NaNs and infinities are among the values."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).integers(
        0, 2 if dtype == np.bool_ else 256, (int(np.prod(shape)) * dtype.itemsize,), np.uint8
    )
    return bits.view(dtype).reshape(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def forged(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@given(specs=tensors)
def test_our_files_are_read_by_the_library(tmp_path_factory, specs):
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    arrays = {n: random_array(*spec, seed=i) for i, (n, spec) in enumerate(specs.items())}
    ours.save_file(arrays, path, {"format": "pt"})
    theirs = library.load_file(path)
    assert set(theirs) == set(arrays)
    assert all(same_bits(theirs[name], arrays[name]) for name in arrays)


@given(specs=tensors)
def test_files_of_the_library_are_read_by_us(tmp_path_factory, specs):
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    arrays = {n: random_array(*spec, seed=i) for i, (n, spec) in enumerate(specs.items())}
    library.save_file(arrays, path, {"made": "there"})
    with ours.SafetensorsFile(path) as file:
        assert file.metadata == {"made": "there"}
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            assert file.info(name) == (array.shape, array.dtype)
            assert same_bits(file.read(name), array)


@pytest.mark.parametrize(
    ("ours_dtype", "torch_name"),
    [
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        (ml_dtypes.float8_e5m2, "float8_e5m2"),
        (ml_dtypes.float8_e8m0fnu, "float8_e8m0fnu"),
    ],
)
def test_float_formats_that_numpy_lacks_agree_with_pytorch(tmp_path, ours_dtype, torch_name):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    bits = np.arange(256, dtype=np.uint8)
    array = bits.view(ours_dtype).reshape(2, -1)
    tensor = torch.tensor(bits).view(getattr(torch, torch_name)).reshape(2, -1)
    ours.save_file({"x": array}, tmp_path / "ours")
    library.save_file({"x": tensor}, tmp_path / "theirs")
    read = library.load_file(tmp_path / "ours")["x"]
    assert read.dtype == tensor.dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    assert same_bits(ours.SafetensorsFile(tmp_path / "theirs").read("x"), array)


@given(
    rows=st.integers(0, 7),
    width=st.integers(0, 3),
    cut=st.tuples(st.integers(0, 7), st.integers(0, 7)),
)
def test_rows_are_slices(tmp_path_factory, rows, width, cut):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    array = random_array((rows, width), np.float32)
    ours.save_file({"before": np.ones(3), "x": array}, path)
    start, stop = sorted(min(c, rows) for c in cut)
    with ours.SafetensorsFile(path) as file:
        assert same_bits(file.read_rows("x", start, stop), array[start:stop])
        pieces = list(row_chunks(file, "x", max_bytes=8))
        if rows:
            assert same_bits(np.concatenate(pieces), array)
        with pytest.raises(InputError, match="has no rows"):
            file.read_rows("x", 0, rows + 1)


def test_tensors_arrive_in_pieces_and_in_any_order(tmp_path):
    a, b = random_array((5, 3), ml_dtypes.bfloat16), random_array((4,), np.float64)
    path = tmp_path / "x.safetensors"
    with ours.SafetensorsWriter(path, {"a": (a.shape, a.dtype), "b": (b.shape, b.dtype)}) as out:
        out.write_rows("a", a[:2])
        out.write("b", b)
        assert not path.exists()
        out.write_rows("a", a[2:])
    with ours.SafetensorsFile(path) as file:
        assert same_bits(file.read("a"), a)
        assert same_bits(file.read("b"), b)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tensors_lie_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    ours.save_file({"a": np.ones(3, np.int8), "b": np.ones(3, np.float64)}, path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    begin = json.loads(raw[8 : 8 + length])["b"]["data_offsets"][0]
    assert (8 + length + begin) % 8 == 0


@pytest.mark.parametrize("how", ["error", "missing rows", "too many rows", "wrong dtype"])
def test_a_broken_write_leaves_nothing(tmp_path, how):
    def write():
        with ours.SafetensorsWriter(tmp_path / "x", {"a": ((2,), np.float32)}) as out:
            out.write_rows("a", np.ones(1, np.float32))
            if how == "error":
                raise RuntimeError("stop")
            if how == "too many rows":
                out.write_rows("a", np.ones(2, np.float32))
            if how == "wrong dtype":
                out.write_rows("a", np.ones(1, np.float64))

    with pytest.raises((RuntimeError, ValueError)):
        write()
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_when_a_write_breaks(tmp_path):
    path = tmp_path / "x"
    ours.save_file({"a": np.ones(1)}, path)
    writer = ours.SafetensorsWriter(path, {"a": ((2,), np.float32)})
    with pytest.raises(ValueError, match="not completely written"), writer:
        pass
    assert ours.SafetensorsFile(path).read("a") == 1


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FORGED = {
    "a huge shape": ({"x": entry(shape=(10**15,), offsets=(0, 4 * 10**15))}, b"", "claims bytes"),
    "a huge offset": ({"x": entry(offsets=(0, 10**15))}, b"\0" * 8, "claims bytes"),
    "huge shape, small range": ({"x": entry(shape=(10**15,))}, b"\0" * 8, "needs 4000000000000000"),
    "truncated data": ({"x": entry()}, b"\0" * 7, "truncated or damaged"),
    "unknown dtype": ({"x": entry(dtype="F4")}, b"\0" * 8, "unknown dtype 'F4'"),
    "dtype no text": ({"x": entry(dtype=["F32"])}, b"\0" * 8, "unknown dtype"),
    "mismatch": ({"x": entry(shape=(3,))}, b"\0" * 8, "needs 12 bytes"),
    "overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12, "overlaps"),
    "gap": ({"x": entry(), "y": entry(offsets=(12, 20))}, b"\0" * 20, "gap"),
    "trailing bytes": ({"x": entry()}, b"\0" * 9, "1 bytes after"),
    "negative shape": ({"x": entry(shape=(-2,))}, b"\0" * 8, "malformed"),
    "negative offset": ({"x": entry(offsets=(-8, 0))}, b"\0" * 8, "malformed"),
    "reversed range": ({"x": entry(offsets=(8, 0))}, b"\0" * 8, "malformed"),
    "fractional shape": ({"x": entry(shape=(2.0,))}, b"\0" * 8, "malformed"),
    "no entry": ({"x": 3}, b"", "malformed"),
    "no object": (b"[1, 2]", b"", "no JSON object"),
    "no JSON": (b"{x", b"", "no valid JSON"),
    "no text": (b"\xff\xfe{}", b"", "no valid JSON"),
    "deep nesting": (b"[" * 100_000, b"", "no valid JSON"),
    "a name twice": (b'{"x": 1, "x": 2}', b"", "stands twice"),
    "odd metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused_in_one_line(tmp_path, case):
    header, data, message = FORGED[case]
    path = forged(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        ours.SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 10**15) + b"{}"])
def test_a_truncated_header_is_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"truncated"):
        ours.SafetensorsFile(path)


@given(cut=st.integers(0, 200))
def test_every_truncation_is_noticed(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("st") / "x"
    ours.save_file({"a": np.ones((3, 4)), "b": np.ones(5, np.int8)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - 1 - cut, 0)])
    with pytest.raises(InputError):
        ours.SafetensorsFile(path)


def test_what_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*missing"):
        ours.SafetensorsFile(tmp_path / "missing")
    with pytest.raises(InputError, match="cannot read"):
        ours.SafetensorsFile(tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        ours.save_file({}, tmp_path / "no" / "such" / "directory")


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path):
    path = tmp_path / "x"
    ours.save_file({"a": np.ones(1000)}, path)
    with ours.SafetensorsFile(path) as file:
        path.open("r+b").truncate(100)
        with pytest.raises(InputError, match="shorter"):
            file.read("a")


def test_a_wrong_name_is_answered_with_near_ones(tmp_path):
    ours.save_file({"layer.weight": np.ones(1)}, tmp_path / "x")
    with pytest.raises(InputError, match=r"no tensor 'layer.weigth'; near it: layer.weight"):
        ours.SafetensorsFile(tmp_path / "x").read("layer.weigth")


def test_dtypes_that_the_format_lacks_are_refused(tmp_path):
    with pytest.raises(InputError, match="no dtype int4"):
        ours.save_file({"x": np.ones(2, ml_dtypes.int4)}, tmp_path / "x")
    assert not list(tmp_path.iterdir())
