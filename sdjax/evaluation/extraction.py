r"""Answers in texts: numbers as lm-evaluation-harness finds them, and LaTeX in boxes.

Every function takes hostile text and is linear in its length. Where a pattern of the harness is
not, another way to the same result stands here.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal, InvalidOperation

# Of gsm8k.yaml (lm-evaluation-harness 0.4.13): the filters `strict-match` and `flexible-extract`.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\(?:boxed|fbox)\s+(?P<bare>[^\s{}$\\][^\s$]*)"
    r"|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)


def number_behind_hashes(text: str) -> str | None:
    """The harness's `strict-match`: the number behind the first `#### `."""
    found = _STRICT.search(text)
    return found[1] if found else None


def last_number(text: str) -> str | None:
    """The harness's `flexible-extract`: the last run of digits, points, commas and dollar signs."""
    found = deque(_FLEXIBLE.finditer(text), maxlen=1)
    return found[0][0] if found else None


def comparable(text: str) -> str:
    """What the harness's `exact_match` of GSM8K compares."""
    text = text.replace(",", "").replace("$", "").rsplit("#### ", 1)[-1]
    return re.sub(r"\.$", "", text).lower()


def as_number(text: str) -> Decimal | None:
    """A number with its commas, dollar signs and last point taken away; None where it is none."""
    plain = text.strip().replace(",", "").replace("$", "").rstrip(".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def last_boxed(text: str) -> str | None:
    r"""What is in the last `\boxed{…}` or `\fbox{…}` that is closed, braces matched.

    `\{` and `\}` are no braces. `\boxed 7` without braces counts as well. None without any.
    """
    opened: list[int | None] = []  # where the content of each open brace starts, if it is a box's
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
    """The harness's `minerva_math`: between "Final Answer: The final answer is" and "I hope"."""
    for line in (text + "I hope it is correct.").split("\n"):
        _, _, rest = line.partition("Final Answer: The final answer is")
        if found := re.search(". I hope it is correct.", rest):
            return rest[: found.start()].strip()
    return None


def last_formula(text: str) -> str | None:
    """What stands between the last two dollar signs of one line."""
    found = re.findall(r"(?<!\\)\$((?:\\.|[^$\\\n])+)\$", text)
    return found[-1].strip() if found else None
