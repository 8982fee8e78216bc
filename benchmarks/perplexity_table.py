"""Perplexity of every export, in JAX and in PyTorch, on the same tokens.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/perplexity_table.py

Compresses `DIR/tinystories-656k` with the command line, opens each result with jaxcompress and
with `transformers`, and asks both for the perplexity on the first 130,000 tokens of
`DIR/text/tinystories-valid.txt`, in windows of 512 that do not overlap. Each side makes its own
token ids; that they agree is checked. PyTorch runs as this program writes it, without jaxcompress.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tables import Table, arguments, write
from torch.nn.functional import cross_entropy

import jaxcompress as jc

CTX, TOKENS = 512, 130_000
W4 = "--method rtn --bits 4 --group-size 64"
EXPORTS = {  # name: (made from, options of `jaxcompress compress`)
    "W8 per channel": ("dense", "--method rtn --bits 8 --granularity channel"),
    "W4 group 64": ("dense", W4),
    "2:4 magnitude": ("dense", "--method magnitude --pattern 2:4"),
    "2:4, then W4": ("2:4 magnitude", W4),
    "one layer dropped": ("dense", "--method depth --drop 1"),
}


def exported(folder, source, options, calibration):
    """A directory that `jaxcompress compress` made."""
    command = [sys.executable, "-m", "jaxcompress", "compress", source, folder, *options.split()]
    if "depth" in options:
        command += ["--calibration", calibration]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder


def torch_model(path):
    """What anyone opens with transformers, in float32; every weight must come from the files."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    if any(said.values()):
        raise SystemExit(f"{path}: {said}")
    return model.eval()


@torch.no_grad()
def torch_perplexity(model, ids, ctx=CTX, batch=16):
    """exp of the mean loss over the predicted tokens of every whole window."""
    windows = torch.from_numpy(ids[: len(ids) // ctx * ctx].astype(np.int64)).view(-1, ctx)
    loss = torch.zeros((), dtype=torch.float64)
    for some in windows.split(batch):
        logits = model(some).logits[:, :-1].flatten(0, 1)
        loss += cross_entropy(logits, some[:, 1:].flatten(), reduction="sum").double()
    count = windows.shape[0] * (ctx - 1)
    return float(torch.exp(loss / count)), count


def weight_bytes(folder):
    """Bytes of the weight files of a directory."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main():
    """Prints and writes the table."""
    args = arguments(__doc__)
    if "JAXCOMPRESS_ASSETS" not in os.environ:
        raise SystemExit("set JAXCOMPRESS_ASSETS to the folder that holds tinystories-656k")
    transformers.utils.logging.disable_progress_bar()
    assets = Path(os.environ["JAXCOMPRESS_ASSETS"])
    source, text = assets / "tinystories-656k", assets / "text" / "tinystories-valid.txt"
    calibration = assets / "text" / "tinystories-train-head.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = np.asarray(tokenizer(text.read_text(), add_special_tokens=False).input_ids)[:TOKENS]
    dense = jc.load(source)
    ours = np.asarray(dense.tokenizer.encode(text.read_text()))[:TOKENS]
    np.testing.assert_array_equal(ours, ids)

    columns = ["weights", "ours", "PyTorch", "ours - PyTorch", "bytes", "KL", "agreement"]
    table = Table("TinyStories-656K", columns)
    with tempfile.TemporaryDirectory() as folder:
        made = {"dense": source}
        for name in ["dense", *EXPORTS]:
            if name != "dense":
                start, options = EXPORTS[name]
                made[name] = exported(
                    Path(folder) / f"{len(made)}", made[start], options, calibration
                )
            found = jc.evaluate(
                jc.load(made[name]), text=text, ctx=CTX, tokens=TOKENS, against=dense
            )
            theirs, count = torch_perplexity(torch_model(made[name]), ids)
            if found["tokens"] != count:
                raise SystemExit(f"{found['tokens']} tokens predicted here, {count} in PyTorch")
            value = found["perplexity"]
            table.add(
                name, f"{value:.4f}", f"{theirs:.4f}", value - theirs,
                weight_bytes(made[name]), found["kl"], f"{found['agreement']:.4f}",
            )  # fmt: skip
    notes = [
        f"{count:,} predicted tokens. KL (nats a token) and agreement (share of equal most likely "
        "tokens) of ours against the dense model. Bytes of the weight files: float32 where dense, "
        "as the source; the tied embedding, 2048 x 128, is dense in every row."
    ]
    write(args.out, "perplexity_table", __doc__, [table], notes)


if __name__ == "__main__":
    main()
