"""A convolutional student: what it learns from its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.data.images import normalize, read_images
from jaxcompress.distillation import distill, resnet_student
from jaxcompress.evaluation.images import accuracy
from jaxcompress.models import ResNetConfig, build_model
from jaxcompress.training.batch_norm import recalibrate

SMALL = ResNetConfig(stage_sizes=(1, 1), widths=(8, 16), num_classes=5)


def drawn_images(count: int, seed: int) -> np.ndarray:
    """Coarse coloured patches: images that differ in more than noise."""
    patches = np.random.default_rng(seed).normal(size=(count, 4, 4, 3))
    return np.repeat(np.repeat(patches, 4, 1), 4, 2).astype(np.float32)


def trained(student, objective, images, *, steps: int, batch: int, rate: float, labels=None):
    """The student after some steps of Adam over a few images, its statistics measured."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, state, batch, constants):
        def loss(params):
            total, count = objective.function(params, batch, None, constants)["loss"]
            return total / count

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = student.params, optimizer.init(student.params)
    for i in range(steps):
        rows = (np.arange(batch) + i * batch) % len(images)
        given = {"images": images[rows]} | ({} if labels is None else {"labels": labels[rows]})
        params, state = step(params, state, given, objective.constants)
    batches = [{"images": images[at : at + batch]} for at in range(0, len(images), batch)]
    return recalibrate(student.replace(params=params), batches), params


def test_a_small_student_learns_from_its_teacher():
    model = build_model(SMALL, seed=1)
    images, unseen = drawn_images(256, 0), drawn_images(128, 1)
    batches = [{"images": images[at : at + 64]} for at in range(0, 256, 64)]
    teacher = recalibrate(model, batches)
    head = teacher.params["params"]["linear"]
    sharper = {"kernel": 8 * head["kernel"], "bias": head["bias"]}
    params = {**teacher.params, "params": {**teacher.params["params"], "linear": sharper}}
    teacher = teacher.replace(params=params)
    student = resnet_student(teacher, (1,), seed=2)

    objective = distill(student, teacher, alpha=1.0)
    found, raw = trained(student, objective, images, steps=40, batch=64, rate=2e-2)

    def fidelity(model):
        """KL from the teacher and agreement with it, on unseen images."""
        ours, theirs = (jax.jit(m.apply)(m.params, unseen) for m in (model, teacher))
        logp, logq = jax.nn.log_softmax(theirs), jax.nn.log_softmax(ours)
        kl = (jnp.exp(logp) * (logp - logq)).sum(-1).mean()
        return float(kl), float((ours.argmax(-1) == theirs.argmax(-1)).mean())

    kl, agreement = fidelity(found)
    untrained_kl, untrained_agreement = fidelity(recalibrate(student, batches))
    assert kl < 0.5 * untrained_kl
    assert agreement > max(untrained_agreement, 0.5)
    # The steps leave the running statistics alone; only measuring them sets them.
    jax.tree.map(np.testing.assert_array_equal, raw["batch_stats"], student.params["batch_stats"])


@pytest.mark.slow
def test_resnet8_learns_from_the_real_resnet20(assets):
    teacher = jc.load(assets / "cifar-resnet20" / "resnet20-12fca82f.th", arch="resnet20")
    pixels, labels = read_images(assets / "cifar10" / "train.parquet", 512)
    unseen = read_images(assets / "cifar10" / "test.parquet", 500)
    student = resnet_student(teacher, (1, 1, 1))
    objective = distill(student, teacher, temperature=4.0, alpha=0.9)
    found, _ = trained(
        student, objective, normalize(pixels), steps=64, batch=64, rate=1e-2, labels=labels
    )
    untrained = recalibrate(student, [{"images": normalize(pixels[:128])}])
    before, after = (accuracy(m, *unseen, against=teacher) for m in (untrained, found))
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert after["agreement"] > before["agreement"] + 0.1
