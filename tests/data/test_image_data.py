"""Labelled images as batches: decoding, normalization, augmentation."""

import hashlib
import io

import datasets
import numpy as np
import pytest

from jaxcompress.core.errors import InputError
from jaxcompress.data.batches import Batches, Places
from jaxcompress.data.digests import digest, summary
from jaxcompress.data.images import Prepare, image_dataset, normalize, random_bits, read_images

ALONE = {"process_index": 0, "process_count": 1}
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), np.uint8)


def png(pixels):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    datasets.disable_progress_bars()
    made = tmp_path_factory.mktemp("images")
    encoded = [png(pixels) for pixels in PIXELS]
    labels = list(range(10))
    bare = datasets.Dataset.from_dict({"img": encoded, "label": labels})
    bare.to_parquet(made / "bare.parquet")
    nested = {"image": [{"bytes": b, "path": None} for b in encoded], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (made / "hub").mkdir()
    hub = datasets.Dataset.from_dict(nested, features=features)
    hub.to_parquet(made / "hub" / "test-00000-of-00001.parquet")
    for number, one in enumerate(encoded):
        label = made / "files" / f"class{number % 2}"
        label.mkdir(parents=True, exist_ok=True)
        (label / f"{number}.png").write_bytes(one)
    return made


@pytest.mark.parametrize(("source", "split"), [("bare.parquet", "train"), ("hub", "test")])
def test_rows_are_the_decoded_images(folder, tmp_path, source, split):
    found = image_dataset(folder / source, split=split, cache_dir=tmp_path)
    rows = found[[7, 2, 2]]
    assert rows["images"].dtype == np.uint8
    assert rows["labels"].dtype == np.int32
    np.testing.assert_array_equal(rows["images"], PIXELS[[7, 2, 2]])
    assert rows["labels"].tolist() == [7, 2, 2]
    assert len(image_dataset(folder / source, split=split, limit=4, cache_dir=tmp_path)) == 4
    expected = hashlib.sha256()
    for number, pixels in enumerate(PIXELS):
        expected.update(png(pixels) + number.to_bytes(8, "little"))
    assert summary(found, "pictures", "train") == {
        "name": "pictures",
        "role": "train",
        "sha256": expected.hexdigest(),
        "images": 10,
    }


def test_a_directory_of_files_with_a_folder_per_class(folder, tmp_path):
    found = image_dataset(folder / "files", cache_dir=tmp_path)
    rows = found[:]
    assert rows["labels"].tolist() == [0] * 5 + [1] * 5
    np.testing.assert_array_equal(rows["images"], PIXELS[[0, 2, 4, 6, 8, 1, 3, 5, 7, 9]])
    assert len(digest(found)) == 64


def test_batches_are_normalized_and_hold_each_image_once(folder, tmp_path):
    found = image_dataset(folder / "bare.parquet", cache_dir=tmp_path)
    batches = Batches(found, 5, transform=Prepare(), **ALONE)
    first, second = next(batches), next(batches)
    labels = np.concatenate([first["labels"], second["labels"]])
    assert sorted(labels) == list(range(10))
    images = np.concatenate([first["images"], second["images"]])
    assert images.dtype == np.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(images, (PIXELS[labels] / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize(("fill", "mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror(fill, mode):
    rows = 600
    image = np.random.default_rng(1).integers(0, 256, (9, 8, 3), np.uint8)
    places = Places(3, np.zeros(rows, int), np.arange(rows))
    prepare = Prepare(augment=True, padding=2, fill=fill)
    found = prepare({"images": np.stack([image] * rows), "labels": np.arange(rows)}, places)
    assert found["labels"].tolist() == list(range(rows))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
    crops = {}
    for top in range(5):
        for left in range(5):
            crop = padded[top : top + 9, left : left + 8]
            crops[normalize(crop).tobytes()] = (top, left, 0)
            crops[normalize(crop[:, ::-1]).tobytes()] = (top, left, 1)
    assert len(crops) == 50
    count = dict.fromkeys(crops.values(), 0)
    for crop in found["images"]:
        count[crops[crop.tobytes()]] += 1
    # 12 of each are expected, standard deviation 3.4.
    assert min(count.values()) >= 1
    assert max(count.values()) <= 30


def test_augmentation_is_of_seed_epoch_and_index_alone():
    prepare = Prepare(augment=True)
    images = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)

    def of(rows, seed=0, epoch=0):
        places = Places(seed, np.full(len(rows), epoch), np.asarray(rows))
        return prepare({"images": images[rows]}, places)["images"]

    whole = of(range(8))
    np.testing.assert_array_equal(of([5, 2]), whole[[5, 2]])
    assert (of(range(8), seed=1) != whole).any()
    assert (of(range(8), epoch=1) != whole).any()


def test_random_bits_are_splitmix64():
    def splitmix(state):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published generator's first number
    expected = splitmix(splitmix(splitmix(splitmix(11) + 4) + 9) + 1)
    assert random_bits(Places(11, np.array([4]), np.array([9])), 1).tolist() == [expected]


def test_resumption_with_augmentation(folder, tmp_path):
    found = image_dataset(folder / "bare.parquet", cache_dir=tmp_path)
    prepare = Prepare(augment=True, padding=2)
    unbroken = Batches(found, 4, seed=2, transform=prepare, **ALONE)
    for _ in range(4):
        next(unbroken)
    state = unbroken.state()
    expected = [next(unbroken) for _ in range(4)]
    parts = []
    for index in range(2):
        part = Batches(found, 4, seed=2, transform=prepare, process_index=index, process_count=2)
        part.restore(state)
        parts.append([next(part) for _ in range(4)])
    for whole, *halves in zip(expected, *parts):
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))


def test_refusals(folder, tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    texts.to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(InputError, match="needs columns img and label, has text, label"):
        image_dataset(tmp_path / "texts.parquet", cache_dir=tmp_path)
    with pytest.raises(InputError, match="limit 0"):
        image_dataset(folder / "bare.parquet", limit=0, cache_dir=tmp_path)
    sizes = datasets.Dataset.from_dict(
        {"img": [png(PIXELS[0]), png(PIXELS[0][:2])], "label": [0, 1]}
    )
    sizes.to_parquet(tmp_path / "sizes.parquet")
    with pytest.raises(InputError, match="images of 2 sizes"):
        image_dataset(tmp_path / "sizes.parquet", cache_dir=tmp_path)[:]


def test_real_images_are_those_that_are_evaluated(assets, tmp_path):
    path = assets / "cifar10" / "test.parquet"
    images, labels = read_images(path, 100)
    found = image_dataset(path, limit=100, cache_dir=tmp_path)[:]
    np.testing.assert_array_equal(found["images"], images)
    np.testing.assert_array_equal(found["labels"], labels)
