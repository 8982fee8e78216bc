"""The README is true: its commands and its Python run."""

import hashlib
import json
import pathlib
import re
import shlex
from xml.etree import ElementTree

import pytest
from tiny import write_llama, write_text

from jaxcompress.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line for block in blocks("console") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    # Groups of 64 divide every width of the example.
    write_llama(root / "llama", intermediate_size=192)
    write_text(root / "text.txt")
    (root / "configs").symlink_to(ROOT / "configs")
    return root


def test_commands_run_in_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ran = 0
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
            continue
        assert program == "jaxcompress", command
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0, f"{command}: {capsys.readouterr().err}"
        ran += 1
    assert ran >= 8


def test_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    examples = blocks("python")
    assert len(examples) == 3
    for number, code in enumerate(examples):
        scope = {"__name__": f"readme_{number}"}
        exec(compile(code, f"README.md[{number}]", "exec"), scope)
    assert "perplexity" in capsys.readouterr().out
    assert (place / "recipe" / "report.html").is_file()
    assert scope["fn2"](scope["smaller"], scope["x"]).shape == (8, 64)
    assert scope["smaller"]["up"].shape == (64, 128)


def test_table_and_figure_are_those_of_the_recorded_run():
    """After another run: `python benchmarks/demo_figure.py` draws the figure anew."""
    record = max((ROOT / "benchmarks" / "results").glob("*/demo.json"))
    stages = json.loads(record.read_text())["stages"]
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \|$", README, re.M)
    assert rows == [
        (
            f"{stage['quality']['heldout']['perplexity']:.2f}",
            f"{stage['size']['bytes_memory']:,}",
            f"{stage['size']['bits_per_weight']:.2f}",
        )
        for stage in stages
    ]
    assert f"({record.relative_to(ROOT).as_posix()})" in README
    figure = (ROOT / "docs" / "figures" / "demo.svg").read_text()
    assert hashlib.sha256(record.read_bytes()).hexdigest() in figure
    shown = set(ElementTree.fromstring(figure).itertext())
    assert shown >= {stage["name"] for stage in stages}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
