"""The objective: values and gradients against PyTorch's losses on whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.distillation import distill, objective, student_from
from jaxcompress.models import (
    DecoderConfig,
    GPT2Config,
    abstract_params,
    build_model,
    with_scan_layers,
)
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.training.objective import next_token

VOCAB, WIDTH, BATCH, SEQ = 61, 16, 2, 23


def toy_blocks(dtype) -> Blocks:
    """A language model small enough that its programs compile at once."""

    def block(params, hidden):
        past = jnp.cumsum(hidden, 1) / jnp.arange(1, hidden.shape[1] + 1)[:, None]
        return hidden + jnp.tanh(past.astype(dtype) @ params["kernel"].astype(dtype))

    return Blocks(
        embed=lambda params, ids: params["embed"].astype(dtype)[ids],
        block=block,
        head=lambda params, hidden: hidden @ params["head"]["kernel"].astype(dtype),
    )


def toy(layers: int, seed: int, dtype=jnp.float32) -> Model:
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = toy_blocks(dtype)
    params = {
        "embed": drawn(VOCAB, WIDTH),
        "layers": {str(i): {"kernel": drawn(WIDTH, WIDTH)} for i in range(layers)},
        "head": {"kernel": 0.5 * drawn(WIDTH, VOCAB)},
    }
    return Model(blocks.run, params, blocks=blocks)


@pytest.fixture(scope="module")
def teacher() -> Model:
    return toy(3, seed=0)


@pytest.fixture(scope="module")
def student(teacher) -> Model:
    return student_from(teacher, 2)


def drawn_ids(seq: int = SEQ, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (BATCH, seq)).astype(np.int32)


def compiled(found):
    """`params, batch -> (metrics as means, gradient of the mean loss)`."""

    @jax.jit
    def both(params, batch, constants):
        def loss(params):
            sums = found.function(params, batch, jax.random.key(0), constants)
            return sums["loss"][0], sums

        gradient, sums = jax.grad(loss, has_aux=True)(params)
        count = sums["loss"][1]
        return {k: s / n for k, (s, n) in sums.items()}, jax.tree.map(lambda g: g / count, gradient)

    return lambda params, batch: both(params, batch, found.constants)


def run(found, params, batch):
    return compiled(found)(params, batch)


def reference(student, teacher, inputs, labels, weights, loss_of):
    """The same by PyTorch's losses on whole logits; gradients led back by an unchunked vjp."""
    apply = jax.jit(student.apply)
    logits = apply(student.params, inputs)
    x = torch.tensor(np.asarray(logits, np.float64), requires_grad=True)
    t = torch.tensor(np.asarray(jax.jit(teacher.apply)(teacher.params, inputs), np.float64))
    keep = torch.tensor(weights > 0)
    value = loss_of(x[keep], t[keep], torch.tensor(np.asarray(labels, np.int64))[keep])
    value.backward()
    back = jax.jit(lambda params, slope: jax.vjp(lambda p: apply(p, inputs), params)[1](slope)[0])
    return value.item(), back(student.params, jnp.asarray(x.grad.numpy(), logits.dtype))


