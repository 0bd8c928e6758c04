"""Data sources of tasks: the user's JSONL files, or the Hugging Face Hub.

--data gsm8k_test.jsonl    the test problems; gsm8k_train.jsonl next to it has worked examples
--data FOLDER              contains test.jsonl and, optionally, train.jsonl
(no --data)                the hub, through the `datasets` library; needs a network or its cache
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.io.hub import HubError, load_dataset
from sdjax.io.jsonl import read_jsonl
from sdjax.io.links import member

TRAIN, TEST = "train", "test"


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset on the Hugging Face Hub.

    Attributes:
        path: owner and name.
        configs: configurations of the dataset, concatenated in this order.
    """

    path: str
    configs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """One row of a dataset.

    Attributes:
        values: field name to value.
        where: file and line, or dataset and row, for error messages.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, field: str) -> str:
        """Return a field as text; integral numbers have no decimal point.

        Args:
            field: name of the field.

        Raises:
            UserError: the value is neither a non-empty string nor a number.
        """
        value = self.values[field]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
            raise UserError(f"{self.where}: the field {field} must be a string or a number")
        return str(value)


def read_rows(
    task: str, data: Path | None, hub: HubDataset | None, split: str, fields: Sequence[str]
) -> list[DataRow]:
    """Return the rows of a split, or an empty list if the user's data has no train split.

    Args:
        task: name of the task, for error messages.
        data: the user's file or folder, or None for the hub.
        hub: dataset on the hub, if the task has one.
        split: "test" or "train".
        fields: fields that every row must have.

    Raises:
        UserError: the file does not exist, is empty or has an invalid line, or the hub cannot be
            reached.
    """
    if data is None:
        if hub is None:
            raise UserError(
                f"task {task}: no data; pass --data PATH, or set task.data in the config"
            )
        return _read_hub(task, hub, split, fields)
    path = _split_file(data, split)
    if path is None:
        if split == TRAIN:
            return []
        raise UserError(f"{data}: not a file, and not a folder that contains {TEST}.jsonl")
    rows = [
        DataRow(values=values, where=f"{path}, line {number}")
        for number, values in read_jsonl(path, fields)
    ]
    if not rows:
        raise UserError(f"{path}: contains no problems; write one JSON object per line")
    return rows


def _split_file(data: Path, split: str) -> Path | None:
    """Return the user's file of a split, if it exists."""
    data = Path(os.path.expanduser(data))
    if os.path.isdir(data):
        path = member(data, f"{split}.jsonl")
    elif split == TEST:
        path = data
    else:
        name = data.name.replace(TEST, TRAIN)
        if name == data.name:
            return None
        path = member(data.parent, name)
    return path if os.path.isfile(path) else None


def _read_hub(task: str, hub: HubDataset, split: str, fields: Sequence[str]) -> list[DataRow]:
    rows = []
    for config in hub.configs:
        try:
            part = load_dataset(hub.path, config, split=split)
        except HubError as error:
            raise UserError(
                f"task {task}: {hub.path} cannot be loaded from the Hugging Face Hub ({error}); "
                "without a network, pass a file with --data PATH, or set task.data in the config"
            ) from None
        for index, values in enumerate(part):
            where = f"{hub.path} ({config}, {split}), row {index}"
            if missing := [field for field in fields if field not in values]:
                raise UserError(
                    f"{where}: missing field {missing[0]}; the fields are {', '.join(values)}"
                )
            rows.append(DataRow(values=values, where=where))
    return rows
