"""Memory does not grow with the tensors: measured in fresh processes."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxcompress.checkpoints.huggingface import open_checkpoint

MB = 1 << 20

PROGRAM = textwrap.dedent("""
    import resource, sys
    import numpy as np
    from jaxcompress.checkpoints.describe import describe
    from jaxcompress.checkpoints.huggingface import open_checkpoint
    from jaxcompress.checkpoints.huggingface_writer import write_checkpoint
    from jaxcompress.checkpoints.tensors import TensorChunks, row_chunks

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB on Linux

    rows, out = int(sys.argv[1]), sys.argv[2]
    before = peak()
    made = (np.full((2048, 1024), i, np.float32) for i in range(rows // 2048))
    big = TensorChunks((rows, 1024), np.dtype("float32"), made)
    write_checkpoint(out, {}, [("big", big)])
    checkpoint = open_checkpoint(out)
    copied = TensorChunks((rows, 1024), np.dtype("float32"), row_chunks(checkpoint, "big"))
    write_checkpoint(out + "2", {}, [("big", copied)])
    describe(out + "2")
    print(peak() - before)
""")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units")
def test_one_large_tensor_passes_in_pieces(tmp_path):
    rows = 128 * 1024  # 512 MB
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rows), str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 300  # a few chunks of 64 MB
    assert (tmp_path / "out2" / "model.safetensors").stat().st_size > 512 * MB
    last = open_checkpoint(tmp_path / "out2").read_rows("big", rows - 1, rows)
    np.testing.assert_array_equal(last, np.full((1, 1024), rows // 2048 - 1))
