"""Worked examples that lm-evaluation-harness fixes for a task (MIT; of the papers named there)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Problem

_FOLDER = Path(__file__).parent / "examples"


def fixed_examples(name: str, count: int) -> list[Problem]:
    """The first `count` examples. UserError where there are fewer."""
    known = _read(name)
    if count > len(known):
        raise UserError(
            f"task.shots is {count}, but {name} has {len(known)} worked examples; ask for fewer"
        )
    return list(known[:count])


@cache
def _read(name: str) -> tuple[Problem, ...]:
    lines = (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return tuple(
        Problem(id=f"example-{index}", kind=name, answer="", **json.loads(line))
        for index, line in enumerate(filter(None, lines))
    )
