"""Recipes over images: a CIFAR ResNet fine-tuned, pruned, and distilled into a smaller one."""

import io

import datasets
import jax
import numpy as np
import pyarrow.parquet
import pytest
from recipe_cases import assert_same, buffers, kept

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.data.images import normalize, read_images
from jaxcompress.models import ResNetConfig, build_model
from jaxcompress.training.batch_norm import recalibrate

TEACHER = {"model_type": "cifar_resnet", "stage_sizes": [1, 1], "widths": [4, 8], "num_classes": 4}
STUDENT = {**TEACHER, "stage_sizes": [1], "widths": [4]}
STEP = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, object]:
    """`config.data` of 40 and 20 images of 8 x 8 pixels."""
    from PIL import Image

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for name, count in {"train": 40, "heldout": 20}.items():
        encoded = []
        for pixels in rng.integers(0, 256, (count, 8, 8, 3), np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            encoded.append(buffer.getvalue())
        rows = {"img": encoded, "label": rng.integers(0, 4, count).tolist()}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")
    files = {name: str(folder / f"{name}.parquet") for name in ("train", "heldout")}
    return {**files, "images": 16}


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher") / "out"
    stages = (
        {"method": "finetune", **STEP},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "finetune", **STEP, "weight_decay": 0.1},
        {"method": "export"},
    )
    given = {"model": {"architecture": TEACHER}, "data": data, "stages": stages}
    return root, jc.run(given, root)


@pytest.mark.slow
def test_pruned_kernels_of_convolutions_stay_pruned(teacher):
    root, report = teacher
    start, found = (kept(root, name) for name in ("02-magnitude", "03-finetune"))
    pruned = [path for path, value in start.items() if (value == 0).mean() > 0.4 and value.ndim > 1]
    assert len(pruned) == 5
    for path in pruned:
        np.testing.assert_array_equal(start[path] == 0, found[path] == 0, path)
        assert not np.array_equal(start[path], found[path])
    statistics = [path for path in start if path.endswith(("mean", "var"))]
    assert statistics
    assert_same({p: start[p] for p in statistics}, {p: found[p] for p in statistics})
    assert report["stages"][3]["losses"][0]["accuracy"] >= 0


def test_what_is_measured_is_the_accuracy(teacher, data):
    root, report = teacher
    told = jc.evaluate(jc.load(root / "export"), images=data["heldout"], limit=16)
    for stage in report["stages"][3:]:
        assert stage["quality"]["heldout"]["accuracy"] == told["accuracy"]
        assert stage["quality"]["train"]["images"] == 16
    assert report["data"][0]["images"] == 40


def test_a_smaller_student_measures_its_statistics(teacher, data, tmp_path):
    stages = ({"method": "distill", "teacher": str(teacher[0] / "export"), "alpha": 0.9, **STEP},)
    given = {"model": {"architecture": STUDENT}, "data": data, "stages": stages}
    jc.run(given, tmp_path / "out")
    found = kept(tmp_path / "out", "01-distill")
    student = build_model(ResNetConfig.from_hf(STUDENT))
    tree = jax.tree.structure(student.params)
    student = student.replace(params=jax.tree.unflatten(tree, list(found.values())))
    images = normalize(read_images(data["train"])[0])
    by_hand = buffers(recalibrate(student, [{"images": images}]).params)
    for path, value in found.items():
        np.testing.assert_allclose(value, by_hand[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_a_student_with_other_classes_is_refused(teacher, data, tmp_path):
    stages = ({"method": "distill", "teacher": str(teacher[0] / "export"), **STEP},)
    given = {"model": {"architecture": {**STUDENT, "num_classes": 5}}, "data": data}
    with pytest.raises(InputError, match=r"stages\[0\]: the student has 5 outputs and the teacher"):
        jc.run({**given, "stages": stages}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_function_without_tokenizer_is_given_images(data, tmp_path):
    def apply(params, images):
        return images.reshape(len(images), -1) @ params["linear"]["kernel"]

    params = {"linear": {"kernel": np.full((192, 4), 0.01, np.float32)}}
    stages = ({"method": "finetune", **STEP}, {"method": "rtn", "group_size": 64})
    report = jc.run({"data": data, "stages": stages}, tmp_path / "out", model=Model(apply, params))
    assert report["stages"][2]["quality"]["heldout"]["images"] == 16
    assert [row["path"] for row in report["stages"][2]["layers"]] == ["linear/kernel"]


@pytest.mark.slow
def test_the_real_resnet20(assets, tmp_path):
    """What 64 images can tell: it is read, stays about as good, and a step of distilling runs."""
    for name, source in {"train": "train", "heldout": "test"}.items():
        table = pyarrow.parquet.read_table(assets / "cifar10" / f"{source}.parquet")
        pyarrow.parquet.write_table(table.slice(0, 64), tmp_path / f"{name}.parquet")
    data = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "heldout")}
    stages = (
        {"method": "magnitude", "sparsity": 0.3},
        {"method": "distill", "steps": 1, "batch_size": 16, "learning_rate": 1e-5},
    )
    path = str(assets / "cifar-resnet20" / "resnet20-12fca82f.th")
    given = {"model": {"path": path, "arch": "resnet20"}, "data": data, "stages": stages}
    report = jc.run(given, tmp_path / "out")
    told = jc.evaluate(jc.load(path, arch="resnet20"), images=data["heldout"])
    quality = [stage["quality"]["heldout"] for stage in report["stages"]]
    assert quality[0]["accuracy"] == told["accuracy"] > 0.8
    assert quality[1]["agreement"] > 0.85
    assert quality[2]["agreement"] > 0.7  # its statistics are now those of 64 images
    start, found = (kept(tmp_path / "out", name) for name in ("01-magnitude", "02-distill"))
    kernels = [path for path in start if path.endswith("kernel")]  # a channel can die, and its var
    assert len(kernels) == 20
    assert all((found[path] == 0).sum() == (start[path] == 0).sum() for path in kernels)
