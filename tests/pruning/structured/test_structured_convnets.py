"""Convolutional networks from a config: trained, their filters cut by labelled images, tuned."""

import io

import datasets
import jax
import numpy as np
import pyarrow.parquet
import pytest
import tiny

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.models import VGGConfig, build_model
from jaxcompress.models.vgg import largest_of_four
from jaxcompress.pruning.structured import filters

VGG = {"model_type": "vgg", "layers": [6, "M", 8, "M"], "num_classes": 4}
STEP = {"method": "finetune", "steps": 2, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`config.data` of 48 and 16 images of 8 x 8 pixels, whose mean tells their class."""
    from PIL import Image

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    files = {}
    for name, count in {"train": 48, "heldout": 16}.items():
        labels = rng.integers(0, 4, count)
        encoded = []
        for label in labels:
            pixels = rng.integers(0, 64, (8, 8, 3)) + 60 * label
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
            encoded.append(buffer.getvalue())
        files[name] = str(folder / f"{name}.parquet")
        rows = {"img": encoded, "label": labels.tolist()}
        pyarrow.parquet.write_table(pyarrow.table(rows), files[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield files


def recipe(data, *stages, **architecture):
    return {"model": {"architecture": VGG | architecture}, "data": data, "stages": stages}


def test_a_fresh_network_trains_by_its_batches_and_measures_its_statistics(data, tmp_path):
    training = STEP | {"steps": 60, "batch_norm": "batch"}
    report = jc.run(recipe(data, training, {"method": "export"}), tmp_path / "work")
    start, trained = (stage["quality"]["heldout"]["accuracy"] for stage in report["stages"][:2])
    assert trained > max(start, 0.8)
    model = jc.load(tmp_path / "work" / "export")
    statistics = model.params["batch_stats"]["bn1"]
    # The mean of the first convolution over the training images, by NumPy on a patch of each.
    from jaxcompress.data.images import normalize, read_images

    images = normalize(read_images(data["train"])[0]).astype(np.float64)
    kernel = np.asarray(model.params["params"]["conv1"]["kernel"], np.float64)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = sum(
        padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)
    ) + np.asarray(model.params["params"]["conv1"]["bias"], np.float64)
    np.testing.assert_allclose(statistics["mean"], out.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics["var"], out.var((0, 1, 2)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("score", ["taylor", "activation"])
def test_a_recipe_cuts_filters_by_labelled_images(score, data, tmp_path):
    cut = {"method": "filters", "sparsity": 0.5, "score": score, "calibration_samples": 16}
    report = jc.run(recipe(data, cut, STEP | {"batch_norm": "batch"}), tmp_path / "work")
    start, small, tuned = (stage["size"] for stage in report["stages"])
    assert small["parameters"] == tuned["parameters"] < start["parameters"] / 2
    assert any(f"kept 3 of 6, 4 of 8 by {score}" in note for note in report["stages"][1]["notes"])


def test_batch_statistics_of_a_language_model_are_refused(tmp_path):
    text = str(tiny.write_text(tmp_path / "text.txt"))
    config = {
        "model": {"path": str(tiny.write_llama(tmp_path / "llama"))},
        "data": {"train": text, "heldout": text, "ctx": 32, "tokens": 256},
        "stages": (STEP | {"batch_norm": "batch"},),
    }
    with pytest.raises(InputError, match="no batch norm"):
        jc.run(config, tmp_path / "work")


def test_max_pooling_is_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for height, width in [(8, 8), (7, 5)]:
        x = rng.standard_normal((2, height, width, 3)).astype(np.float32)
        theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
        pooled = torch.nn.functional.max_pool2d(theirs, 2)
        (pooled**2).sum().backward()
        ours, slope = jax.vjp(largest_of_four, x)
        np.testing.assert_array_equal(ours, pooled.detach().numpy().transpose(0, 2, 3, 1))
        gradient = theirs.grad.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(slope(2 * ours)[0], gradient, rtol=1e-6)


@pytest.mark.slow
def test_vgg16_from_its_config_a_cut_and_a_step(data, tmp_path):
    cut = {"method": "filters", "sparsity": 0.25, "multiple": 8}
    step = STEP | {"steps": 1, "batch_norm": "batch"}
    given = {"model_type": "vgg", "depth": 16, "num_classes": 4}
    # Five poolings: images of 32 x 32 pixels.
    large = {role: str(tmp_path / f"{role}.parquet") for role in data}
    enlarged(data, large)
    stages = (cut, step, {"method": "export"})
    config = {"model": {"architecture": given}, "data": large, "stages": stages}
    report = jc.run(config, tmp_path / "work")
    assert report["stages"][0]["size"]["parameters"] > 14.7e6
    small = jc.load(tmp_path / "work" / "export").config
    expected = [48, 48, "M", 96, 96, "M", *[192] * 3, "M", *[384] * 3, "M", *[384] * 3, "M"]
    assert list(small.layers) == expected


def enlarged(data, large):
    """The same images, each pixel 16 times."""
    from PIL import Image

    for role, path in data.items():
        table = pyarrow.parquet.read_table(path).slice(0, 8)
        encoded = []
        for row in table.column("img").to_pylist():
            buffer = io.BytesIO()
            Image.open(io.BytesIO(row)).resize((32, 32), Image.NEAREST).save(buffer, "png")
            encoded.append(buffer.getvalue())
        rows = {"img": encoded, "label": table.column("label").to_pylist()}
        pyarrow.parquet.write_table(pyarrow.table(rows), large[role])


def test_scores_that_need_labels_say_so():
    model = build_model(VGGConfig(layers=(6, "M", 8, "M"), num_classes=4), seed=0)
    images = np.zeros((4, 8, 8, 3), np.float32)
    with pytest.raises(InputError, match="labels"):
        filters(model, calibration=images, score="taylor")
    with pytest.raises(InputError, match="score activation: needs calibration data"):
        filters(model, score="activation")
