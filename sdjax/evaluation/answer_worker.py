"""The grader's worker, which compares two answers to a math problem.

math-verify parses both answers. Its parser and simplifier (SymPy) run code that an answer can
influence, with no limit on time or memory, so each comparison runs in a confined worker
(isolation/server.py). The process that holds the weights never imports this module.
"""

import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Callable

_LIBRARIES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")
# Subpackages that SymPy imports lazily. They are imported up front: a worker cannot read files.
_LAZY_SUBPACKAGES = (
    *("assumptions", "calculus", "combinatorics", "concrete", "core", "discrete", "functions"),
    *("geometry", "integrals", "logic", "matrices", "ntheory", "polys", "series", "sets"),
    *("simplify", "solvers", "strategies", "tensor", "vector"),
)
_NOT_NEEDED = (".tests", ".benchmarks", "core.compatibility", "core.trace")
# Compared before the first fork, so that workers inherit the parser's tables.
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


class _FailedImports:
    """The last finder on `sys.meta_path`, which records modules that no other finder has found.

    Without it, math-verify would report the answers as different after a failed import.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Record a module that could not be found, if it belongs to one of the libraries."""
        if name.split(".")[0] in (*_LIBRARIES, *sys.stdlib_module_names):
            self.names.append(name)


def prepare(argument: str) -> Callable[[bytes], bytes]:
    """Import the libraries and return the function that a worker runs.

    The function takes JSON, `[gold, answer]`, and returns JSON,
    `{"equal": bool, "failed_imports": [module, ...]}`.

    Args:
        argument: unused.
    """
    logging.disable(logging.CRITICAL)
    for name in _LAZY_SUBPACKAGES:
        package = importlib.import_module(f"sympy.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"sympy.{name}."):
            if not any(part in module.name for part in _NOT_NEEDED):
                importlib.import_module(module.name)
    for gold, answer in _PAIRS:
        same(gold, answer)

    def work(request: bytes) -> bytes:
        failed_imports = _FailedImports()
        sys.meta_path.append(failed_imports)
        equal = same(*json.loads(request))
        return json.dumps({"equal": equal, "failed_imports": failed_imports.names}).encode()

    return work


def same(gold: str, answer: str) -> bool:
    """Return whether math-verify considers two answers equal (LaTeX without dollar signs).

    math-verify's own time limits are off, because they need signals.
    """
    from math_verify import parse, verify

    expected, parsed = (
        parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)
    )
    return bool(verify(expected, parsed, timeout_seconds=None))
