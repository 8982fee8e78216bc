"""Every kind of stage gives what calling the library by hand gives, bit for bit."""

import csv
import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest
from recipe_cases import CTX, assert_same, buffers, config, kept, training

import jaxcompress as jc
from jaxcompress import recipe
from jaxcompress.core.model import Model
from jaxcompress.core.paths import path_str
from jaxcompress.data.batches import Batches
from jaxcompress.data.language import text_dataset
from jaxcompress.distillation import distill, student_from
from jaxcompress.recipe.checks import Scene, check_stage
from jaxcompress.recipe.config import read_config
from jaxcompress.recipe.runner import prepare
from jaxcompress.recipe.stages import read_stages
from jaxcompress.recipe.store import Store
from jaxcompress.training.loop import fit
from jaxcompress.training.mesh import make_mesh, param_shardings
from jaxcompress.training.objective import next_token
from jaxcompress.training.optimizers import make_optimizer

SEED = 5
STAGES = (
    {"method": "depth", "drop": 1, "calibration_samples": 4},
    training("distill", temperature=3.0, alpha=0.7, log_every=2),
    {"method": "magnitude", "pattern": "2:4"},
    training(weight_decay=0.1, accumulate=2, batch_size=16),
    {"method": "rtn", "bits": 4, "group_size": 16, "overrides": {"head/kernel": {"bits": 8}}},
    training(train="scales", optimizer="sgd", schedule="linear", warmup=1),
    {"method": "evaluate"},
    {"method": "export", "path": "small"},
)
NAMES = [f"{i + 1:02d}-{stage['method']}" for i, stage in enumerate(STAGES)]


@pytest.fixture(scope="module")
def rows(texts, toy):
    return text_dataset(texts["train"], toy.tokenizer, CTX)


