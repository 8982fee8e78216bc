"""Quality over slices, on a mesh and with several processes, against one device and NumPy."""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.evaluation.footprint import footprint
from jaxcompress.evaluation.images import accuracy
from jaxcompress.evaluation.language import perplexity
from jaxcompress.evaluation.measure import measure
from jaxcompress.models import DecoderConfig, build_model
from jaxcompress.training.mesh import dense_shardings, make_mesh

CTX, VOCAB = 32, 120
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
IDS = np.random.default_rng(0).integers(0, VOCAB, CTX * 23 + 7).astype(np.int32)
WINDOWS = IDS[: CTX * 23].reshape(-1, CTX)


@functools.cache
def dense():
    return build_model(CONFIG)


@functools.cache
def small():
    return jc.compress(dense(), "rtn", bits=3, group_size=32)


@jax.jit
def logp_of(params, windows):
    return jax.nn.log_softmax(jc.lift(dense().apply)(params, windows)[:, :-1])


@functools.cache
def by_hand(which):
    """Losses `[windows, ctx - 1]` and log probabilities, float64."""
    model = {"dense": dense, "small": small}[which]()
    logp = np.asarray(logp_of(model.params, WINDOWS), np.float64)
    return -np.take_along_axis(logp, WINDOWS[:, 1:, None], axis=-1)[..., 0], logp


def test_slices_are_contiguous_runs_of_windows():
    found = perplexity(small(), IDS, ctx=CTX, slices=5, against=dense())
    losses, _ = by_hand("small")
    runs = [losses[a:b] for a, b in ((0, 5), (5, 10), (10, 15), (15, 19), (19, 23))]
    want = [np.exp(run.mean()) for run in runs]
    np.testing.assert_allclose(found["slices"], want, rtol=1e-5)
    assert found["spread"] == pytest.approx(np.std(want, ddof=1), rel=1e-3)
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)


