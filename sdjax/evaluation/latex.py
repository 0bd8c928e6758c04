r"""Normalization of final answers in LaTeX, so that equal answers become equal strings.

The rules come from Lewkowycz et al. 2022 (Minerva, arXiv 2206.14858, appendix D.1), based on
Hendrycks et al. 2021 (MATH), in the order and with the corrections of lm-evaluation-harness 0.4.13
(`minerva_math`). The tests compare the results with the harness's.
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
# Removed in this order; some of them are units.
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
        # unwrap dollar signs, \text, boldface, overlines and boxes
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
# Longer answers are left unchanged: none is correct, and some rules take quadratic time.
_MAX_LENGTH = 2_000


def normalize_latex(answer: str) -> str:
    """Return the normal form of a final answer."""
    if len(answer) > _MAX_LENGTH:
        return answer
    answer = _WORD.sub("", answer.rsplit("=", 1)[-1])
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in _REMOVED:
        if removed.isalpha():  # a unit, but not the "ft" in \left
            parts = _COMMAND.split(answer)
            parts[::2] = [part.replace(removed, "") for part in parts[::2]]
            answer = "".join(parts)
        else:
            answer = answer.replace(removed, "")
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
