"""Lookup of tasks by name, by import path of a class, or by JSONL file."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError, did_you_mean
from sdjax.evaluation.task import Task

TASKS = {
    "arithmetic": "sdjax.evaluation.tasks.arithmetic:ArithmeticTask",
    "gsm8k": "sdjax.evaluation.tasks.gsm8k:GSM8K",
    "math": "sdjax.evaluation.tasks.minerva_math:MinervaMath",
    "svamp": "sdjax.evaluation.tasks.svamp:SVAMP",
}
_FILE_TASK = "sdjax.evaluation.tasks.questions:Questions"


def find_task(
    name: str,
    *,
    data: str | Path | None = None,
    shots: int | None = None,
    development: int | None = None,
    test: int | None = None,
    **optional: Any,
) -> Task:
    """Create a task.

    Args:
        name: name of a task, import path "module:Class", or path of a JSONL file.
        data: file or folder with the problems; None keeps the task's default.
        shots: worked examples before each problem; None keeps the task's default.
        development: number of development problems; None keeps the task's default.
        test: number of test problems; None keeps the task's default.
        **optional: settings for tasks that have them, such as `allow_missing`.

    Raises:
        UserError: the task, class or file does not exist, or the task does not have a setting.
    """
    options = {"data": data, "shots": shots, "development": development, "test": test}
    settings: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if name in TASKS:
        kind = _import_task(TASKS[name])
    elif name.endswith(".jsonl") or Path(name).expanduser().is_file():
        if data is not None:
            raise UserError(f"task {name}: already a file of problems; remove data")
        kind = _import_task(_FILE_TASK)
        path = str(
            Path(name).expanduser().resolve()
        )  # the name must not depend on the current folder
        settings |= {"data": path, "name": path}
    elif ":" in name:
        kind = _import_task(name)
    else:
        raise UserError(
            f"unknown task {name!r}: {did_you_mean(name, TASKS)}use one of {', '.join(TASKS)}, an "
            "existing .jsonl file, or a class (module:Class)"
        )
    parameters = inspect.signature(kind).parameters
    for key, value in settings.items():
        if key not in parameters and value:
            raise UserError(f"task {name}: unknown setting {key}; remove it")
    if "data" in settings:
        settings["data"] = Path(settings["data"])
    return _create(
        name, kind, {k: v for k, v in {**optional, **settings}.items() if k in parameters}
    )


def _import_task(path: str) -> type[Task]:
    """Import the class "module:Class"; modules in the current folder are also found."""
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # user code may raise anything
        raise UserError(f"task {path}: cannot be imported ({_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"task {path}: not a subclass of sdjax.evaluation.task.Task")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"task {path}: does not define {missing}; see sdjax.evaluation.task")
    return found


def _create(name: str, kind: type[Task], settings: dict[str, Any]) -> Task:
    """Create the task and check its attributes."""
    try:
        task = kind(**settings)
    except UserError:
        raise
    except Exception as error:  # user code may raise anything
        raise UserError(f"task {name}: cannot be created ({_line(error)})") from None
    task_name, stop, max_new_tokens = (
        getattr(task, key, None) for key in ("name", "stop", "max_new_tokens")
    )
    if not isinstance(task_name, str):
        raise UserError(
            f"task {name}: name must be a string, not {task_name!r}; define it in the class"
        )
    if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"task {name}: stop must be a tuple of strings, not {stop!r}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"task {name}: max_new_tokens must be 1 or more, not {max_new_tokens!r}")
    return task


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
