"""Files with a few bytes changed: read as something, or refused in one line; nothing else."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.checkpoints.safetensors import SafetensorsFile, save_file
from jaxcompress.checkpoints.torch_pickle import TorchFile
from jaxcompress.checkpoints.torch_writer import save_state_dict
from jaxcompress.core.errors import InputError

ARRAYS = {"a.w": np.ones((3, 4), np.float32), "b": np.arange(5, dtype=np.int8)}


def legacy(path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(array) for name, array in ARRAYS.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "safetensors": (lambda path: save_file(ARRAYS, path), SafetensorsFile),
    "zip": (lambda path: save_state_dict(path, ARRAYS), TorchFile),
    "legacy": (legacy, TorchFile),
}


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=100)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    cut=st.floats(0, 1),
    shorten=st.booleans(),
)
def test_damaged_files_never_surprise(tmp_path_factory, kind, changes, cut, shorten):
    write, reader = WRITERS[kind]
    path = tmp_path_factory.getbasetemp() / f"damage.{kind}"
    write(path)
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[int(where * len(data))] = value
    path.write_bytes(data[: int(cut * len(data))] if shorten else data)
    with contextlib.suppress(InputError), reader(path) as file:
        for name in list(file.keys()):
            assert file.read(name).nbytes <= 256 << 20
            assert file.read(name).shape == file.info(name).shape


@given(junk=st.binary(max_size=200))
def test_any_bytes_after_a_pickle_protocol(tmp_path_factory, junk):
    path = tmp_path_factory.getbasetemp() / "junk.pth"
    path.write_bytes(io.BytesIO(b"\x80\x02" + junk).getvalue())
    with pytest.raises(InputError):
        TorchFile(path)
