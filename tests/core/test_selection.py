"""Selection against a brute-force matcher, and its errors."""

import fnmatch
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxcompress.core.errors import InputError
from jaxcompress.core.selection import Selection, matches, select

PATHS = [
    "embed/embedding",
    "layers/0/attn/q_proj/kernel",
    "layers/0/attn/q_proj/bias",
    "layers/0/mlp/up/kernel",
    "layers/1/attn/k_proj/kernel",
    "layers/10/mlp/up/kernel",
    "head/kernel",
    "kernel",
]


def brute_match(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(brute_match(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return (
        bool(path)
        and fnmatch.fnmatchcase(path[0], pattern[0])
        and brute_match(pattern[1:], path[1:])
    )


NAMES = st.text("ab01", min_size=1, max_size=3)
PIECES = st.sampled_from(["*", "?", "a", "b", "0", "[ab]", "[!a]", "[0-1]", "**", ".", "+"])
COMPONENTS = st.one_of(st.just("**"), st.lists(PIECES, min_size=1, max_size=3).map("".join))
# Each pattern is drawn along with the patterns without braces that it stands for.
PLAIN = COMPONENTS.map(lambda text: (text, [text]))


def braces(inner):
    return st.lists(inner, min_size=1, max_size=3).map(
        lambda drawn: (
            "{" + ",".join(t for t, _ in drawn) + "}",
            [p for _, ps in drawn for p in ps],
        )
    )


def joined(drawn):
    texts, plains = zip(*drawn)
    return "/".join(texts), ["/".join(combination) for combination in itertools.product(*plains)]


PATTERNS = st.lists(
    st.one_of(PLAIN, PLAIN, braces(PLAIN), braces(braces(PLAIN))), min_size=1, max_size=4
).map(joined)


@given(
    pattern=PATTERNS,
    paths=st.lists(st.lists(NAMES, min_size=1, max_size=4).map("/".join), min_size=1, max_size=8),
)
@example(pattern=("**", ["**"]), paths=["a"])
@example(pattern=("a/**", ["a/**"]), paths=["a", "a/b", "a/b/0", "ab"])
@example(pattern=("**/**/a", ["**/**/a"]), paths=["a", "b/a", "b/b/a", "b/ab"])
@example(pattern=("x{a,b/{0,1}}/*", ["xa/*", "xb/0/*", "xb/1/*"]), paths=["xa/0", "xb/0/a", "b/a"])
@example(pattern=("a.", ["a."]), paths=["ab"])
def test_globs_match_what_a_brute_force_matcher_does(pattern, paths):
    text, plain = pattern
    for path in paths:
        expected = any(brute_match(p.split("/"), path.split("/")) for p in plain)
        assert matches(text, path) == expected, (text, path)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, PATHS),
        ("**/kernel", None, [p for p in PATHS if p.endswith("kernel")]),
        ("layers/*/attn/**", None, PATHS[1:3] + PATHS[4:5]),
        ("**/{q,k}_proj/kernel", None, [PATHS[1], PATHS[4]]),
        (["head/*", "layers/0/**"], "**/bias", [PATHS[1], PATHS[3], PATHS[6]]),
        (r"re:layers/\d/.*kernel", None, [PATHS[1], PATHS[3], PATHS[4]]),
        ("**", ["{embed,head}/*", "kernel"], PATHS[1:6]),
        ("layers/[!0]/**", None, [PATHS[4]]),
    ],
)
def test_selection_keeps_the_order_of_the_paths(include, exclude, expected):
    assert select(PATHS, include, exclude) == expected
    assert Selection(include, exclude).select(iter(PATHS)) == expected


def test_a_star_does_not_cross_components():
    assert not matches("layers/*", "layers/0/attn")
    assert not matches("layers/[+-9]0", "layers//0")
    assert matches("**", "")
    assert matches("a[0]/{b", "a[0]/{b")
    assert not matches("re:kernel", "head/kernel")


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(InputError, match=r"include pattern '\*\*/q_porj/kernel'.*q_proj/kernel"):
        select(PATHS, "**/q_porj/kernel")
    with pytest.raises(InputError, match=r"exclude pattern 'heads/kernel'.*head/kernel"):
        select(PATHS, None, "heads/kernel")
    with pytest.raises(InputError, match="there are none"):
        select([], "**")


@pytest.mark.parametrize("pattern", ["{a,b", "a}", "re:(", "{a,{b}"])
def test_a_malformed_pattern_is_named(pattern):
    with pytest.raises(InputError, match="pattern '") as caught:
        select(PATHS, pattern)
    assert "\n" not in str(caught.value)


def test_the_first_override_that_matches_counts():
    selection = Selection(
        "layers/**",
        "**/bias",
        {"**/q_proj/kernel": {"bits": 8}, "layers/0/**": {"bits": 2, "group_size": 32}},
    )
    assert selection.resolve(PATHS) == {
        PATHS[1]: {"bits": 8},
        PATHS[3]: {"bits": 2, "group_size": 32},
        PATHS[4]: {},
        PATHS[5]: {},
    }


def test_an_override_of_nothing_selected_is_an_error():
    with pytest.raises(InputError, match="override pattern 'head/kernel'"):
        Selection("layers/**", overrides={"head/kernel": {"bits": 8}}).resolve(PATHS)
