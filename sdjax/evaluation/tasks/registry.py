"""Tasks by name, by the import path of a class, and any JSONL file as a task."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Task

TASKS = {
    "arithmetic": "sdjax.evaluation.tasks.arithmetic:ArithmeticTask",
    "gsm8k": "sdjax.evaluation.tasks.gsm8k:GSM8K",
    "math": "sdjax.evaluation.tasks.minerva_math:MinervaMath",
    "svamp": "sdjax.evaluation.tasks.svamp:SVAMP",
}
_FILE = "sdjax.evaluation.tasks.questions:Questions"


def find_task(
    name: str,
    *,
    data: str | Path | None = None,
    shots: int | None = None,
    development: int | None = None,
    test: int | None = None,
    **offered: Any,
) -> Task:
    """The task of a name, of a class ("module:Class"), or of a JSONL file.

    Args:
        name: as above.
        data, shots, development, test: settings; None leaves the task's own.
        offered: settings that a task gets if it has them, such as `allow_missing`.

    Raises:
        UserError: no such task, class or file, or a setting that the task does not have.
    """
    wanted = {"data": data, "shots": shots, "development": development, "test": test}
    chosen: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if name in TASKS:
        kind = _imported(TASKS[name])
    elif name.endswith(".jsonl") or Path(name).expanduser().is_file():
        if data is not None:
            raise UserError(f"task {name}: is a file of problems itself; leave its data out")
        kind = _imported(_FILE)
        path = str(Path(name).expanduser().resolve())  # one name, wherever the call is made
        chosen |= {"data": path, "name": path}
    elif ":" in name:
        kind = _imported(name)
    else:
        raise UserError(
            f"task {name!r}: neither a task ({', '.join(TASKS)}) nor a .jsonl file that exists "
            "nor a class (module:Class)"
        )
    known = inspect.signature(kind).parameters
    for key, value in chosen.items():
        if key not in known and value:
            raise UserError(f"task {name}: has no setting {key}; leave it out")
    if "data" in chosen:
        chosen["data"] = Path(chosen["data"])
    return _made(name, kind, {k: v for k, v in {**offered, **chosen}.items() if k in known})


def _imported(path: str) -> type[Task]:
    """The class of "module:Class"; modules in the folder of the call are found too."""
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"task {path}: cannot be imported ({_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"task {path}: must be a subclass of sdjax.evaluation.task.Task")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"task {path}: lacks {missing}; see sdjax.evaluation.task")
    return found


def _made(name: str, kind: type[Task], settings: dict[str, Any]) -> Task:
    """The task; UserError where its class cannot be called so, or lacks what a task has."""
    try:
        task = kind(**settings)
    except UserError:
        raise
    except Exception as error:  # whatever the user's class raises
        raise UserError(f"task {name}: cannot be made ({_line(error)})") from None
    own, stop, longest = (getattr(task, key, None) for key in ("name", "stop", "max_new_tokens"))
    if not isinstance(own, str):
        raise UserError(f"task {name}: name must be a text, not {own!r}; give the class one")
    if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"task {name}: stop must be a tuple of texts, not {stop!r}")
    if not isinstance(longest, int) or longest < 1:
        raise UserError(f"task {name}: max_new_tokens must be 1 or more, not {longest!r}")
    return task


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
