"""Recorded answers of an endpoint: paid for once, used by each resumed run, and by a replay.

A recording is a JSONL file with one line per answer, or per attempt that may have cost tokens
without one. An answer is found by the digest of its request, which contains everything that the
answer depends on except the address of the endpoint. It contains no key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from sdjax.core.errors import UserError
from sdjax.core.files import read_bytes
from sdjax.core.json import parse_json
from sdjax.core.storage_errors import storage_errors
from sdjax.io.atomic_write import write_file
from sdjax.io.links import check_own_folder

MAX_BYTES = 2_000_000_000
_MAX_TOKENS = 1_000_000_000  # of one answer; a larger number is a mistake of the endpoint
_BUDGET = "the budget was used up"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedAnswer:
    """What came back for a request.

    Attributes:
        request: digest of the request.
        answered: whether this is the answer, rather than an attempt without one.
        text: the text; None if the answer has none.
        stopped: whether the text is complete, rather than cut at the token limit.
        tokens: tokens of prompt and answer as reported, or an upper bound of them.
        problem: reason for a missing answer or text; empty otherwise.
    """

    request: str
    answered: bool = True
    text: str | None = None
    stopped: bool = False
    tokens: int = 0
    problem: str = ""


def request_digest(body: Mapping[str, Any], *sample: str | int) -> str:
    """Return the digest of a request.

    Args:
        body: its JSON body.
        sample: what distinguishes it from requests with the same body, such as its number.
    """
    text = json.dumps([body, *sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Recording:
    """The recorded answers of an endpoint; a context manager while answers are added."""

    def __init__(self, path: Path, *, write: bool) -> None:
        """Read a recording.

        Args:
            path: the file.
            write: whether answers are added. The file need not exist then, and an incomplete last
                line, which a killed process has left, is removed.

        Raises:
            UserError: no such file (without `write`), or a line that is not of a recording.
        """
        self.path = path
        self._write = write
        self._answers: dict[str, RecordedAnswer] = {}
        self._beyond_budget: set[str] = set()
        self.tokens = 0
        content = b""
        if not write or path.exists():
            content = read_bytes(path, MAX_BYTES)
        *lines, incomplete = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._add(_parse(line, f"{path}, line {number}"))
        if incomplete and not write:
            self._add(_parse(incomplete, f"{path}, line {len(lines) + 1}"))
        self._complete_bytes = len(content) - len(incomplete)

    def __enter__(self) -> Self:
        """Open the file for appending."""
        assert self._write
        with storage_errors(self.path):
            check_own_folder(self.path.parent)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                write_file(self.path, b"")
            self._file = self.path.open("r+b")
            self._file.truncate(self._complete_bytes)
            self._file.seek(self._complete_bytes)
        return self

    def __exit__(self, *error: object) -> None:
        with storage_errors(self.path):
            self._file.close()

    def find(self, request: str) -> RecordedAnswer | None:
        """Return the answer to a request; None if it has none."""
        return self._answers.get(request)

    def was_beyond_budget(self, request: str) -> bool:
        """Return whether a request was not made since the budget was used up."""
        return request in self._beyond_budget

    def add(self, answer: RecordedAnswer) -> None:
        """Add a line, which survives the death of this process."""
        fields = {k: v for k, v in dataclasses.asdict(answer).items() if v not in (None, "")}
        with storage_errors(self.path):
            os.stat(self.path)  # writing to a removed file does not fail
            self._file.write(json.dumps(fields).encode() + b"\n")
            self._file.flush()
        self._add(answer)

    def add_beyond_budget(self, request: str) -> None:
        """Note that a request was not made, so that a replay does not make it either."""
        if not self.was_beyond_budget(request):
            self.add(RecordedAnswer(request=request, answered=False, problem=_BUDGET))

    def _add(self, answer: RecordedAnswer) -> None:
        self.tokens += answer.tokens
        if answer.answered:
            self._answers.setdefault(answer.request, answer)
        elif answer.problem == _BUDGET:
            self._beyond_budget.add(answer.request)


def _parse(line: bytes, where: str) -> RecordedAnswer:
    try:
        fields = parse_json(line)
        answer = RecordedAnswer(**fields)
        valid = (
            all(type(value) is str for value in (answer.request, answer.problem))
            and all(type(value) is bool for value in (answer.answered, answer.stopped))
            and (answer.text is None or type(answer.text) is str)
            and type(answer.tokens) is int
            and 0 <= answer.tokens <= _MAX_TOKENS
        )
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise UserError(
            f"{where}: not a recorded answer; give a file that sdjax wrote, or restore it from a "
            "backup"
        )
    return answer
