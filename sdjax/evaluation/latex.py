r"""The usual normalisation of a final answer in LaTeX, after which equal answers are equal texts.

The rules are those of Lewkowycz et al. 2022 (Minerva, arXiv 2206.14858, appendix D.1), which grew
out of Hendrycks et al. 2021 (MATH), in the order and with the corrections that
lm-evaluation-harness 0.4.13 (`minerva_math`) has. Tests compare with what that answers.
"""

from __future__ import annotations

import re

_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units"),
    *("sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds"),
    *("meters", "meals", "edges", "students", "childrentickets", "multiples"),
)
# Around and between the units, in this order.
_REMOVED = (
    *_UNITS[:10],
    r"\ldots",
    *_UNITS[10:],
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_WORD = re.compile(rf"(?<!\\)\b(?:{'|'.join(_UNITS)})\b")
_COMMAND = re.compile(r"(\\[a-zA-Z]+)")
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # out of dollar signs, texts, bold face, overlines and boxes
        (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
        (r"(\\text\{)(.*?)(\})", r"\2"),
        (r"(\\textbf\{)(.*?)(\})", r"\2"),
        (r"(\\overline\{)(.*?)(\})", r"\2"),
        (r"(\\boxed\{)(.*)(\})", r"\2"),
        # \frac12 to \frac{1}{2}, \sqrt[3]8 to \sqrt[3]{8}, \sqrt2 to \sqrt{2}
        (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
        (r"(sqrt)(\[[^\]]*\])(\w)", r"\1\2{\3}"),
        (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),
    )
)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+")
# Longer answers are left alone: none is right, and some of the rules take the square of the length.
_LONGEST = 2_000


def normalise(answer: str) -> str:
    """The normal form of a final answer."""
    if len(answer) > _LONGEST:
        return answer
    answer = _WORD.sub("", answer.rsplit("=", 1)[-1])
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in _REMOVED:
        if removed.isalpha():  # a unit; "ft" is none in \left
            parts = _COMMAND.split(answer)
            parts[::2] = [part.replace(removed, "") for part in parts[::2]]
            answer = "".join(parts)
        else:
            answer = answer.replace(removed, "")
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
