"""Fixed worked examples from lm-evaluation-harness (MIT license), which names their papers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Problem

_FOLDER = Path(__file__).parent / "examples"


def fixed_examples(name: str, count: int) -> list[Problem]:
    """Return the first `count` examples of a task.

    Args:
        name: name of a file in `examples/`, without its extension.
        count: number of examples.

    Raises:
        UserError: `count` exceeds the number of examples.
    """
    examples = _read(name)
    if count > len(examples):
        raise UserError(
            f"task.shots is {count}, but {name} has only {len(examples)} worked examples; lower "
            "task.shots"
        )
    return list(examples[:count])


@cache
def _read(name: str) -> tuple[Problem, ...]:
    lines = (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return tuple(
        Problem(id=f"example-{index}", kind=name, answer="", **json.loads(line))
        for index, line in enumerate(filter(None, lines))
    )
