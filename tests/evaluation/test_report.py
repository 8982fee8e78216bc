"""The report of a run: its schema, its table, and a page that is safe and stands alone."""

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxcompress.core.errors import InputError
from jaxcompress.evaluation import report
from jaxcompress.evaluation.report import render, write_report
from jaxcompress.evaluation.report_numbers import amount, change, duration, number, percent

VOID = {"meta", "br", "img", "link", "input", "hr"}
KINDS = ("attn/q_proj", "mlp/down_proj")


class Page(HTMLParser):
    """Elements, text and attributes; fails where tags are not nested."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.handle_startendtag(name, attributes)
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    @property
    def exact(self):
        """The numbers behind the shown ones."""
        return [float(a["value"]) for name, a in self.elements if name == "data"]


def quality(perplexity, kl, seed):
    slices = perplexity * (1 + 0.1 * np.random.default_rng(seed).normal(size=5))
    return {
        "perplexity": perplexity,
        "slices": slices.tolist(),
        "spread": float(np.std(slices, ddof=1)),
        "kl": kl,
        "agreement": 1 - kl / 2,
        "tokens": 4096,
        "ctx": 512,
    }


def stage(index, method, perplexity, bits, nonzero, **more):
    weights = 4_098_304
    return {
        "index": index,
        "name": f"{index:02}-{method}",
        "method": method,
        "options": {"seed": index},
        "notes": [f"note {index}"],
        "seconds": 10.5 + index,
        "quality": {
            "heldout": quality(perplexity, index / 10, index),
            "train": quality(perplexity * 0.9, index / 11, index + 50),
        },
        "size": {
            "bytes_memory": int(weights * bits / 8),
            "bytes_disk": int(weights * bits / 8) + 1000 + index,
            "bits_per_weight": bits,
            "parameters": weights,
            "nonzero": int(weights * nonzero),
            "flops": 9_000_000 + index,
            "flops_nonzero": int(9_000_000 * nonzero) + index,
        },
        **more,
    }


def layers(decibel, sparsity, count=3):
    return [
        {
            "path": f"layers/{i}/{kind}/kernel",
            "shape": [256, 128],
            "what": "some, thing",
            "bits": 4.25,
            "sparsity": sparsity,
            "sqnr_db": decibel + i - 0.5 * (kind == "mlp/down_proj"),
            "seconds": None,
            "bytes": 17_408,
        }
        for i in range(count)
        for kind in KINDS
    ]


def record():
    losses = [{"step": i + 1, "loss": 3 / (i + 1)} for i in range(50)]
    return {
        "format": 1,
        "name": "demo",
        "command": "jaxcompress run --config configs/demo.py --workdir out",
        "config": {"seed": 0, "stages": [{"method": "magnitude"}]},
        "started": "2026-12-02T14:03:11+00:00",
        "seconds": 312.4,
        "seed": 0,
        "versions": {"jax": "0.10.2"},
        "hardware": {"platform": "cpu", "devices": 8},
        "model": {
            "name": "py4m",
            "source": "builtin",
            "sha256": "9f" * 32,
            "parameters": 4_098_304,
        },
        "data": [
            {"name": "library", "role": "heldout", "sha256": "ab" * 32, "tokens": 4096},
            {"name": "pictures", "role": "train", "sha256": "cd" * 32, "images": 77},
        ],
        "stages": [
            stage(0, "evaluate", 12.0, 16.0, 1.0),
            stage(1, "magnitude", 20.5, 16.0, 0.5, layers=layers(9, 0.5)),
            stage(2, "finetune", 14.25, 16.0, 0.5, layers=layers(19, 0.5), losses=losses),
            stage(3, "rtn", 15.75, 4.25, 0.48, layers=layers(17, 0.52)),
        ],
        "checks": [{"name": "agreement", "passed": True, "text": "to 4 digits"}],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new"
    write_report(record(), out)
    return out


def test_three_files_and_nothing_else(written):
    names = sorted(path.name for path in written.iterdir())
    assert names == ["layers.csv", "report.html", "report.json"]
    assert json.loads((written / "report.json").read_text()) == record()


def test_the_page_comes_anew_from_its_json(written):
    assert render(written / "report.json") == (written / "report.html").read_text()


def test_layers_csv_has_a_row_for_each_parameter_and_stage(written):
    rows = list(csv.DictReader((written / "layers.csv").open()))
    assert len(rows) == 3 * 6
    want = record()["stages"][1]["layers"][1]
    found = rows[1]
    assert found["stage"] == "01-magnitude"
    assert found["path"] == "layers/0/mlp/down_proj/kernel"
    assert (found["shape"], found["what"]) == ("256x128", "some, thing")
    for name in ("bits", "sparsity", "sqnr_db", "bytes"):
        assert float(found[name]) == want[name]
    assert found["seconds"] == ""


def test_the_page_stands_alone(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert len(text) < 1_000_000
    assert "http:" not in text
    assert "https:" not in text
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "action", "background", "onload"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "")
    assert "url(" not in re.search("<style>(.*?)</style>", text, re.S)[1]
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    links = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert links <= set(page.ids)


def test_numbers_are_those_of_the_json(written):
    page = Page((written / "report.html").read_text())
    exact = set(page.exact)
    first = record()["stages"][0]["quality"]["heldout"]["perplexity"]
    for one in record()["stages"]:
        heldout, train = one["quality"]["heldout"], one["quality"]["train"]
        assert {heldout["perplexity"], heldout["kl"], heldout["agreement"]} <= exact
        assert train["perplexity"] in exact
        size = {k: v for k, v in one["size"].items() if k != "parameters"}
        assert set(size.values()) <= exact
        assert one["seconds"] in exact
        if one["index"]:
            assert heldout["perplexity"] / first - 1 in exact
        assert page.texts.count(one["name"]) >= 2  # the headline and the table
        assert one["notes"][0] in page.texts


def test_the_headline(written):
    text = Page((written / "report.html").read_text()).text
    head = text[: text.index("Stages")]
    disk = [s["size"]["bytes_disk"] for s in record()["stages"]]
    assert f"{disk[0] / disk[-1]:.2f}× smaller" in head
    assert "+31.2 % perplexity" in head  # 15.75 / 12
    assert "12.00 → 15.75" in head
    assert "The check passed" in head
    assert "py4m" in head
    assert "4.10 M parameters" in head
    assert "2026-12-02 14:03 UTC" in head


def test_every_stage_is_in_the_plots(written):
    text = (written / "report.html").read_text()
    svgs = re.findall("<svg.*?</svg>", text, re.S)
    assert len(svgs) == 2 + 3 + 1  # size, gap, layers, losses
    assert all("font-size: 9px" in svg and "DejaVu" not in svg for svg in svgs)  # the page's font
    for svg in svgs[:2]:
        shown = Page(svg).texts
        assert {s["name"] for s in record()["stages"]} <= set(shown)
    dots = [re.findall(r'd="([^"]*)"', svg) for svg in svgs[2:5]]
    for paths in dots:  # a subpath for each parameter, for its error and for its zeros
        assert sum(path.count("M ") == len(layers(0, 0)) for path in paths) == 2


def test_a_long_training_is_thinned_and_many_layers_stay_small(tmp_path):
    run = record()
    run["stages"][2]["losses"] = [{"step": i, "loss": 1 / (i + 1)} for i in range(30_000)]
    for one in run["stages"][1:]:
        one["layers"] = layers(9, 0.5, count=400)
    write_report(run, tmp_path)
    assert len((tmp_path / "report.html").read_text()) < 1_000_000
    assert len(json.loads((tmp_path / "report.json").read_text())["stages"][2]["losses"]) == 30_000


# --------------------------------------------------------------------------------------- safety

EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(2)> $x_{$ \"'&amp; -->"


def poisoned(value):
    """`value` with every text, and every key of a free table, replaced."""
    if isinstance(value, str):
        return EVIL
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    return value


def test_text_from_outside_stays_text(tmp_path):
    run = poisoned(record())
    for name in ("config", "versions", "hardware"):
        run[name] = {EVIL: EVIL}
    run["stages"][0]["options"] = {EVIL: EVIL}
    run["data"][0][EVIL] = EVIL
    write_report(run, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img"}
    assert not any(key.startswith("on") for _, a in page.elements for key in a)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert render(tmp_path / "report.json") == (tmp_path / "report.html").read_text()
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert rows[0]["path"] == EVIL


def test_text_that_is_no_unicode_is_written(tmp_path):
    """As the system gives names of files whose bytes are no UTF-8."""
    run = record()
    run["command"] = run["model"]["source"] = run["data"][0]["name"] = "a\udcff"
    run["config"] = {"a\udcff": ["a\udcff"]}
    page = shown(run, tmp_path)
    assert page.texts.count("a?") == 3
    assert render(tmp_path / "report.json") == (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------------- runs of other kinds


def shown(run, tmp_path):
    write_report(run, tmp_path)
    return Page((tmp_path / "report.html").read_text())


def test_accuracy_in_place_of_perplexity(tmp_path):
    run = record()
    for i, one in enumerate(run["stages"]):
        for role, found in one["quality"].items():
            value = 0.9 - 0.0125 * i + 0.05 * (role == "train")
            found.pop("perplexity")
            found |= {"accuracy": value, "slices": [value] * 5, "spread": 0.0}
    page = shown(run, tmp_path)
    assert "−3.8 points accuracy" in page.text or "−3.7 points accuracy" in page.text
    assert "90.00 % → 86.25 %" in page.text
    assert "erplexity" not in page.text


def test_an_unfinished_run(tmp_path):
    run = record()
    run["planned"] = [s["name"] for s in run["stages"]]
    run["stages"] = run["stages"][:2]
    run["checks"] = []
    for name in ("quality", "size", "options", "seconds"):
        run["stages"][1].pop(name)
    page = shown(run, tmp_path)
    assert "Unfinished" in page.text
    assert "2 of 4 stages done" in page.text
    assert "01-magnitude" in page.text


def test_one_stage_is_compared_with_nothing(tmp_path):
    run = record()
    run["stages"] = run["stages"][:1]
    text = shown(run, tmp_path).text
    head = text[: text.index("Stages")]
    assert "8.20 MB on disk" in head
    assert "12.00 perplexity on held-out data" in head
    assert "×" not in head
    assert "→" not in head


def test_as_large_as_before(tmp_path):
    run = record()
    run["stages"] = run["stages"][:3]
    for one in run["stages"]:
        one["size"].pop("bytes_disk")
    assert "As large 8.20 MB → 8.20 MB in memory" in shown(run, tmp_path).text


def test_bytes_on_disk_and_in_memory_are_not_mixed(tmp_path):
    """Only an export is on disk: its size is no point beside those of the others in memory."""
    run = record()
    for one in run["stages"][1:3]:
        one["size"].pop("bytes_disk")
    page = shown(run, tmp_path)
    assert "8.20 MB → 2.18 MB in memory" in page.text
    assert "in memory, MB" in page.texts


def test_speed_is_told_where_it_was_measured(tmp_path):
    timed = record()
    for i, stage_of in enumerate(timed["stages"]):
        stage_of["size"]["per_second"] = 123.0 + i
    write_report(timed, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Tokens / s" in page
    assert ">126<" in page
    write_report(record(), tmp_path)
    assert "Tokens / s" not in (tmp_path / "report.html").read_text()


def test_nothing_is_done_yet(tmp_path):
    run = {**record(), "stages": [], "checks": [], "data": []}
    assert "not measured yet" in shown(run, tmp_path).text


def test_a_failed_check_is_what_one_sees(tmp_path):
    run = record()
    run["checks"].append({"name": "recovery", "passed": False, "text": "won back 12 %"})
    page = shown(run, tmp_path)
    assert "1 of 2 checks failed" in page.text[: page.text.index("Stages")]
    assert "won back 12 %" in page.text


def test_a_quality_that_is_not_finite(tmp_path):
    run = record()
    run["stages"][1]["quality"]["heldout"] |= {"perplexity": float("inf"), "spread": float("nan")}
    run["stages"][2]["losses"][3]["loss"] = float("nan")
    page = shown(run, tmp_path)
    assert "not finite" in page.text
    assert "12.00 → 15.75" in page.text
    text = (tmp_path / "report.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text


def test_a_last_stage_that_broke_the_model_is_what_one_sees(tmp_path):
    run = record()
    run["stages"][3]["quality"]["heldout"]["perplexity"] = float("inf")
    text = shown(run, tmp_path).text
    head = text[: text.index("Stages")]
    assert "Not finite perplexity on held-out data" in head
    assert "14.25" not in head


def test_a_perplexity_that_no_axis_holds(tmp_path):
    run = record()
    run["stages"][1]["quality"]["heldout"]["perplexity"] = 1e300
    page = shown(run, tmp_path)
    assert "1.000e300" in page.texts
    svgs = re.findall("<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.S)
    for svg in svgs[:2]:
        assert "02-finetune" in svg
        assert "01-magnitude" not in svg


def test_numbers_of_numpy_and_jax(tmp_path):
    import jax.numpy as jnp

    run = record()
    run["stages"][0]["quality"]["heldout"] |= {
        "perplexity": np.float32(12.5),
        "slices": np.arange(1.0, 6.0),
        "kl": jnp.float32(0.25),
        "tokens": np.int64(7),
    }
    write_report(run, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["stages"][0]["quality"]["heldout"]
    assert (found["perplexity"], found["kl"], found["tokens"]) == (12.5, 0.25, 7)
    assert found["slices"] == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------ the schema


FREE = ("config", "versions", "hardware", "options", "planned")


def fields(value, where=""):
    """(path of the table, name) of every field of a record whose type is fixed."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield where, key
            if key not in FREE:
                yield from fields(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from fields(value[0], f"{where}[0]")


def table_at(run, where):
    for key, index in re.findall(r"(\w+)(?:\[(\d+)\])?", where):
        run = run[key][int(index)] if index else run[key]
    return run


NEEDED = [
    *[("", name) for name in report.RUN],
    *[("model", name) for name in report.MODEL],
    *[("data[0]", name) for name in report.DATA],
    *[("stages[0]", name) for name in report.STAGE],
    *[("stages[1].layers[0]", name) for name in report.LAYER],
    *[("stages[2].losses[0]", name) for name in report.LOSS],
    *[("stages[0].size", name) for name in report.SIZE],
    ("stages[0].quality.heldout", "perplexity"),
    *[("checks[0]", name) for name in report.CHECK],
]


@pytest.mark.parametrize(("where", "name"), NEEDED)
def test_a_missing_field_is_named(where, name, tmp_path):
    run = record()
    del table_at(run, where)[name]
    path = f"{where}.{name}" if where else name
    with pytest.raises(InputError, match=re.escape(f"report: {path} is missing")):
        write_report(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_planned_stages_are_a_list():
    with pytest.raises(InputError, match="planned must be a list"):
        report.check({**record(), "planned": 4})


@pytest.mark.parametrize(("where", "name"), [f for f in fields(record()) if f[1] != "tokens"])
def test_a_field_of_a_wrong_type_is_named(where, name):
    run = record()
    table_at(run, where)[name] = True if name != "passed" else "yes"
    path = f"{where}.{name}" if where else name
    with pytest.raises(InputError, match=re.escape(path) + " must be"):
        report.check(run)


def test_the_old_report_stays_where_the_new_one_is_refused(tmp_path):
    write_report(record(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = record()
    del broken["seed"]
    with pytest.raises(InputError):
        write_report(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"format": 1}', b'"\xff"'])
def test_render_of_what_is_no_report(text, tmp_path):
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(InputError):
        render(tmp_path / "report.json")
    with pytest.raises(InputError):
        render(tmp_path / "absent.json")


# --------------------------------------------------------------------------------------- numbers


def test_the_change_compares_each_slice_with_itself():
    first, last = record()["stages"][0], record()["stages"][3]
    found = change(last, first)
    a, b = (np.array(s["quality"]["heldout"]["slices"]) for s in (last, first))
    assert found.mean == 15.75 / 12 - 1
    assert found.spread == pytest.approx(np.std(a / b, ddof=1))


def test_how_numbers_are_written():
    assert [number(x) for x in (35.3125, 0.012346, 12400.4, 0, -1.5, 3e-9, 2.5e12, None)] == [
        "35.31",
        "0.01235",
        "12,400",
        "0",
        "−1.500",
        "3.000e−9",
        "2.500e12",
        "–",
    ]
    assert [percent(x, sign=True) for x in (0.0841, -0.5, 58.2, 1e28)] == [
        "+8.4 %",
        "−50.0 %",
        "+5,820 %",
        "+1.00e30 %",
    ]
    assert [amount(x, "B") for x in (2_071_234, 999, 8.2e9)] == ["2.07 MB", "999 B", "8.20 GB"]
    assert [duration(x) for x in (4.21, 42.2, 312.4, 7400, None)] == [
        "4.2 s",
        "42 s",
        "5 min 12 s",
        "2 h 3 min",
        "–",
    ]


def test_plots_are_imported_when_drawn():
    code = "import sys, jaxcompress.evaluation.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
