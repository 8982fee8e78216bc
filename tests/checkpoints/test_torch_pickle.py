"""PyTorch files against PyTorch in both directions, and pickles that are not state dicts."""

import collections
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.checkpoints.prune import fold_pruned, unfold_pruned
from jaxcompress.checkpoints.torch_pickle import TorchFile, load_state_dict
from jaxcompress.checkpoints.torch_unpickler import DTYPES
from jaxcompress.checkpoints.torch_writer import save_state_dict
from jaxcompress.core.errors import InputError

torch = pytest.importorskip("torch")

NAMES = sorted(set(DTYPES) - {"bool"})


def torch_bits(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def random_tensor(shape, name, seed=0):
    dtype = DTYPES[name]
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(seed).integers(0, 256, (count,), np.uint8)
    if not count:
        return torch.empty(shape, dtype=getattr(torch, name))
    return torch.tensor(bits).view(getattr(torch, name)).reshape(shape)


@st.composite
def views(draw):
    """Views with offsets, strides, transposes and expansions."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    tensor = random_tensor((*shape, 3), draw(st.sampled_from(NAMES)), draw(st.integers(0, 99)))
    tensor = tensor.permute(*draw(st.permutations(range(tensor.ndim))))
    axis = draw(st.integers(0, tensor.ndim - 1))
    tensor = tensor.narrow(
        axis, *draw(st.sampled_from([(0, 1), (0, 0), (tensor.shape[axis] - 1, 1)]))
    )
    return tensor.expand(2, *tensor.shape) if draw(st.booleans()) else tensor


@pytest.mark.parametrize("zipped", [True, False])
@given(views=st.lists(views(), max_size=3), parameter=st.booleans())
def test_what_pytorch_saves_we_read(tmp_path_factory, zipped, views, parameter):
    path = tmp_path_factory.mktemp("pt") / "x.pth"
    state = {f"layer.{i}": view for i, view in enumerate(views)}
    if parameter:
        state["p"] = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    if views and views[0].ndim:
        state["shared"] = views[0][:1]
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with TorchFile(path) as file:
        assert file.keys() == list(state)
        for name, tensor in state.items():
            read = file.read(name)
            assert read.shape == tuple(tensor.shape) == file.info(name).shape
            assert str(tensor.dtype) == f"torch.{read.dtype}"
            assert read.tobytes() == torch_bits(tensor)
            if read.ndim and len(read):
                rows = file.read_rows(name, len(read) - 1, len(read))
                assert rows.tobytes() == read[-1:].tobytes()


@given(
    specs=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(NAMES)),
        max_size=4,
    )
)
def test_what_we_save_pytorch_reads(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("pt") / "x.pth"
    tensors = {f"x.{i}": random_tensor(*spec, seed=i) for i, spec in enumerate(specs)}
    arrays = {
        n: np.frombuffer(torch_bits(t), DTYPES[spec[1]]).reshape(spec[0])
        for (n, t), spec in zip(tensors.items(), specs, strict=True)
    }
    save_state_dict(path, {"flat": arrays, "flag": np.array([True, False])})
    read = torch.load(path, weights_only=True)
    assert read["flag"].tolist() == [True, False]
    assert list(read["flat"]) == list(tensors)
    for name, tensor in tensors.items():
        assert read["flat"][name].dtype == tensor.dtype
        assert read["flat"][name].shape == tensor.shape
        assert torch_bits(read["flat"][name]) == torch_bits(tensor)
    with TorchFile(path) as file:  # and so do we
        for name, array in arrays.items():
            assert file.read(f"flat.{name}").tobytes() == array.tobytes()


def test_a_state_dict_of_a_module_comes_back(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "x.pth")
    flat = load_state_dict(tmp_path / "x.pth")
    assert list(flat) == list(module.state_dict())
    assert flat["1.num_batches_tracked"].shape == ()
    tree = load_state_dict(tmp_path / "x.pth", nest=True)
    np.testing.assert_array_equal(tree["0"]["weight"], module[0].weight.detach().numpy())
    save_state_dict(tmp_path / "y.pth", flat)
    module.load_state_dict(torch.load(tmp_path / "y.pth", weights_only=True))


def test_the_state_dict_is_found_in_a_training_checkpoint(tmp_path):
    state = collections.OrderedDict({"module.conv.weight": torch.ones(2, 2)})
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "x.tar")
    with TorchFile(tmp_path / "x.tar") as file:
        assert file.keys() == ["module.conv.weight"]
        assert file.tree["epoch"] == 3
        assert file.tree["optimizer"] == {"lr": 0.1}


def test_a_single_tensor_and_lists_have_names(tmp_path):
    torch.save(torch.ones(2), tmp_path / "x.pt")
    assert list(load_state_dict(tmp_path / "x.pt")) == ["tensor"]
    torch.save({"a": [torch.ones(1), torch.zeros(1)]}, tmp_path / "x.pt")
    assert list(load_state_dict(tmp_path / "x.pt")) == ["a.0", "a.1"]


def test_real_weights_of_2018(assets):
    path = assets / "cifar-resnet20" / "resnet20-12fca82f.th"
    theirs = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    mine = load_state_dict(path)
    assert list(mine) == list(theirs)
    assert all(mine[n].tobytes() == torch_bits(theirs[n]) for n in mine)


class Attack:
    """Unpickled by the standard module, this runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_code_is_refused_by_name_and_does_not_run(tmp_path, protocol, container):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    program = pickle.dumps({"weight": Attack(marker)}, protocol)
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
    elif container == "legacy":
        head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join([*head, program]))
    else:
        path.write_bytes(program)
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    if protocol >= 2:
        assert f"asks for {os.system.__module__}.system" in str(caught.value)