@pytest.fixture(scope="module")
def ran(texts, toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "out"
    return root, recipe.run(config(texts, *STAGES), root, model=toy)


def before(stage: int, root: pathlib.Path, toy: Model) -> Model:
    """The model that a stage begins with."""
    if not stage:
        return toy
    mesh = make_mesh()
    return Store(root).load(NAMES[stage - 1], toy, lambda m: param_shardings(m, mesh))


def fitted(model, objective, rows, optimizer, tmp_path, *, batch, seed, **options):
    batches = Batches(rows, batch, seed=seed)
    return fit(
        model, objective, batches, optimizer, steps=3, workdir=tmp_path, seed=seed, **options
    )


def test_depth(ran, rows, toy):
    drawn = np.sort(np.random.default_rng(SEED).choice(len(rows), 4, replace=False))
    by_hand = jc.compress(toy, "depth", drop=1, calibration=rows[drawn]["ids"])
    assert_same(kept(ran[0], NAMES[0]), buffers(by_hand.params))
    assert ran[1]["stages"][1]["notes"] == list(by_hand.notes)


def test_distill(ran, rows, toy, tmp_path):
    model = before(1, ran[0], toy)
    objective = distill(model, toy, temperature=3.0, alpha=0.7)
    optimizer = make_optimizer(steps=3, learning_rate=1e-2)
    by_hand = fitted(model, objective, rows, optimizer, tmp_path, batch=8, seed=SEED + 1)
    assert_same(kept(ran[0], NAMES[1]), buffers(by_hand.params))
    assert [row["step"] for row in ran[1]["stages"][2]["losses"]] == [2, 3]


def test_magnitude(ran, toy):
    by_hand = jc.compress(before(2, ran[0], toy), "magnitude", pattern="2:4")
    assert_same(kept(ran[0], NAMES[2]), buffers(by_hand.params))


def test_finetune_holds_the_zeros_of_dense_arrays_as_masks_would(ran, rows, toy, tmp_path):
    model = before(3, ran[0], toy)
    masked = jc.compress(before(2, ran[0], toy), "magnitude", pattern="2:4", store="masked")
    optimizer = make_optimizer(steps=3, learning_rate=1e-2, weight_decay=0.1)
    by_hand = fitted(
        masked, next_token(model), rows, optimizer, tmp_path, batch=16, seed=SEED + 3, accumulate=2
    )
    found = kept(ran[0], NAMES[3])
    assert_same(found, buffers(jc.densify(by_hand.params)))
    for path, start in buffers(model.params).items():
        np.testing.assert_array_equal(found[path] == 0, start == 0, path)
        assert (found[path] != start).sum() > 0.9 * (start != 0).sum(), path


def test_rtn(ran, toy):
    options = {"bits": 4, "group_size": 16, "overrides": {"head/kernel": {"bits": 8}}}
    by_hand = jc.compress(before(4, ran[0], toy), "rtn", **options)
    assert_same(kept(ran[0], NAMES[4]), buffers(by_hand.params))


def test_finetune_of_scales(ran, rows, toy, tmp_path):
    model = before(5, ran[0], toy)
    optimizer = make_optimizer(
        "sgd", steps=3, learning_rate=1e-2, schedule="linear", warmup=1, clip=1.0
    )
    by_hand = fitted(
        model, next_token(model), rows, optimizer, tmp_path, batch=8, seed=SEED + 5, train="scales"
    )
    found, start = kept(ran[0], NAMES[5]), buffers(model.params)
    assert_same(found, buffers(by_hand.params))
    changed = {path for path in found if not np.array_equal(found[path], start[path])}
    assert changed == {path for path in found if path.endswith("scale")}


def test_export_and_evaluate_leave_the_model_alone(ran):
    root, report = ran
    assert_same(kept(root, NAMES[5]), buffers(jc.load_params(root / "small")))
    assert not (root / "stages" / NAMES[6] / "params").exists()
    scales, evaluated, exported = report["stages"][-3:]
    assert scales["quality"] == evaluated["quality"] == exported["quality"]
    size = sum(file.stat().st_size for file in (root / "small").iterdir())
    assert exported["size"]["bytes_disk"] == size
    files = sum(file.stat().st_size for file in (root / "small").glob("*.safetensors"))
    assert 0.9 < scales["size"]["bytes_disk"] / files < 1.1


def test_the_shapes_of_every_model_were_known_before(ran, texts, toy):
    prepared = prepare(recipe.read_config(config(texts, *STAGES)), toy)
    scene = Scene(prepared.recipe, prepared.mesh, toy, prepared.inputs)
    model = toy
    for name, stage in zip(NAMES, prepared.stages, strict=True):
        model = check_stage(stage, model, scene)
        if stage.makes_model:
            wanted = {p: (x.shape, x.dtype.name) for p, x in kept(ran[0], name).items()}
            flat = jax.tree_util.tree_flatten_with_path(model.params)[0]
            assert {path_str(p): (x.shape, x.dtype.name) for p, x in flat} == wanted


@pytest.mark.parametrize("stage", [0, 2, 5])
def test_quality_and_size_are_those_of_evaluate(stage, ran, rows, texts, toy):
    model = before(stage, ran[0], toy)
    record = ran[1]["stages"][stage]
    heldout = text_dataset(texts["heldout"], toy.tokenizer, CTX)
    for role, found in {"train": rows, "heldout": heldout}.items():
        one = jax.device_put(model.params, jax.devices()[0])
        ids = found[:32]["ids"].reshape(-1)  # config.data.tokens / ctx windows
        told = jc.evaluate(model.replace(params=one), text=ids, ctx=CTX, against=toy)
        for name in ("perplexity", "kl", "agreement", "tokens"):
            assert record["quality"][role][name] == pytest.approx(told[name], 1e-5, abs=1e-6)
        assert len(record["quality"][role]["slices"]) == 3
    assert record["size"]["bytes_memory"] == told["bytes"]
    assert record["size"]["bits_per_weight"] == told["bits_per_weight"]


def test_the_report(ran, rows, toy, texts):
    root, report = ran
    assert json.loads((root / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [stage["name"] for stage in report["stages"]] == ["00-start", *NAMES]
    assert [stage["model"] for stage in report["stages"]] == [False] + [True] * 6 + [False] * 2
    assert report["data"][0] == {
        "name": texts["train"],
        "role": "train",
        "sha256": hashlib.sha256(rows[:]["ids"].astype("<i4").tobytes()).hexdigest(),
        "tokens": len(rows) * CTX,
    }
    assert report["model"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(toy.params))
    assert report["hardware"]["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert report["stages"][4]["options"]["weight_decay"] == 0.1
    quality = [stage["quality"]["heldout"]["perplexity"] for stage in report["stages"]]
    assert quality[1] != quality[2] != quality[3]


def test_a_row_for_each_parameter_that_a_stage_changed(ran):
    with (ran[0] / "layers.csv").open() as file:
        found = list(csv.DictReader(file))
    of = {name: [row for row in found if row["stage"] == name] for name in NAMES}
    kernels = {"layers/0/kernel", "layers/1/kernel", "head/kernel"}
    assert any("removed" in row["what"] for row in of["01-depth"])
    assert {row["path"] for row in of["02-distill"]} == kernels | {"embed"}
    assert {row["path"]: float(row["sparsity"]) for row in of["03-magnitude"]} == dict.fromkeys(
        kernels, 0.5
    )
    assert {row["what"].split(",")[0] for row in of["03-magnitude"]} == {"magnitude 2:4"}
    assert {row["path"] for row in of["05-rtn"]} == kernels
    assert all(float(row["seconds"]) > 0 for row in of["05-rtn"])
    assert all(float(row["sqnr_db"]) > 10 for row in of["05-rtn"])
    assert not of["07-evaluate"]


def test_sparse_arrays_train_their_values_alone(texts, toy, tmp_path):
    stages = ({"method": "magnitude", "pattern": "2:4", "store": "sparse"}, training(steps=1))
    recipe.run(config(texts, *stages), tmp_path / "out", model=toy)
    start, found = (kept(tmp_path / "out", name) for name in ("01-magnitude", "02-finetune"))
    for path in start:
        same = np.array_equal(start[path], found[path])
        assert same == path.endswith("positions"), path


def test_what_stays_dense_counts_as_dense(texts, toy, tmp_path):
    """Pruned arrays train with `train="dense"`, and not where a pattern leaves them out."""
    stages = (
        {"method": "magnitude", "sparsity": 0.5, "exclude": "head/kernel"},
        {"method": "rtn", "group_size": 16, "include": "layers/0/kernel"},
        training(steps=1, train="dense", exclude="layers/2/kernel"),
        training(steps=1, train="dense", include="layers/1/kernel", keep_zeros=False),
    )
    root = tmp_path / "out"
    recipe.run(config(texts, *stages), root, model=toy)
    start, held, free = (kept(root, name) for name in ("02-rtn", "03-finetune", "04-finetune"))
    changed = {path for path in start if not np.array_equal(start[path], held[path])}
    assert changed == {"embed", "layers/1/kernel", "head/kernel"}
    zeros = [(found["layers/1/kernel"] == 0).sum() for found in (start, held, free)]
    assert zeros[0] == zeros[1] > zeros[2]


def test_a_student_of_some_layers(texts, toy, tmp_path):
    recipe.run(
        config(texts, training("distill", layers=(0, 2), steps=1, learning_rate=1e-30)),
        tmp_path / "out",
        model=toy,
    )
    student = buffers(student_from(toy, (0, 2)).params)
    for path, value in kept(tmp_path / "out", "01-distill").items():
        np.testing.assert_allclose(value, student[path], atol=1e-20)


def test_recovery_is_counted_from_the_last_training(texts, toy, tmp_path):
    stages = (
        training(steps=20, learning_rate=3e-2),
        {"method": "magnitude", "sparsity": 0.6},
        {"method": "magnitude", "sparsity": 0.8},
        {"method": "evaluate"},
        training(steps=10, wins_back=0.2),
    )
    given = config(texts, *stages)
    given["data"]["speed"] = True
    report = recipe.run(given, tmp_path / "out", model=toy)
    assert all(stage["size"]["per_second"] > 0 for stage in report["stages"])
    loss = [np.log(stage["quality"]["heldout"]["perplexity"]) for stage in report["stages"]]
    share = (loss[3] - loss[5]) / (loss[3] - loss[1])
    assert 0.2 < share < 1
    (check,) = report["checks"]
    assert check["passed"]
    assert f"{share:.0%} won back" in check["text"]
    assert f"loss {loss[1]:.4f} before the cut, {loss[3]:.4f} after it" in check["text"]


def test_without_training_data_nothing_is_measured_on_them(texts, toy, tmp_path):
    given = config(texts, {"method": "rtn", "group_size": 16})
    given["data"]["train"] = None
    report = recipe.run(given, tmp_path / "out", model=toy)
    assert [set(stage["quality"]) for stage in report["stages"]] == [{"heldout"}] * 2


def test_methods_joined_by_plus_are_a_stage(texts, toy, rows, tmp_path):
    options = {"bits": 3, "group_size": 8, "act_order": False, "activations": "int8"}
    stage = {"method": "clip+gptq+activations", **options, "calibration_samples": 8}
    recipe.run(config(texts, stage), tmp_path / "out", model=toy)
    found = kept(tmp_path / "out", "01-clip+gptq+activations")
    data = prepare(read_config(config(texts, stage)), toy).inputs.calibration(8)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    by_hand = jc.compress(
        toy, "clip+gptq+activations", calibration=data, seed=SEED, mesh=mesh, **options
    )
    wanted = buffers(by_hand.params)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


def test_auto_is_the_best_method_for_the_options(texts):
    given = [
        {"method": "auto", "bits": 4},
        {"method": "auto", "pattern": "2:4"},
        {"method": "auto", "bits": 4, "scale_bits": 8},
    ]
    stages = read_stages(read_config(config(texts, *given)))
    assert [stage.method for stage in stages] == ["coordinate+tune", "kronecker", "gptq"]
