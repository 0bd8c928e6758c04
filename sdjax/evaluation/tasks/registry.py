"""Lookup of tasks by name, by import path of a class, or by JSONL file."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
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
    trust_code: bool = False,
    **optional: Any,
) -> Task:
    """Create a task.

    Args:
        name: name of a task, import path "module:Class", or path of a JSONL file.
        data: file or folder with the problems; None keeps the task's default.
        shots: worked examples before each problem; None keeps the task's default.
        development: number of development problems; None keeps the task's default.
        test: number of test problems; None keeps the task's default.
        trust_code: whether a class may be imported, whose code runs unconfined in this process.
        **optional: settings for tasks that have them, such as `allow_missing`.

    Raises:
        UserError: the task, class or file does not exist, the task does not have a setting, or a
            class is named without `trust_code`.
    """
    options = {"data": data, "shots": shots, "development": development, "test": test}
    settings: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if name in TASKS:
        kind = _import_task(TASKS[name])
    elif name.endswith(".jsonl") or os.path.isfile(os.path.expanduser(name)):
        if data is not None:
            raise UserError(f"task {name}: already a file of problems; remove data")
        kind = _import_task(_FILE_TASK)
        path = os.path.expanduser(name)
        if os.path.exists(path):
            path = os.path.realpath(path)  # the name must not depend on the current folder
        settings |= {"data": path, "name": path}
    elif ":" in name:
        if not trust_code:
            raise UserError(
                f"task {name}: a class, whose code would run outside the sandbox; pass "
                "--trust-code if you trust it (in Python: trust_code=True)"
            )
        kind = _import_task(name)
    else:
        known = f"use one of {', '.join(TASKS)}, an existing .jsonl file, or a class (module:Class)"
        raise UserError(f"unknown task {name!r}: {did_you_mean(name, TASKS, known)}")
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
    """Import the class "module:Class"."""
    module, _, attribute = path.partition(":")
    try:
        with _named_folders_only():
            found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(
            f"task {path}: cannot be imported ({_line(error)}); install it, or name its folder in "
            "PYTHONPATH; the working directory is not searched by itself"
        ) from None
    except Exception as error:  # user code may raise anything
        raise UserError(f"task {path}: cannot be imported ({_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"task {path}: not a subclass of sdjax.evaluation.task.Task")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"task {path}: does not define {missing}; see sdjax.evaluation.task")
    return found


@contextlib.contextmanager
def _named_folders_only() -> Iterator[None]:
    """Leave the working directory out of `sys.path`, unless PYTHONPATH names it.

    Python adds it without a word of the user's, as under `python -m` or if PYTHONPATH has an empty
    entry; a command that is called in a downloaded folder would then import modules from there.
    """
    here = os.path.realpath(os.getcwd())
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    before = sys.path[:]
    if here not in map(os.path.realpath, named):
        sys.path[:] = [entry for entry in before if entry and os.path.realpath(entry) != here]
    try:
        yield
    finally:
        sys.path[:] = before


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
