"""Every structured method by its name: on the command line, with what it tells and refuses."""

import json
import re

import pytest
import structured_cases as cases

import jaxcompress as jc
from jaxcompress.cli import main
from jaxcompress.methods import METHODS

OPTIONAL = ["heads", "queries", "neurons", "filters", "units", "width"]


def command(capsys, *arguments):
    """(exit code, what was printed, what went wrong)."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return stopped.value.code, told.out, told.err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the networks that are cut."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("llama", "lstm", "vgg", "mobilenet"):
        jc.save(cases.reference(name), folder / name)
    return folder


def test_what_each_needs():
    for name in OPTIONAL:
        assert METHODS[name].needs == "calibration for some options"
    assert METHODS["depth"].needs == METHODS["shrink"].needs == "calibration"


def test_the_list_names_them_all(capsys):
    code, out, _ = command(capsys, "methods", "--json")
    assert code == 0
    told = json.loads(out)
    for name in [*OPTIONAL, "shrink", "depth"]:
        assert told[name]["summary"].endswith("."), name
        assert told[name]["needs"] == METHODS[name].needs
        assert all(option["help"] for option in told[name]["options"].values()), name


@pytest.mark.parametrize(
    ("network", "method", "told"),
    [
        pytest.param(
            "llama", "queries", "kept 2 of 3 (2 times) by magnitude", marks=pytest.mark.slow
        ),
        ("llama", "neurons", "intermediate_size 40 -> 20"),
        ("lstm", "units", "hidden_size 12 -> 6"),
        pytest.param(
            "vgg",
            "filters",
            "layers (8, 'M', 12, 'M') -> (4, 'M', 6, 'M')",
            marks=pytest.mark.slow,
        ),
        ("mobilenet", "filters", "expanded (0, 24, 24) -> (0, 12, 12)"),
    ],
)
def test_a_cut_without_data(network, method, told, saved, tmp_path, capsys):
    arguments = ("compress", saved / network, tmp_path / "out", "--method", method)
    code, out, err = command(capsys, *arguments, "--sparsity", 0.5)
    assert (code, told in out) == (0, True), out + err
    dense, small = (jc.load(path) for path in (saved / network, tmp_path / "out"))
    assert small.config != dense.config
    inputs = cases.inputs_of(small)
    cases.close(small(inputs), jc.compress(dense, method, sparsity=0.5)(inputs))


@pytest.mark.parametrize(
    ("network", "method", "options", "why"),
    [
        ("llama", "width", (), "score activation: needs calibration data.*--calibration"),
        ("llama", "shrink", (), "needs --calibration"),
        ("llama", "units", (), "llama has none .a recurrent state.; it has .*neurons"),
        ("vgg", "heads", (), "vgg has none"),
        ("llama", "neurons", ("--allocation", "global"), "one size for all layers"),
        ("llama", "neurons", ("--score", "sensitivities"), "unknown"),
        ("llama", "neurons", ("--multiple", "0"), "must be 1 or more"),
    ],
)
def test_refusals_say_why_in_a_line(network, method, options, why, saved, tmp_path, capsys):
    arguments = ("compress", saved / network, tmp_path / "out", "--method", method)
    code, _, err = command(capsys, *arguments, *options)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(why, err), err
    assert not (tmp_path / "out").exists()