def test_slices_count_each_token_once_where_windows_overlap():
    found = perplexity(dense(), IDS, ctx=CTX, stride=CTX // 2, slices=2)
    counts = [CTX - 1 + 22 * CTX // 2, 22 * CTX // 2]
    together = np.average(np.log(found["slices"]), weights=counts)
    assert found["tokens"] == sum(counts)
    assert np.exp(together) == pytest.approx(found["perplexity"], rel=1e-6)


def test_without_slices_the_number_is_the_same_to_the_bit():
    keys = ("perplexity", "kl", "agreement", "tokens", "ctx")
    plain = perplexity(small(), IDS, ctx=CTX, against=dense())
    sliced = perplexity(small(), IDS, ctx=CTX, against=dense(), slices=7)
    assert tuple(plain) == ("perplexity", "tokens", "ctx", "kl", "agreement")
    assert [sliced[k] for k in keys] == [plain[k] for k in keys]
    assert plain["perplexity"] == summed_by_batches(small())


def summed_by_batches(model):
    """The protocol as a program that knows no slices: float32 sums of batches of 16 windows."""

    @jax.jit
    def of_batch(params, windows, weights):
        scored = weights[:, 1:].astype(jnp.float32)
        logits = jc.lift(model.apply)(params, windows)[:, :-1].astype(jnp.float32)
        logp = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(logp, windows[:, 1:, None], axis=-1)[..., 0]
        return jnp.stack([(x * scored).sum() for x in (jnp.ones_like(loss), loss)])

    sums = np.zeros(2)
    for at in (0, 16):
        windows = WINDOWS[at : at + 16]
        missing = ((0, 16 - len(windows)), (0, 0))
        weights = np.arange(CTX)[None] >= np.ones((len(windows), 1))
        found = of_batch(model.params, np.pad(windows, missing), np.pad(weights, missing))
        sums += np.asarray(found, np.float64)
    return float(np.exp(sums[1] / sums[0]))


def test_fewer_windows_than_slices():
    found = perplexity(dense(), IDS[: 3 * CTX], ctx=CTX, slices=5)
    assert len(found["slices"]) == 3
    assert "slices" not in perplexity(dense(), IDS[:CTX], ctx=CTX, slices=5)


def table(vocab, size=1.0):
    rows = np.random.default_rng(0).normal(scale=size, size=(VOCAB, vocab)).astype(np.float32)
    return Model(lambda params, ids: params[ids], rows)


def test_what_does_not_fit_the_vocabulary_is_refused():
    model = table(VOCAB)
    for bad in (-1, VOCAB):
        with pytest.raises(InputError, match=f"token id {bad}: the model's vocabulary has 120"):
            perplexity(model, np.where(IDS == 3, bad, IDS), ctx=CTX)
    with pytest.raises(InputError, match=r"against: a vocabulary of 128 entries, .* model has 120"):
        perplexity(model, IDS, ctx=CTX, against=table(128))


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_all_numbers_is_infinite():
    found = perplexity(table(VOCAB, 1e4), IDS, ctx=CTX, slices=2)
    assert found["perplexity"] == np.inf
    assert found["slices"] == [np.inf, np.inf]
    assert np.isnan(found["spread"])


# ------------------------------------------------------------------------------------- images


def classifier(seed):
    kernel = np.random.default_rng(seed).normal(size=(8 * 8 * 3, 10)).astype(np.float32)
    return Model(lambda p, x: x.reshape(len(x), -1) @ p["kernel"], {"kernel": kernel})


PIXELS = np.random.default_rng(1).integers(0, 256, (137, 8, 8, 3)).astype(np.uint8)
LABELS = np.random.default_rng(2).integers(0, 10, 137)


def test_accuracy_and_kl_of_images():
    from jaxcompress.data.images import normalize

    model, other = classifier(0), classifier(1)
    model.params["kernel"] = 0.9 * other.params["kernel"] + 0.1 * model.params["kernel"]
    images = normalize(PIXELS)
    found = accuracy(model, PIXELS, LABELS, batch=50, against=other, slices=4)
    flat = images.reshape(137, -1).astype(np.float64)
    logits = [flat @ one.params["kernel"].astype(np.float64) for one in (model, other)]
    mine, theirs = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    right = mine.argmax(-1) == LABELS
    assert found["accuracy"] == right.mean()
    assert found["agreement"] == (mine.argmax(-1) == theirs.argmax(-1)).mean()
    assert found["kl"] == pytest.approx((np.exp(theirs) * (theirs - mine)).sum(-1).mean(), rel=1e-4)
    assert found["slices"] == [part.mean() for part in np.array_split(right, 4)]
    assert accuracy(model, images, LABELS)["accuracy"] == found["accuracy"]


def test_images_that_do_not_fit_are_refused():
    model = classifier(0)
    with pytest.raises(InputError, match="0 images and 0 labels"):
        accuracy(model, PIXELS[:0], LABELS[:0])
    with pytest.raises(InputError, match="137 images and 1 labels"):
        accuracy(model, PIXELS, LABELS[:1])
    fewer = Model(model.apply, {"kernel": model.params["kernel"][:, :7]})
    with pytest.raises(InputError, match="against: 7 classes, the model has 10"):
        accuracy(model, PIXELS, LABELS, against=fewer)


def test_measure_of_a_classifier():
    found = measure(classifier(0), heldout=(PIXELS, LABELS), train=(PIXELS[:50], LABELS[:50]))
    assert found["quality"]["heldout"]["images"] == 137
    assert found["quality"]["train"]["images"] == 50
    assert found["size"]["flops"] == 2 * 8 * 8 * 3 * 10


# ----------------------------------------------------------------------------- many devices


def placed(model, mesh):
    shardings = dense_shardings(model, mesh)
    return model.replace(params=jc.place(model.params, shardings, batch=("data", "fsdp")))


def same(found, want):
    assert found.keys() == want.keys()
    for name, value in want.items():
        if name == "agreement":  # one token in 23 * 31 may be a tie
            assert found[name] == pytest.approx(value, abs=2e-3)
        else:
            np.testing.assert_allclose(found[name], value, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_gives_the_numbers_of_one_device(sizes):
    mesh = make_mesh(*sizes)
    want = perplexity(small(), IDS, ctx=CTX, slices=5, against=dense())
    found = perplexity(placed(small(), mesh), IDS, ctx=CTX, slices=5, against=placed(dense(), mesh))
    same(found, want)


def test_a_dense_model_on_one_device_beside_one_on_the_mesh():
    mesh = make_mesh(4, 2, 1)
    want = perplexity(small(), IDS, ctx=CTX, against=dense())
    same(perplexity(placed(small(), mesh), IDS, ctx=CTX, against=dense()), want)
    same(perplexity(small(), IDS, ctx=CTX, against=placed(dense(), mesh)), want)


def test_images_on_a_mesh():
    model, other = classifier(0), classifier(1)
    want = accuracy(model, PIXELS, LABELS, batch=50, against=other, slices=3)
    spread = placed(model, make_mesh(4, 2, 1))
    same(accuracy(spread, PIXELS, LABELS, batch=50, against=other, slices=3), want)


def measured(model, against):
    return measure(model, heldout=IDS, train=IDS[::-1], against=against, ctx=CTX, bytes_disk=77)


def test_measure_of_a_language_model():
    found = measured(small(), dense())
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(dense().params)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    weights = sum(leaf.size for leaf in kernels)
    size = found["size"]
    assert size["flops"] == 2 * weights + 4 * CTX * 64
    zeros = sum(np.count_nonzero(x == 0) for x in jax.tree.leaves(jc.densify(small().params)))
    total = sum(x.size for x in jax.tree.leaves(dense().params))
    assert size["nonzero"] == total - zeros
    assert size["parameters"] == total
    assert size["flops_nonzero"] == size["flops"] - 2 * zeros
    assert size["bytes_memory"] == footprint(small().params)["bytes"]
    assert size["bytes_disk"] == 77
    assert found["quality"]["heldout"]["perplexity"] == pytest.approx(
        np.exp(by_hand("small")[0].mean()), rel=1e-5
    )
    assert len(found["quality"]["train"]["slices"]) == 5
    json.dumps(found)


WORKER = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
sys.path[:0] = [sys.argv[3]]
import test_evaluate as t
from jaxcompress.evaluation.layers import layer_errors
mesh = t.make_mesh(2, 2, 1)
model, against = t.placed(t.small(), mesh), t.placed(t.dense(), mesh)
assert not model.params["layers"]["0"]["mlp"]["up_proj"]["kernel"].codes.is_fully_addressable
found = t.measured(model, against)
rows = layer_errors(against.params, model.params)
if jax.process_index() == 0:
    print(json.dumps([found, rows]))
"""


def test_two_processes_give_the_numbers_of_one_device():
    from jaxcompress.evaluation.layers import layer_errors

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # As this process compiles: what bfloat16 rounds depends on it.
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
             "JAX_PLATFORMS": "cpu"}  # fmt: skip
    here = os.path.dirname(__file__)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), here],
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [worker.communicate(timeout=800) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said[0][1] + said[1][1]
    found, rows = json.loads(said[0][0].strip().splitlines()[-1])
    want = measured(small(), dense())
    assert found["size"] == want["size"]
    for role in ("heldout", "train"):
        same(found["quality"][role], want["quality"][role])
    alone = layer_errors(dense().params, small().params)
    assert [row["path"] for row in rows] == [row["path"] for row in alone]
    for a, b in zip(rows, alone, strict=True):
        assert a["sqnr_db"] == pytest.approx(b["sqnr_db"], abs=1e-4)
        assert a["sparsity"] == b["sparsity"]