@pytest.mark.parametrize(
    "module", [torch.nn.Linear(2, 2), torch.nn.functional.relu, np.float64(3), np.ones(3)]
)
def test_whole_modules_and_foreign_objects_are_refused(tmp_path, module):
    torch.save({"x": module}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="asks for"):
        TorchFile(tmp_path / "x.pth")


def torch_zip(path, program, entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in entries.items():
            archive.writestr(f"archive/data/{name}", data)


def tensor_program(shape, strides, offset=0, count=4):
    """A state dict {"x": tensor} over the storage 0 of float32."""

    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(number(n) for n in values) + b"t"

    def text(t):
        return b"X" + struct.pack("<I", len(t)) + t

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(count) + b"tQ"
    tensor += number(offset) + numbers(shape) + numbers(strides) + b"\x89}tR"
    return b"\x80\x02}" + text(b"x") + tensor + b"s."


FORGED = {
    "huge storage": (tensor_program((2,), (1,), count=10**15), "should hold"),
    "huge tensor": (tensor_program((10**15,), (1,)), "reaches beyond"),
    "huge offset": (tensor_program((1,), (1,), offset=10**15), "reaches beyond"),
    "huge stride": (tensor_program((2,), (10**15,)), "reaches beyond"),
    "huge expansion": (tensor_program((10**15,), (0,)), "out of a storage"),
    "negative offset": (tensor_program((1,), (1,), offset=-1), "malformed"),
    "negative stride": (tensor_program((2,), (-1,), offset=1), "malformed"),
    "negative shape": (tensor_program((-1,), (1,)), "malformed"),
    "ranks differ": (tensor_program((2, 2), (1,)), "malformed"),
    "too many axes": (tensor_program((1,) * 100, (1,) * 100), "malformed"),
    "truncated": (tensor_program((2,), (1,))[:-9], "cannot be read"),
    "a long text": (b"\x80\x02X\xff\xff\xff\xffabc.", "ends too early"),
    "a huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 10**15) + b".", "ends too early"),
    "a huge memo": (b"\x80\x02}r\xff\xff\xff\xff.", None),
    "a circle": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "in a circle"),
    "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 10**15) + b".", "instruction BYTEARRAY8"),
    "unknown code": (b"\x80\x02\xff.", "cannot be read"),
    "setting attributes": (b"\x80\x02ctorch\nSize\n}b.", "sets attributes"),
    "calling data": (b"\x80\x02ctorch\nfloat32\n)R.", "calls"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_pickles_are_refused_before_memory_is_taken(tmp_path, case):
    program, message = FORGED[case]
    torch_zip(tmp_path / "x.pth", program, {"0": bytes(16)})
    if message is None:  # harmless for an interpreter whose memo is a dict
        assert load_state_dict(tmp_path / "x.pth") == {}
        return
    with pytest.raises(InputError, match=message) as caught:
        TorchFile(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_the_forger_of_these_tests_can_write_a_good_file_too(tmp_path):
    values = np.arange(4, dtype=np.float32)
    torch_zip(tmp_path / "x.pth", tensor_program((2, 2), (1, 2)), {"0": values.tobytes()})
    np.testing.assert_array_equal(load_state_dict(tmp_path / "x.pth")["x"], [[0, 2], [1, 3]])


@pytest.mark.parametrize("zipped", [True, False])
@given(cut=st.integers(1, 700))
def test_every_truncation_is_noticed(tmp_path_factory, zipped, cut):
    path = tmp_path_factory.mktemp("pt") / "x.pth"
    torch.save({"x": torch.ones(20)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    with pytest.raises(InputError):
        TorchFile(path)


def test_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    save_state_dict(path, {"a": np.ones(3)})
    whole = path.read_bytes()

    def patched(position, data):
        path.write_bytes(whole[:position] + data + whole[position + len(data) :])
        with pytest.raises(InputError, match="damaged zip archive"):
            TorchFile(path)

    patched(whole.index(b"PK\1\2") + 6, b"\x80")  # a version of zip that does not exist
    directory = struct.unpack("<I", whole[-6:-2])[0]
    patched(len(whole) - 6, struct.pack("<I", directory + 100_000))  # entries before the file


def test_odd_archives_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(InputError, match="no PyTorch file"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000)
    with pytest.raises(InputError, match="compressed"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_program((1,), (1,)))
    with pytest.raises(InputError, match="a storage 0 that is not there"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save writes
        archive.writestr("archive/data.pkl", tensor_program((1,), (1,)))
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
    with pytest.raises(InputError, match="TorchScript"):
        TorchFile(path)
    path.write_bytes(b"<html>")
    with pytest.raises(InputError, match="no PyTorch file"):
        TorchFile(path)


def test_dtypes_that_pytorch_lacks_are_refused(tmp_path):
    with pytest.raises(InputError, match="no dtype int4"):
        save_state_dict(tmp_path / "x.pth", {"a": np.ones(2, ml_dtypes.int4)})
    assert not list(tmp_path.iterdir())


def test_pruned_modules_fold_and_unfold_as_in_pytorch(tmp_path):
    prune = pytest.importorskip("torch.nn.utils.prune")
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    prune.l1_unstructured(module[0], "weight", amount=0.5)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    state = load_state_dict(tmp_path / "x.pth")
    folded, masks = fold_pruned(state)
    assert list(masks) == ["0.weight"]
    np.testing.assert_array_equal(masks["0.weight"], module[0].weight_mask.numpy() == 1)
    back = unfold_pruned({**folded, "0.weight": state["0.weight_orig"]}, masks)
    save_state_dict(tmp_path / "y.pth", back)
    module.load_state_dict(torch.load(tmp_path / "y.pth", weights_only=True))
    prune.remove(module[0], "weight")
    theirs = module.state_dict()
    assert set(folded) == set(theirs)
    for name in folded:
        np.testing.assert_array_equal(folded[name], theirs[name].numpy())


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="a mask of 0 and 1"):
        fold_pruned({"w_orig": np.ones(2), "w_mask": np.full(2, 0.5)})
    with pytest.raises(InputError, match="no weight of that name"):
        unfold_pruned({"w": np.ones(2)}, {"v": np.ones(2, bool)})
    untouched = {"x_orig": np.ones(1), "y_mask": np.ones(1)}
    assert fold_pruned(untouched) == (untouched, {})
