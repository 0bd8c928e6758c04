r"""Extraction of answers from text: lm-evaluation-harness's filters, and boxed LaTeX.

Outputs are untrusted, so every function runs in linear time. The harness's regular expressions that
take longer are replaced with equivalent code.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal, InvalidOperation

# The filters `strict-match` and `flexible-extract` of gsm8k.yaml (lm-evaluation-harness 0.4.13).
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\(?:boxed|fbox)\s+(?P<bare>[^\s{}$\\][^\s$]*)"
    r"|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)


def strict_match(text: str) -> str | None:
    """Return the number after the first `#### `, like the harness's `strict-match` filter."""
    match = _STRICT.search(text)
    return match[1] if match else None


def flexible_extract(text: str) -> str | None:
    """Return the last number, like the harness's `flexible-extract` filter.

    A number is a run of digits, periods, commas and dollar signs.
    """
    last = deque(_FLEXIBLE.finditer(text), maxlen=1)
    return last[0][0] if last else None


def normalize_number(text: str) -> str:
    """Normalize a number as the harness does for GSM8K's `exact_match`."""
    text = text.replace(",", "").replace("$", "").rsplit("#### ", 1)[-1]
    return re.sub(r"\.$", "", text).lower()


def parse_number(text: str) -> Decimal | None:
    """Parse a number, ignoring commas, dollar signs and a final period; return None on failure."""
    plain = text.strip().replace(",", "").replace("$", "").rstrip(".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{…}` or `\fbox{…}`, or None.

    Braces are matched, except for `\{` and `\}`. `\boxed 7` without braces also counts.
    """
    opened: list[int | None] = []  # start of the content of each open brace, None if not a box
    last, content = -1, None
    for token in _BRACES.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["bare"]:
            last, content = token.start("bare"), token["bare"]
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None and start > last:
                last, content = start, text[start : token.start()]
    return content


def final_answer_sentence(text: str) -> str | None:
    """Return the text between "Final Answer: The final answer is" and "I hope", or None.

    This is the filter of the harness's `minerva_math`.
    """
    for line in (text + "I hope it is correct.").split("\n"):
        _, _, rest = line.partition("Final Answer: The final answer is")
        if match := re.search(". I hope it is correct.", rest):
            return rest[: match.start()].strip()
    return None


def last_formula(text: str) -> str | None:
    """Return the text between the last two dollar signs of one line, or None."""
    formulas = re.findall(r"(?<!\\)\$((?:\\.|[^$\\\n])+)\$", text)
    return formulas[-1].strip() if formulas else None
