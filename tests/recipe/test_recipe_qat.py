"""Stages that train a model as it will be quantized, against the library by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipe_cases import CTX, assert_same, buffers, config, kept, killed, training

from jaxcompress import recipe
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.methods import compress
from jaxcompress.quantization.qat import convert, prepare_qat
from jaxcompress.recipe.quantized_training import later
from jaxcompress.recipe.store import Store
from jaxcompress.training.loop import _Run, fit
from jaxcompress.training.mesh import make_mesh, param_shardings
from jaxcompress.training.objective import next_token
from jaxcompress.training.optimizers import make_optimizer

RTN = {"method": "rtn", "bits": 3, "group_size": 16}
LATE = training(steps=4, quantize=RTN, quantize_after=2, checkpoint_every=1)


def loaded(root, name, toy):
    mesh = make_mesh()
    return Store(root).load(name, toy, lambda m: param_shardings(m, mesh))


@pytest.fixture(scope="module")
def ran(texts, toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("qat") / "out"
    return root, recipe.run(config(texts, training(quantize=RTN)), root, model=toy)


def test_a_stage_is_prepare_train_and_convert(texts, toy, ran, tmp_path):
    root, report = ran
    rows = text_dataset(texts["train"], toy.tokenizer, CTX)
    options = {k: v for k, v in RTN.items() if k != "method"}
    ready = prepare_qat(compress(toy, "rtn", **options), toy)
    made = convert(
        fit(
            ready, next_token(ready), Batches(rows, 8, seed=5),
            make_optimizer(steps=3, learning_rate=1e-2), steps=3, workdir=tmp_path, seed=5,
        )
    )  # fmt: skip
    assert_same(kept(root, "01-finetune"), buffers(made.params))
    kernels = [x for p, x in leaves_with_paths(made.params) if p.endswith("kernel")]
    assert all(isinstance(x, Affine) and x.bits == 3 for x in kernels)
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["00-start", "01-finetune"]
    assert len(report["stages"][1]["losses"]) == 1


def test_a_late_start_trains_the_model_as_it_is_before(texts, toy, tmp_path):
    given = training(schedule="linear", quantize=RTN, quantize_after=2)
    recipe.run(config(texts, given), tmp_path / "late", model=toy)
    rows = text_dataset(texts["train"], toy.tokenizer, CTX)
    batches = Batches(rows, 8, seed=5)
    optimizer = make_optimizer(steps=3, learning_rate=1e-2, schedule="linear")
    floats = fit(toy, next_token(toy), batches, optimizer, steps=2, workdir=tmp_path / "a", seed=5)
    options = {k: v for k, v in RTN.items() if k != "method"}
    ready = prepare_qat(compress(floats, "rtn", **options), floats)
    made = convert(
        fit(
            ready, next_token(ready), batches, later(optimizer, 2), steps=1,
            workdir=tmp_path / "b", seed=5,
        )
    )  # fmt: skip
    assert_same(kept(tmp_path / "late", "01-finetune"), buffers(made.params))


@pytest.fixture(scope="module")
def late(texts, toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("late") / "out"
    recipe.run(config(texts, LATE), root, model=toy)
    return root


@pytest.mark.parametrize("call", [2, 3])
def test_a_killed_stage_ends_with_the_same_bits(texts, toy, late, tmp_path, call):
    """Killed as the rounding is to begin, and behind its first step."""
    given = config(texts, LATE)
    root = tmp_path / "out"
    with killed(_Run, "save", call, after=True):
        recipe.run(given, root, model=toy)
    recipe.run(given, root, model=toy)
    assert_same(kept(root, "01-finetune"), kept(late, "01-finetune"))
    assert not (root / "stages" / "01-finetune" / "partial").exists()


def test_distillation_quantizes_and_pruned_weights_stay(texts, toy, tmp_path):
    stages = (
        {"method": "magnitude", "pattern": "2:4"},
        training("distill", quantize={"method": "rtn", "bits": 4, "group_size": 16}),
    )
    recipe.run(config(texts, *stages), tmp_path / "out", model=toy)
    pruned = loaded(tmp_path / "out", "01-magnitude", toy).params["layers"]["0"]["kernel"]
    found = loaded(tmp_path / "out", "02-distill", toy).params["layers"]["0"]["kernel"]
    assert isinstance(found, Affine)
    zeros = np.asarray(pruned) == 0
    assert zeros.mean() == 0.5
    np.testing.assert_array_equal(np.asarray(found.dense())[zeros], 0)


def test_schedules_go_on_where_they_are_told():
    rate = optax.linear_schedule(1.0, 0.0, 10)
    for whole in (optax.sgd(rate), optax.chain(optax.clip(9.0), optax.adamw(rate))):
        late = later(whole, 4)
        weight = jnp.ones(3)
        state, other = late.init(weight), whole.init(weight)
        ours = late.update(weight, state, weight)[0]
        theirs = whole.update(weight, other, weight)[0]
        np.testing.assert_allclose(ours, 0.6 * theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantize": {"method": "rtn", "bits": 9}}, r"bits 9"),
        ({"quantize": {"method": "rtn", "bit": 4}}, r"rtn\.bit: no such option"),
        ({"quantize": {"method": "magnitude"}}, r"quantize: magnitude does not quantize"),
        ({"quantize": {}}, r"quantize: give"),
        ({"quantize": RTN, "quantize_after": 3}, r"quantize_after 3"),
        ({"quantize_after": 1}, r"quantize_after: of a stage"),
        ({"quantize": RTN, "train": "factors"}, r"nothing to train"),
        ({"quantize": 4}, r"quantize 4: must be a dict"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(texts, toy, tmp_path, options, text):
    with pytest.raises(InputError, match=text):
        recipe.run(config(texts, training(**options)), tmp_path / "out", model=toy)
    assert not (tmp_path / "out").exists()
