"""Structured form of a random merge program, from which its text is written.

A draft consists of pieces: steps that change one expert's tensor, a core that combines the experts,
and sometimes a last operation on the result. Pieces contain canonical names, which the text
replaces by those of the program's naming scheme, so that a piece fits into any other draft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sdjax.programs.grammar_pieces import Names

REQUESTS = ("base", "depth", "kind")
CANONICAL = Names(
    experts=("EXPERT_1", "EXPERT_2", "EXPERT_3", "EXPERT_4", "EXPERT_5"),
    each="EACH",
    merged="MERGED",
    helper="HELPER",
    weights="WEIGHTS",
)
Loading = Literal["unpack", "items", "alias"]

_NAME = re.compile(r"\b(?:EXPERT_[1-5]|EACH|MERGED|HELPER|WEIGHTS)\b")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a program, in canonical names.

    Attributes:
        helpers: functions outside the merge function.
        lines: statements.
        result: expression of the result; empty for a step, whose statements change a tensor.
        families: families of operations it contains.
    """

    helpers: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    result: str = ""
    families: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        """The code, to search for names in it."""
        return "\n".join((*self.helpers, *self.lines, self.result))

    @property
    def experts(self) -> tuple[int, ...]:
        """Positions of the experts whose tensors it names."""
        return tuple(i for i, name in enumerate(CANONICAL.experts) if name in self.text)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A program under construction.

    Attributes:
        names: naming scheme.
        slots: number of experts.
        loading: how the experts that the core names are assigned to variables.
        steps: changes of single experts, before the core.
        core: combination of the experts.
        finish: expression of the core's result; None if that is returned as it is.
    """

    names: Names
    slots: int
    loading: Loading
    steps: tuple[Piece, ...] = ()
    core: Piece
    finish: Piece | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces in the order of the text."""
        return (*self.steps, self.core, *(() if self.finish is None else (self.finish,)))

    @property
    def families(self) -> frozenset[str]:
        """The families of operations it was built from."""
        found = frozenset[str]().union(*(piece.families for piece in self.pieces))
        return found | {"subset"} if 0 < len(self.core.experts) < self.slots else found

    def text(self) -> str:
        """Return the source code."""
        code = "\n".join(piece.text for piece in self.pieces)
        requests = [name for name in REQUESTS if re.search(rf"\b{name}\b", code)]
        body = [*_loads(self.core.experts, self.slots, self.loading)]
        body += [line for step in self.steps for line in step.lines]
        body += [*self.core.lines, *_returned(self.core.result, self.finish)]
        head = f"def merge_models({', '.join(['task_vectors', *requests])}):"
        helpers = [helper for piece in self.pieces for helper in piece.helpers]
        source = "\n\n".join([*helpers, "\n".join([head, *(f"    {line}" for line in body)])])
        text = f"import jax.numpy as jnp\n\n{source}" if "jnp." in source else source
        scheme = dict(zip(_flat(CANONICAL), _flat(self.names), strict=True))
        return _NAME.sub(lambda match: scheme[match[0]], text)


def _loads(experts: tuple[int, ...], slots: int, loading: Loading) -> Iterable[str]:
    """Yield statements that assign experts to variables; a name always refers to the same slot."""
    names = [CANONICAL.experts[i] for i in experts]
    if not names:
        return
    if loading == "unpack" and len(names) == slots:
        yield f"{', '.join(names)} = task_vectors.values()"
    elif loading == "alias" and len(names) > 1:
        yield "tv = task_vectors"
        yield f"{', '.join(names)} = " + ", ".join(f'tv["expert_{i + 1}"]' for i in experts)
    else:
        for name, i in zip(names, experts, strict=True):
            yield f'{name} = task_vectors["expert_{i + 1}"]'


def _returned(result: str, finish: Piece | None) -> Iterable[str]:
    """Yield the last statements."""
    if finish is None:
        yield f"return {result}"
        return
    if result != CANONICAL.merged:
        yield f"{CANONICAL.merged} = {result}"
    yield from finish.lines
    yield f"return {finish.result}"


def _flat(names: Names) -> tuple[str, ...]:
    return (*names.experts, names.each, names.merged, names.helper, names.weights)
