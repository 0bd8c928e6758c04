"""Children of merge programs: mutations of one program, and combinations of two.

The zoo's seed learns from them what to do with earlier programs in its prompt. A child of drafts is
a draft, made of whole pieces, so that it is as valid as a program of the grammar.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sdjax.programs.grammar import (
    fits,
    gate_step,
    linear_core,
    random_finish,
    sample_draft,
    shaper_step,
)
from sdjax.programs.grammar_draft import Draft, Piece
from sdjax.programs.grammar_gates import DEPTH, KIND
from sdjax.programs.grammar_pieces import draw_weighted
from sdjax.programs.memory_prompts import OPERATIONS

_MAX_TRIES = 40
_NUMBER = re.compile(r"(?<![\w.])\d+\.\d+")

Edit = Callable[[np.random.Generator, Draft], Draft | None]


def sample_child(
    rng: np.random.Generator, operation: str, parents: Sequence[Draft]
) -> Draft | None:
    """Return a random child of one or two programs.

    All operations but `explore` start from the last parent, which has the best score.

    Args:
        rng: random generator.
        operation: "improve" changes some numbers or one piece of the best program; "combine" puts a
            piece of the other program into it; "simplify" removes a piece or an expert; "explore"
            returns a program with another way to combine the experts and a family that no parent
            has.
        parents: drafts of the programs, the best last; two of them for "combine".

    Returns:
        a draft whose text differs from those of the parents; None if the parents have no such
        child, for example because there is nothing to remove.
    """
    texts = {parent.text() for parent in parents}
    for _ in range(_MAX_TRIES):
        match operation:
            case "improve":
                child = draw_weighted(rng, _IMPROVEMENTS)(rng, parents[-1])
            case "combine":
                child = _combine(rng, parents[-1], parents[0])
            case "simplify":
                child = draw_weighted(rng, _SIMPLIFICATIONS)(rng, parents[-1])
            case "explore":
                child = _explore(rng, parents)
            case _:
                raise ValueError(f"operation {operation}: not one of {', '.join(OPERATIONS)}")
        if child is not None and fits(child) and child.text() not in texts:
            return child
    return None


def is_gate(step: Piece) -> bool:
    """Return whether a step is a gate, and not a transformation of entries."""
    return bool(step.families & {DEPTH, KIND})


# Improve.


def _change_numbers(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Change one to three numbers."""
    counts = [len(_NUMBER.findall(piece.text)) for piece in draft.pieces]
    total = sum(counts)
    if total == 0:
        return None
    size = min(total, int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2))))
    chosen = {int(n) for n in rng.choice(total, size=size, replace=False)}
    seen = 0

    def changed(match: re.Match[str]) -> str:
        nonlocal seen
        seen += 1
        return _near(rng, match[0]) if seen - 1 in chosen else match[0]

    def edited(piece: Piece) -> Piece:
        return replace(
            piece,
            helpers=tuple(_NUMBER.sub(changed, text) for text in piece.helpers),
            lines=tuple(_NUMBER.sub(changed, text) for text in piece.lines),
            result=_NUMBER.sub(changed, piece.result),
        )

    return replace(
        draft,
        steps=tuple(edited(step) for step in draft.steps),
        core=edited(draft.core),
        finish=None if draft.finish is None else edited(draft.finish),
    )


def _near(rng: np.random.Generator, text: str) -> str:
    """Return a literal close to another, with one or two decimals."""
    value = float(text)
    while True:
        moved = value * np.exp(rng.normal(0, 0.35)) + rng.normal(0, 0.05)
        literal = f"{np.clip(moved, 0.02, 5.0):.{rng.integers(1, 3)}f}"
        if float(literal) not in (0.0, value):
            return literal


def _add_gate(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Gate an expert that is not gated yet."""
    gated = {i for step in draft.steps if is_gate(step) for i in step.experts}
    free = [i for i in draft.core.experts if i not in gated]
    if not free:
        return None
    return _with_step(draft, gate_step(rng, free[int(rng.integers(len(free)))]))


def _change_step(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Replace a gate by another gate, or a transformation by another one."""
    if not draft.steps:
        return None
    n = int(rng.integers(len(draft.steps)))
    old = draft.steps[n]
    new = (gate_step if is_gate(old) else shaper_step)(rng, old.experts[0])
    return replace(draft, steps=(*draft.steps[:n], new, *draft.steps[n + 1 :]))


def _change_finish(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Add or replace the last operation."""
    return replace(draft, finish=random_finish(rng))


_IMPROVEMENTS: tuple[tuple[float, Edit], ...] = (
    (4.0, _change_numbers),
    (3.5, _add_gate),
    (1.5, _change_step),
    (1.0, _change_finish),
)


# Combine.


def _combine(rng: np.random.Generator, best: Draft, other: Draft) -> Draft | None:
    """Put a piece of another program into the best one."""
    children = [
        _with_step(best, step)
        for step in other.steps
        if step not in best.steps and step.experts[0] in best.core.experts
    ]
    if other.finish is not None and other.finish != best.finish:
        children.append(replace(best, finish=other.finish))
    kept = tuple(step for step in best.steps if step.experts[0] in other.core.experts)
    if kept and kept != other.steps and other.core != best.core:
        children.append(replace(best, core=other.core, steps=kept))
    if best.finish is not None and other.core != best.core:
        children.append(replace(other, finish=best.finish))
    return children[int(rng.integers(len(children)))] if children else None


def _with_step(draft: Draft, step: Piece) -> Draft:
    """Return a draft with one more step; it replaces a step of the same sort on the same expert."""
    kept = [
        old for old in draft.steps if old.experts != step.experts or is_gate(old) != is_gate(step)
    ]
    steps = sorted((*kept, step), key=lambda s: (is_gate(s), s.experts))
    return replace(draft, steps=tuple(steps))


# Simplify.


def _drop_step(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Remove a step."""
    if not draft.steps:
        return None
    n = int(rng.integers(len(draft.steps)))
    return replace(draft, steps=(*draft.steps[:n], *draft.steps[n + 1 :]))


def _drop_finish(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Remove the last operation."""
    return None if draft.finish is None else replace(draft, finish=None)


def _plain_core(rng: np.random.Generator, draft: Draft) -> Draft | None:
    """Replace the core by a sum of the same experts, or of all but one of them."""
    experts = list(draft.core.experts) or list(range(draft.slots))
    if len(experts) > 1 and rng.random() < 0.4:
        experts.pop(int(rng.integers(len(experts))))
    kept = tuple(step for step in draft.steps if step.experts[0] in experts)
    child = replace(draft, core=linear_core(rng, experts), steps=kept)
    return child if len(child.text()) < len(draft.text()) - 8 else None


_SIMPLIFICATIONS: tuple[tuple[float, Edit], ...] = (
    (3.0, _drop_step),
    (2.0, _drop_finish),
    (1.5, _plain_core),
)


# Explore.


def _explore(rng: np.random.Generator, parents: Sequence[Draft]) -> Draft | None:
    """Return another program, with a family that no parent has and without the parents' pieces."""
    known = frozenset[str]().union(*(parent.families for parent in parents))
    child = sample_draft(rng, slots=parents[-1].slots)
    cores = [parent.core.families for parent in parents]
    if child.core.families in cores or not child.families - known - {"subset"}:
        return None
    return child
