"""Regular expressions in linear time: agreement with `re`, and what is refused."""

import re

import pytest

from sdjax.core import linear_regex
from sdjax.core.linear_regex import PatternList

NAMES = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    "layers.12.self_attn.k_proj",
    "model.layers.3.mlp.down_proj",
    "model.layers.13.mlp.down_proj",
    "layersX3",
    "a.",
    "aaab",
    "",
]
PATTERNS = [
    r"q_proj",
    r"self_attn.q_proj",
    r".*\.q_proj",
    r"^q_proj",
    r"^model\.layers\.3\..*$",
    r"layers\.(0|1|12)\.self_attn\.(q|k)_proj",
    r"layers\.[0-9]\.mlp\.(?:up|down)_proj",
    r"layers.\d+.(self_attn|mlp).\w+",
    r"[^.]+_proj",
    r"[]a]+b",
    r"(a|b)*",
    r"(a*)*b?",
    r"a{3}b",
    r"a{2,}b",
    r"a{,3}b{0,2}",
    r"a{1,2}?ab",
    r"a{x}|a\.",
    r"()",
    r"",
    r"$",
    r"x^",
    r"(k_proj$|q_proj)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_agree_with_re(pattern):
    for name in NAMES:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert (PatternList([pattern]).first_match(name) == 0) == expected, name


def test_the_first_pattern_that_matches_counts():
    patterns = PatternList(["k_proj", ".*_proj", "q_proj", r"mlp\..*", "k_proj"])
    found = [patterns.first_match(name) for name in ("a.k_proj", "a.q_proj", "mlp.x", "norm")]
    assert found == [0, 1, 3, None]
    assert PatternList([]).first_match("q_proj") is None


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*c", "(.*a){20}b", "(a?){99}a{99}b"])
def test_matching_takes_linear_work(pattern):
    patterns = PatternList([pattern])
    for name in ("a" * 1_000, "a" * 1_000 + "x"):
        patterns.first_match(name)
    assert patterns._work < 1_000_000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "unbalanced parenthesis"),
        ("a)|(b", "unbalanced parenthesis"),
        ("[a", r"\[ without \]"),
        ("[b-a]", "bad character range"),
        ("*a", r"nothing to repeat with \*"),
        ("a**", "multiple repeat"),
        ("a++", "multiple repeat"),
        ("a{3,2}", r"the repetition \{3,2\}"),
        (r"(a)\1", r"\\1 is not supported"),
        (r"a\b", r"\\b is not supported"),
        ("a\\", r"\\ is not supported"),
        ("(?=a)", r"\(\? is not supported"),
        ("(?i)a", r"\(\? is not supported"),
        ("(" * 60 + ")" * 60, "more than 50 nested groups"),
        ("a" * 999 + "()", "a pattern of 1,001 characters"),
        ("((){9999}){9999}", "too many repetitions or patterns"),
        ("((((a{99}){99}){99}){99}){99}", "too many repetitions or patterns"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        PatternList([pattern])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_work_of_all_matches_is_limited(monkeypatch):
    monkeypatch.setattr(linear_regex, "MAX_WORK", 200)
    patterns = PatternList([f".*{letter}.*" for letter in "abcdefgh"])
    with pytest.raises(ValueError, match="matching takes too long; use fewer or simpler patterns"):
        patterns.first_match("abcdefgh" * 100)
