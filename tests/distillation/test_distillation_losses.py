"""Losses and their gradients against PyTorch, in float64 and float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxcompress.distillation.losses import LOSSES
from jaxcompress.distillation.losses.cosine import cosine
from jaxcompress.distillation.losses.cross_entropy import cross_entropy
from jaxcompress.distillation.losses.kl import kl
from jaxcompress.distillation.losses.mse import mse

ROWS, CLASSES = (3, 5), 37
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}


def drawn(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    student, teacher = (4 * rng.normal(size=(*ROWS, CLASSES)).astype(dtype) for _ in range(2))
    return student, teacher, rng.integers(0, CLASSES, ROWS)


def torch_value_and_gradient(loss, student: np.ndarray) -> tuple[float, np.ndarray]:
    x = torch.tensor(student.reshape(-1, CLASSES), requires_grad=True)
    value = loss(x)
    value.backward()
    return value.item(), x.grad.numpy().reshape(student.shape)


def assert_same(ours, theirs, dtype: str) -> None:
    for got, want in zip(ours, theirs, strict=True):
        assert np.asarray(got).dtype == dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.5])
def test_kl_is_that_of_torch(dtype, temperature):
    student, teacher, _ = drawn(dtype)

    def theirs(x):
        logq = F.log_softmax(x / temperature, -1)
        logp = F.log_softmax(torch.tensor(teacher.reshape(-1, CLASSES)) / temperature, -1)
        return F.kl_div(logq, logp, reduction="batchmean", log_target=True) * temperature**2

    with jax.enable_x64(dtype == "float64"):
        ours = jax.value_and_grad(lambda x: kl(x, teacher, temperature=temperature).mean())
        assert_same(ours(jnp.asarray(student)), torch_value_and_gradient(theirs, student), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mse_is_that_of_torch(dtype):
    student, teacher, _ = drawn(dtype)
    wanted = torch.tensor(teacher.reshape(-1, CLASSES))
    with jax.enable_x64(dtype == "float64"):
        ours = jax.value_and_grad(lambda x: mse(x, teacher).mean())(jnp.asarray(student))
        theirs = torch_value_and_gradient(lambda x: F.mse_loss(x, wanted), student)
        assert_same(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cosine_is_that_of_torch(dtype):
    student, teacher, _ = drawn(dtype)
    wanted = torch.tensor(teacher.reshape(-1, CLASSES))
    with jax.enable_x64(dtype == "float64"):
        ours = jax.value_and_grad(lambda x: cosine(x, teacher).mean())(jnp.asarray(student))
        theirs = torch_value_and_gradient(
            lambda x: F.cosine_embedding_loss(x, wanted, torch.ones(len(x))), student
        )
        assert_same(ours, theirs, dtype)


def test_cosine_of_nothing_has_a_finite_gradient():
    _, teacher, _ = drawn("float32")
    slope = jax.grad(lambda x: cosine(x, teacher).sum())(jnp.zeros(teacher.shape))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cross_entropy_is_that_of_torch(dtype):
    student, _, labels = drawn(dtype)
    wanted = torch.tensor(labels.reshape(-1))
    with jax.enable_x64(dtype == "float64"):
        ours = jax.value_and_grad(lambda x: cross_entropy(x, labels).mean())(jnp.asarray(student))
        theirs = torch_value_and_gradient(lambda x: F.cross_entropy(x, wanted), student)
        assert_same(ours, theirs, dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_reduced_in_float32(name):
    student, teacher, _ = drawn("float32")
    loss = LOSSES[name].function
    low = loss(jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16))
    rounded = loss(*(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in (student, teacher)))
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, rounded)


def test_a_student_like_its_teacher_has_no_loss():
    _, teacher, _ = drawn("float32")
    for loss in LOSSES.values():
        np.testing.assert_array_equal(loss.function(teacher, jnp.asarray(teacher)), np.zeros(ROWS))
    # Softmax does not see a constant; the squared difference does.
    np.testing.assert_allclose(kl(jnp.asarray(teacher) + 3, teacher), np.zeros(ROWS), atol=1e-5)
    np.testing.assert_allclose(
        mse(jnp.asarray(teacher) + 3, teacher), np.full(ROWS, 9.0), rtol=1e-5
    )


def test_classes_that_both_exclude_do_not_count():
    student, teacher, _ = drawn("float32")
    wider = [
        np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=-np.inf) for x in (student, teacher)
    ]
    np.testing.assert_allclose(kl(*map(jnp.asarray, wider)), kl(student, teacher), rtol=1e-6)
    slope = jax.grad(lambda x: kl(x, wider[1]).sum())(jnp.asarray(wider[0]))
    want = jax.grad(lambda x: kl(x, teacher).sum())(jnp.asarray(student))
    np.testing.assert_allclose(slope[..., :CLASSES], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(slope[..., CLASSES:], 0)


def test_a_label_that_is_no_class_is_not_passed_over():
    assert np.isnan(cross_entropy(jnp.zeros((2, 4)), jnp.array([4, -1]))).all()
