"""The documentation is whole: every method has its place, links lead somewhere, commands parse."""

import pathlib
import re
import shlex

import click
import pytest
from tiny import write_llama, write_text

from jaxcompress.cli import cli, main
from jaxcompress.methods import METHODS, resolved

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page):
    return page.read_text()


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page, anchor):
    """The text below the heading of an anchor; the whole page without one."""
    text = text_of(page)
    if not anchor:
        return text
    parts = re.split(r"^(#+ .*)$", text, flags=re.M)
    for title, body in zip(parts[1::2], parts[2::2]):
        words = title.lstrip("#").strip().lower()
        if re.sub(r"[^\w\- ]", "", words).replace(" ", "-") == anchor:
            return body
    raise AssertionError(f"{page.name}#{anchor}: no such heading")


def reachable():
    """Pages that links lead to from the index."""
    found, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page in found or page.suffix != ".md":
            continue
        found.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(without_code(text_of(page))))
        todo += [(page.parent / t).resolve() for t in targets if t and "://" not in t]
    return found


def commands(page):
    """Lines of shell blocks that begin with the program's name, continued lines joined."""
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", text_of(page), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("jaxcompress ")]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


def test_every_page_is_reached_from_the_index():
    assert set(PAGES) <= reachable()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(without_code(text_of(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name}: {target}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_place_that_the_index_links_to(name):
    found = re.search(rf"\[`{name}`\]\(([^)]+)\)", text_of(DOCS / "index.md"))
    assert found, f"docs/index.md has no link [`{name}`](...)"
    path, _, anchor = found[1].partition("#")
    said = section(DOCS / path, anchor)
    if not anchor:
        titles = re.findall(r"^#+ .*$", said, re.M)
        assert any(f"`{name}`" in title for title in titles), f"{path}: no heading with `{name}`"
    used = rf"--method {name}\b|\"{name}\"|`{name}`"
    assert re.search(used, said), f"{found[1]}: does not say how to use {name}"


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{p}: {c[:60]}" for p, c in COMMANDS])
def test_commands_are_understood(page, line):
    """Every option exists and takes its value; a method uses every option that it is given."""
    _, verb, *arguments = shlex.split(line)
    command = cli.commands[verb]
    with command.make_context(verb, arguments) as context:
        if verb != "compress":
            return
        given = {
            name: value
            for name, value in context.params.items()
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        }
    own = {name for method in METHODS.values() for name in method.options}
    if given.get("method", "auto") != "auto":
        _, method = resolved(given["method"], given)
        _, unused = method.accepted({n: v for n, v in given.items() if n in own})
        assert unused == []
        assert method.needs != "calibration" or "calibration" in given


DATA_FREE = [
    line
    for line in dict.fromkeys(line for _, line in COMMANDS)
    if line.startswith("jaxcompress compress ") and "--calibration" not in line
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("docs")
    write_llama(root / "MODEL", layers=2, intermediate_size=128, hidden_size=128)
    write_text(root / "text.txt", 150)
    return root


def run(line, place, monkeypatch, capsys, number):
    monkeypatch.chdir(place)
    arguments = [f"OUT{number}" if word == "OUT" else word for word in shlex.split(line)[1:]]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *(["--ctx", "64"] if "--calibration" in line else [])])
    assert ended.value.code == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("line", DATA_FREE)
def test_commands_without_data_run(line, place, monkeypatch, capsys):
    run(line, place, monkeypatch, capsys, DATA_FREE.index(line))


WITH_DATA = [
    line
    for line in dict.fromkeys(line for _, line in COMMANDS)
    if line.startswith("jaxcompress compress ") and "--calibration text.txt" in line
]


@pytest.mark.slow
@pytest.mark.parametrize("line", WITH_DATA)
def test_commands_with_data_run(line, place, monkeypatch, capsys):
    run(line, place, monkeypatch, capsys, f"-data{WITH_DATA.index(line)}")
