"""Heat maps: their pixels are the numbers, read back from the PNG in the SVG."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_report import Page, record

from jaxcompress.core.decisions import Decision
from jaxcompress.core.errors import InputError
from jaxcompress.evaluation.heat_maps import (
    FAINTEST,
    GOES,
    STAYS,
    group_map,
    maps_of,
    matrix_map,
    sparsity_map,
)
from jaxcompress.evaluation.report import render, write_report


def images(svg):
    """RGBA `[rows, columns, 4]` in [0, 1] of every image of a figure."""
    found = re.findall(r'href="data:image/png;base64,\s*([^"]+)"', svg)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) / 255 for one in found]


def decision(rows=5, columns=7, seed=0, what="weights"):
    rng = np.random.default_rng(seed)
    scores = rng.random((rows, columns))
    kept = scores > np.median(scores)
    return Decision.of(what, f"layers/{seed}/up/kernel", "wanda", scores, kept)


def strength(values):
    return FAINTEST + (1 - FAINTEST) * values


def test_a_matrix_shows_its_scores_and_what_stayed():
    told = decision()
    scores, kept = images(matrix_map("m", told))
    np.testing.assert_allclose(scores[..., 3], strength(told.scores), atol=0.01)
    np.testing.assert_allclose(kept[..., 3], strength(told.kept), atol=0.01)
    np.testing.assert_allclose(
        kept[..., :3], np.broadcast_to(STAYS, kept[..., :3].shape), atol=0.01
    )


def test_groups_of_several_sizes_are_rows_in_the_colours_of_what_stays_and_goes():
    told = [decision(1, 6, 0, "neurons"), decision(1, 4, 1, "neurons")]
    (image,) = images(group_map("g", told))
    assert image.shape == (2, 6, 4)
    assert (image[1, 4:, 3] == 0).all()  # nothing stands there
    for row, one in enumerate(told):
        for place, kept in enumerate(one.kept[0]):
            np.testing.assert_allclose(image[row, place, :3], STAYS if kept else GOES, atol=0.01)
        assert image[row, one.scores[0].argmax(), 3] == 1


def test_zeros_by_layer_and_kind():
    shares = {"layers/10/up/kernel": 0.75, "layers/2/up/kernel": 0.25, "layers/2/down/kernel": 0.5}
    svg = sparsity_map("z", shares)
    (image,) = images(svg)
    expected = [[0.25, 0.5], [0.75, 0]]  # layer 2 before layer 10
    np.testing.assert_allclose(image[..., 3], strength(np.array(expected)[:, [0, 1]]), atol=0.01)
    assert {"75", "25", "50", "2", "10", "up", "down"} <= set(Page(svg).texts)
    assert sparsity_map("z", {"kernel": 0.5}) == ""


def test_every_kind_has_its_map():
    found = maps_of("x", [decision(), decision(1, 4, 1, "heads"), decision(1, 4, 2, "heads")])
    assert list(found) == ["layers/0/up/kernel", "heads"]


def with_decisions():
    run = record()
    run["stages"][1]["decisions"] = [
        decision().record(),
        decision(1, 8, 1, "heads").record(),
        decision(80, 70, 2).record(),
    ]
    return run


def test_the_report_shows_them_and_still_stands_alone(tmp_path):
    write_report(with_decisions(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "What went, and by which score" in page.text
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    sources = [a["href"] for name, a in page.elements if name == "image"]
    assert len(sources) == 1 + 2 + 2 + 1  # zeros by layer, two matrices, heads
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http:" not in text
    assert "https:" not in text
    assert len(page.ids) == len(set(page.ids))
    assert render(tmp_path / "report.json") == text


def test_a_record_without_decisions_shows_none(tmp_path):
    write_report(record(), tmp_path)
    assert "by which score" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": "no base64"}, r"decisions\[0\] holds no maps"),
        ({"shape": [3, 3]}, r"decisions\[0\] holds no maps"),
        ({"shape": ["a", 3]}, r"decisions\[0\] holds no maps"),
        ({"low": "x"}, r"decisions\[0\]\.low must be a number"),
    ],
)
def test_a_damaged_map_is_an_error(tmp_path, change, words):
    run = with_decisions()
    run["stages"][1]["decisions"][0] |= change
    (tmp_path / "report.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=words):
        render(tmp_path / "report.json")
