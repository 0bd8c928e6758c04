"""The job of a grader's workers: whether two answers of mathematics are the same.

Comparing parses both with math-verify, whose parser and simplifier (SymPy) run code that an answer
can steer, without bounds on time or memory. So it happens in a confined child (sandbox/server.py)
that is killed when its time is up. Nothing of this is imported where the weights are.
"""

import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Callable

_LIBRARIES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")
# A worker can read no file, so what SymPy imports only when it computes has to be there before.
_LATE = (
    *("assumptions", "calculus", "combinatorics", "concrete", "core", "discrete", "functions"),
    *("geometry", "integrals", "logic", "matrices", "ntheory", "polys", "series", "sets"),
    *("simplify", "solvers", "strategies", "tensor", "vector"),
)
_NOT_NEEDED = (".tests", ".benchmarks", "core.compatibility", "core.trace")
# Compared before the first fork, so that a worker finds the parser's tables built.
_PAIRS = (
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{\sqrt{3}+x^2}{2}", r"\frac{x^2}{2}+\sin(\pi/3)"),
    (r"(-\infty,2]\cup(3,4)", r"(3,4)\cup(-\infty,2]"),
    (r"\{1,2\}", "2, 1"),
    (r"(1,2)", r"(1,\frac{4}{2})"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"x^2-2x+1", r"(x-1)^2"),
    (r"x=3", "3"),
    (r"x\le 3", r"(-\infty,3]"),
    (r"1<x<2", r"x\in(1,2)"),
    (r"3+4i", r"4i+3"),
    (r"90^\circ", "90"),
    (r"50\%", "0.5"),
    (r"10{,}000", "10000"),
    (r"\$5.50", "5.5"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    (r"5!", "120"),
    (r"|x-1|", r"|1-x|"),
    (r"\lfloor 2.5\rfloor", "2"),
    (r"\text{east}", r"\text{west}"),
    (r"\sum_{k=1}^{3}k", "6"),
    (r"\int_0^1 x\,dx", r"\frac12"),
    (r"y=2x+3", r"2x-y+3=0"),
    (r"2^{10}", "1024"),
    (r"\sqrt[3]{x}+1", r"x^{1/3}+1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\cos^2 x+\sin^2 x", "1"),
    ("not a formula", "neither {"),
    ("1 + ", "3x + \\"),
)


class _MissedImports:
    """The last of Python's finders: hears of modules of ours that none before it has found.

    Comparing would take such a failure for a difference.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in (*_LIBRARIES, *sys.stdlib_module_names):
            self.names.append(name)


def prepare(argument: str) -> Callable[[bytes], bytes]:
    """In the server: import what comparing needs; the function that a worker calls.

    Its text is JSON, [gold, answer]; its message {"equal": bool, "missed": [module, …]}.
    """
    logging.disable(logging.CRITICAL)
    for name in _LATE:
        package = importlib.import_module(f"sympy.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"sympy.{name}."):
            if not any(part in module.name for part in _NOT_NEEDED):
                importlib.import_module(module.name)
    for gold, answer in _PAIRS:
        same(gold, answer)

    def work(text: bytes) -> bytes:
        missed = _MissedImports()
        sys.meta_path.append(missed)
        equal = same(*json.loads(text))
        return json.dumps({"equal": equal, "missed": missed.names}).encode()

    return work


def same(gold: str, answer: str) -> bool:
    """Whether math-verify takes `answer` for `gold`; both are LaTeX without dollar signs.

    Without time limits of its own, which need signals.
    """
    from math_verify import parse, verify

    expected, given = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return bool(verify(expected, given, timeout_seconds=None))
