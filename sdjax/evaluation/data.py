"""Where a task's problems come from: a JSONL file or folder of the user's, or the Hugging Face hub.

--data gsm8k_test.jsonl    the test problems; worked examples are in gsm8k_train.jsonl beside it
--data FOLDER              holding test.jsonl and perhaps train.jsonl
(nothing)                  the hub, through `datasets`, where there is a network
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.io.jsonl import read_jsonl

TRAIN, TEST = "train", "test"


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the hub. `configs`: its parts, which are joined in this order."""

    path: str
    configs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row and where it stands, for messages."""

    values: Mapping[str, Any]
    where: str

    def text(self, field: str) -> str:
        """A field as a text; numbers that are whole without a point. UserError where it is none."""
        value = self.values[field]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
            raise UserError(f"{self.where}: the field {field} must be a text or a number")
        return str(value)


def read_rows(
    task: str, data: Path | None, hub: Hub | None, split: str, fields: Sequence[str]
) -> list[Row]:
    """The rows of the "test" or "train" split; none where a user's data have no train split.

    Raises:
        UserError: no such file, one that holds nothing, a line that is not JSON or lacks a field,
            or no network where there is no file.
    """
    if data is None:
        if hub is None:
            raise UserError(f"task {task}: needs a file; give it by --data PATH or task.data")
        return _from_hub(task, hub, split, fields)
    path = _file(data, split)
    if path is None:
        if split == TRAIN:
            return []
        raise UserError(f"{data}: no such file, and no folder with {TEST}.jsonl; give either")
    rows = [
        Row(values=values, where=f"{path}, line {number}")
        for number, values in read_jsonl(path, fields)
    ]
    if not rows:
        raise UserError(f"{path}: holds no problem; write one JSON object a line")
    return rows


def _file(data: Path, split: str) -> Path | None:
    """The user's file of a split."""
    data = data.expanduser()
    if data.is_dir():
        path = data / f"{split}.jsonl"
    elif split == TEST:
        path = data
    else:
        path = data.with_name(data.name.replace(TEST, TRAIN))
        if path == data:
            return None
    return path if path.is_file() else None


def _from_hub(task: str, hub: Hub, split: str, fields: Sequence[str]) -> list[Row]:
    import datasets

    rows = []
    for config in hub.configs:
        try:
            part = datasets.load_dataset(hub.path, config, split=split)
        except Exception as error:  # whatever a network, a cache or a parser may raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"task {task}: {hub.path} cannot be loaded from the Hugging Face hub ({reason}); "
                "without a network give a file: --data PATH, or task.data of a configuration"
            ) from None
        for index, values in enumerate(part):
            where = f"{hub.path} ({config}, {split}), row {index}"
            if missing := [field for field in fields if field not in values]:
                raise UserError(f"{where}: has no field {missing[0]}; it has: {', '.join(values)}")
            rows.append(Row(values=values, where=where))
    return rows