def torch_loss(temperature, alpha, beta):
    def loss(x, t, labels):
        soft = F.kl_div(
            F.log_softmax(x / temperature, -1),
            F.log_softmax(t / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        return alpha * soft * temperature**2 + beta * F.cross_entropy(x, labels)

    return loss


def next_tokens(ids):
    weights = np.ones(ids.shape)
    weights[:, -1] = 0
    return np.roll(ids, -1, 1), weights


def assert_close(got, want, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the largest entry of the whole tree."""
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * scale)


LLAMA = DecoderConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)


def drawn_params(config):
    """Parameters without compiling their initialisation; logits as far apart as trained ones."""
    rng = np.random.default_rng(0)

    def drawn(leaf):
        size = 3 * leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 1.0
        return jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(drawn, abstract_params(config))


@pytest.mark.parametrize("chunk", [1, 8, 128])
def test_kl_of_tokens_is_that_of_torch_in_every_chunk(student, teacher, chunk):
    ids = drawn_ids()
    found = distill(student, teacher, temperature=3.0, alpha=0.3, chunk=chunk)
    means, gradient = run(found, student.params, {"ids": ids})
    value, want = reference(student, teacher, ids, *next_tokens(ids), torch_loss(3.0, 0.3, 0.7))
    assert abs(float(means["loss"]) - value) < 1e-5 * value
    assert_close(gradient, want)
    assert float(means["soft"]) > 0.1  # two different models


def test_beta_is_a_weight_of_its_own(student, teacher):
    ids = drawn_ids()
    means, gradient = run(
        distill(student, teacher, alpha=1.0, beta=2.0, chunk=8), student.params, {"ids": ids}
    )
    value, want = reference(student, teacher, ids, *next_tokens(ids), torch_loss(2.0, 1.0, 2.0))
    assert abs(float(means["loss"]) - value) < 1e-5 * value
    assert_close(gradient, want)


def test_mse_has_no_hard_loss_unless_asked(student, teacher):
    ids = drawn_ids()
    means, gradient = run(
        distill(student, teacher, loss="mse", chunk=8), student.params, {"ids": ids}
    )
    value, want = reference(
        student, teacher, ids, *next_tokens(ids), lambda x, t, labels: F.mse_loss(x, t)
    )
    assert abs(float(means["loss"]) - value) < 1e-5 * value
    assert_close(gradient, want)


def test_tokens_of_weight_zero_do_not_count(student, teacher):
    ids = drawn_ids()
    weights = np.ones(ids.shape, np.float32)
    weights[0, 9:] = 0  # the first row is padded from its tenth token on
    counted = np.roll(weights, -1, 1)
    counted[:, -1] = 0
    means, gradient = run(
        distill(student, teacher, chunk=8), student.params, {"ids": ids, "weights": weights}
    )
    value, want = reference(
        student, teacher, ids, np.roll(ids, -1, 1), counted, torch_loss(2.0, 0.5, 0.5)
    )
    assert abs(float(means["loss"]) - value) < 1e-5 * value
    assert_close(gradient, want)


def test_without_a_teacher_s_weight_it_is_fine_tuning(student, teacher):
    batch = {"ids": drawn_ids()}
    distilled, slope = run(distill(student, teacher, alpha=0.0), student.params, batch)
    tuned, want = run(next_token(student), student.params, batch)
    np.testing.assert_allclose(distilled["hard"], tuned["loss"], rtol=1e-6)
    assert_close(slope, want)


@pytest.fixture(scope="module")
def usual(student, teacher):
    """Metrics and gradient of the two models as they are."""
    return run(distill(student, teacher, chunk=8), student.params, {"ids": drawn_ids()})


def test_each_model_may_have_blocks_or_not(student, teacher, usual):
    bare = student.replace(blocks=None), teacher.replace(blocks=None)
    for pair in ((bare[0], teacher), bare):
        found = run(distill(*pair, chunk=8), student.params, {"ids": drawn_ids()})
        assert_close(found, usual)


def test_a_llama_s_trunk_and_head_are_the_whole_model():
    """Unrolled student, scanned teacher; the truth runs `apply` as it is."""
    teacher = build_model(LLAMA, drawn_params(LLAMA))
    student = student_from(teacher, 1)
    ids = drawn_ids()
    found = distill(student, with_scan_layers(teacher, True), chunk=8)
    means, gradient = run(found, student.params, {"ids": ids})
    value, want = reference(student, teacher, ids, *next_tokens(ids), torch_loss(2.0, 0.5, 0.5))
    assert abs(float(means["loss"]) - value) < 1e-5 * value
    assert_close(gradient, want)


def test_the_teacher_s_parameters_are_constants_without_a_gradient(student, teacher):
    found = distill(student, teacher)
    assert found.constants is teacher.params

    def loss(constants):
        batch = {"ids": drawn_ids()}
        return found.function(student.params, batch, jax.random.key(0), constants)["loss"][0]

    for slope in jax.tree.leaves(jax.grad(loss)(teacher.params)):
        np.testing.assert_array_equal(slope, 0)
    assert float(loss(teacher.params)) != float(loss(jax.tree.map(jnp.zeros_like, teacher.params)))


def test_the_backward_pass_keeps_nothing_of_the_teacher_s_layers(student, teacher):
    """The residuals of a vjp do not grow with the depth of the teacher."""
    batch = {"ids": drawn_ids()}

    def residuals(teacher):
        found = distill(student, teacher, chunk=8)

        def loss(params):
            return found.function(params, batch, jax.random.key(0), found.constants)["loss"][0]

        _, back = jax.vjp(loss, student.params)
        return sum(x.size for x in jax.tree.leaves(back))

    assert residuals(student_from(teacher, 1)) == residuals(teacher)


def test_a_quantized_teacher_teaches(student, teacher, usual):
    quantized = jc.compress(teacher, "rtn", bits=4, group_size=16)
    assert jc.is_compressed(quantized.params["head"]["kernel"])
    plain = teacher.replace(params=jc.densify(quantized.params))
    batch = {"ids": drawn_ids()}
    found = run(distill(student, quantized, chunk=8), student.params, batch)
    assert_close(found, run(distill(student, plain, chunk=8), student.params, batch))
    assert abs(found[0]["soft"] - usual[0]["soft"]) > 1e-3 * usual[0]["soft"]


def test_a_masked_student_learns_where_its_masks_allow(student, teacher):
    masked = jc.compress(student, "magnitude", pattern="2:4", store="masked")
    batch = {"ids": drawn_ids()}
    trainable, frozen = jc.split(masked.params, "weights")
    found = distill(masked, teacher, chunk=8)

    def loss(trainable):
        params = jc.merge(trainable, frozen)
        return found.function(params, batch, jax.random.key(0), found.constants)["loss"][0]

    slope = jax.grad(loss)(trainable)["head"]["kernel"].weight
    kept = masked.params["head"]["kernel"].mask
    assert not np.any(np.asarray(slope)[~np.asarray(kept)])
    assert np.all(np.asarray(slope)[np.asarray(kept)] != 0)


# --- Nothing of [batch, seq, vocab] in float32 ------------------------------------------------


def avals(jaxpr):
    """Every value of a jaxpr and of those inside it."""
    for variable in (*jaxpr.invars, *jaxpr.constvars):
        yield variable.aval
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if hasattr(inner, "eqns"):
                yield from avals(inner)
            elif hasattr(inner, "jaxpr"):
                yield from avals(inner.jaxpr)


def largest_float32(found, params, batch) -> int:
    """Entries of the largest float32 value that holds logits, forward and backward."""

    def loss(params, batch, constants):
        return found.function(params, batch, jax.random.key(0), constants)["loss"][0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, batch, found.constants)
    return max(
        (a.size for a in avals(jaxpr.jaxpr) if a.dtype == jnp.float32 and VOCAB_LARGE in a.shape),
        default=0,
    )


VOCAB_LARGE, LONG = 1031, 64  # a prime, so that no other axis is taken for it


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "float32"), ("tied llama", "bfloat16"), ("gpt2", "bfloat16")]
)
def test_no_float32_logits_of_all_positions(kind, dtype):
    if kind == "gpt2":
        config = GPT2Config(
            model_type="gpt2",
            vocab_size=VOCAB_LARGE,
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=64,
        )
    else:
        config = dataclasses.replace(
            LLAMA,
            vocab_size=VOCAB_LARGE,
            num_hidden_layers=1,
            tie_word_embeddings=kind == "tied llama",
        )
    model = with_compute_dtype(build_model(config, drawn_params(config)), dtype)
    batch = {"ids": drawn_ids(LONG, VOCAB_LARGE)}
    small = largest_float32(distill(model, model, chunk=16), model.params, batch)
    assert small == max(VOCAB_LARGE * 32, BATCH * 16 * VOCAB_LARGE) < BATCH * LONG * VOCAB_LARGE
    # The same search finds them where they are: in one chunk of all positions.
    whole = largest_float32(distill(model, model, chunk=LONG), model.params, batch)
    assert whole == BATCH * LONG * VOCAB_LARGE


def test_without_blocks_the_logits_are_whole_in_their_own_type_only():
    def apply(params, ids):
        return params["embed"].astype(jnp.bfloat16)[ids] @ params["head"].astype(jnp.bfloat16)

    params = {"embed": jnp.zeros((VOCAB_LARGE, 32)), "head": jnp.zeros((32, VOCAB_LARGE))}
    model = Model(apply, params)
    batch = {"ids": drawn_ids(LONG, VOCAB_LARGE)}
    small = largest_float32(distill(model, model, chunk=16), params, batch)
    assert small == max(VOCAB_LARGE * 32, BATCH * 16 * VOCAB_LARGE) < BATCH * LONG * VOCAB_LARGE


# --- The head's gradient is summed in float32 -------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_head_s_gradient_is_summed_in_float32(stored, monkeypatch):
    """63 chunks of one position each, computed in bfloat16; the truth adds them in float64."""
    seq = 64
    student, teacher = (toy(1, seed, jnp.bfloat16) for seed in (3, 4))
    params = jax.tree.map(lambda x: x.astype(stored), student.params)
    # One token over and over: like gradients at every position, whose sum outgrows each of them.
    ids = np.full((BATCH, seq), 7, np.int32)
    step = compiled(distill(student, teacher, chunk=seq))
    total = np.zeros((WIDTH, VOCAB))
    for position in range(1, seq):
        weights = np.zeros((BATCH, seq), np.float32)
        weights[:, position] = 1
        slope = step(params, {"ids": ids, "weights": weights})[1]["head"]["kernel"]
        total += np.asarray(slope, np.float64) * BATCH

    def error() -> float:
        slope = run(distill(student, teacher, chunk=1), params, {"ids": ids})[1]["head"]["kernel"]
        found = np.asarray(slope, np.float64) * BATCH * (seq - 1)
        return np.linalg.norm(found - total) / np.linalg.norm(total)

    assert error() < 2**-8
    if stored == "bfloat16":
        monkeypatch.setattr(objective, "in_float32", lambda function, params: (function, params))
        assert error() > 2**-6


# --- Vocabularies, general functions, refusals ------------------------------------------------


def padded(model: Model, size: int) -> Model:
    """The model with its vocabulary padded by logits that would matter."""
    extra = ((0, 0), (0, size - VOCAB))
    kernel = jnp.pad(model.params["head"]["kernel"], extra, constant_values=5.0)
    return model.replace(params={**model.params, "head": {"kernel": kernel}})


def test_padding_of_either_vocabulary_is_cut(student, teacher, usual):
    batch = {"ids": drawn_ids()}
    found = run(distill(student, padded(teacher, 64), chunk=8), student.params, batch)
    assert_close(found, usual)
    wide = padded(student, 64)
    means, gradient = run(distill(wide, teacher, chunk=8), wide.params, batch)
    assert_close(means, usual[0])
    slope = gradient["head"]["kernel"]
    assert_close(slope[:, :VOCAB], usual[1]["head"]["kernel"])
    np.testing.assert_array_equal(slope[:, VOCAB:], 0)


def linear(seed: int, features: int = 5) -> Model:
    params = {"kernel": np.random.default_rng(seed).normal(size=(7, features)).astype(np.float32)}
    return Model(lambda params, x: jnp.tanh(x) @ params["kernel"], params)


def test_any_function_by_the_difference_of_its_outputs():
    x = np.random.default_rng(2).normal(size=(6, 4, 7)).astype(np.float32)
    student, teacher = linear(0), linear(1)
    for given in (x, (x,), x[:, 0]):
        inputs = given[0] if isinstance(given, tuple) else given
        means, gradient = run(
            distill(student, teacher, loss="mse"), student.params, {"inputs": given}
        )
        want = jax.value_and_grad(
            lambda p, x=inputs: jnp.square(student.apply(p, x) - teacher(x)).mean()
        )(student.params)
        assert_close((means["loss"], gradient), want)
        assert "hard" not in means
    labels = np.random.default_rng(3).integers(0, 5, (6, 4))
    means, _ = run(
        distill(student, teacher, loss="mse", beta=1.0),
        student.params,
        {"inputs": x, "labels": labels, "weights": (labels != 2).astype(np.float32)},
    )
    logits = torch.tensor(np.asarray(student(x)))
    want = F.cross_entropy(logits.reshape(-1, 5), torch.tensor(labels.reshape(-1)), ignore_index=2)
    np.testing.assert_allclose(means["hard"], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "lk"}, "'lk' is unknown; the nearest are kl, mse"),
        ({"temperature": 0.0}, "temperature 0 must be above 0"),
        ({"temperature": -1.0}, "temperature -1 must be above 0"),
        ({"temperature": float("nan")}, "temperature nan must be above 0"),
        ({"loss": "mse", "temperature": 2.0}, "'mse' has no temperature"),
        ({"alpha": 1.5}, "alpha 1.5 must be between 0 and 1"),
        ({"alpha": -0.1}, "alpha -0.1 must be between 0 and 1"),
        ({"beta": -1.0}, "beta -1 must be 0 or more"),
        ({"alpha": 0.0, "beta": 0.0}, "there is no loss"),
        ({"chunk": 0}, "chunk 0 must be 1"),
    ],
)
def test_options_out_of_range_are_refused_at_once(student, teacher, options, message):
    with pytest.raises(InputError, match=message) as refused:
        distill(student, teacher, **options)
    assert "\n" not in str(refused.value)


def test_batches_that_do_not_fit_are_refused():
    student, teacher, x = linear(0), linear(1), np.zeros((6, 7), np.float32)

    def refused(found, batch, message):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(found.function, student.params, batch, None, found.constants)

    refused(distill(student, teacher), {"inputs": x}, "the batch has none; add labels")
    refused(distill(student, teacher), {"tokens": x}, r"\['tokens'\] has no ids, images or inputs")
    refused(distill(student, linear(1, 6), loss="mse"), {"inputs": x}, "student has 5 outputs .* 6")
    refused(
        distill(student, teacher), {"inputs": x, "labels": np.zeros((6, 2), np.int32)}, "labels"
    )
    pooled = Model(lambda params, x: x.mean(1) @ params["kernel"], teacher.params)
    refused(
        distill(student, pooled, loss="mse"),
        {"inputs": np.zeros((6, 4, 7), np.float32)},
        "4 positions a row and the teacher's 1",
    )


def test_a_head_that_pools_positions_is_run_whole():
    """Blocks of a classifier: one row of logits for a whole sequence."""
    blocks = Blocks(
        embed=lambda params, x: x,
        block=lambda params, x: x + params["w"],
        head=lambda params, x: x.mean(1) @ params["kernel"],
    )
    params = {"layers": {"0": {"w": jnp.ones(7)}}, **linear(0).params}
    model = Model(blocks.run, params, blocks=blocks)
    x = np.random.default_rng(2).normal(size=(6, 4, 7)).astype(np.float32)
    labels = np.arange(6) % 5
    means, _ = run(distill(model, model), params, {"inputs": x, "labels": labels})
    want = F.cross_entropy(torch.tensor(np.asarray(model(x))), torch.tensor(labels))
    np.testing.assert_allclose(means["hard"], want, rtol=1e-5)
    np.testing.assert_allclose(means["soft"], 0, atol=1e-6)
