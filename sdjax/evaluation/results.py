"""The folder of an evaluation: its settings, one line a problem, and the scores.

settings.json   what decides the results; another evaluation may not go on in this folder
results.jsonl   a line as soon as a problem is graded; whoever is interrupted, or killed, goes on
                with the problems that have none
scores.json     accuracies with 95 % intervals, once all problems are there
eval.lock       held by the one process that writes here
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sdjax.core.errors import UserError
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.statistics import accuracy_interval
from sdjax.evaluation.task import Outcome
from sdjax.io.atomic_write import partial_path, write_file
from sdjax.io.jsonl import read_jsonl
from sdjax.io.lock import lock_folder
from sdjax.io.safetensors_reader import read_json

SETTINGS, RESULTS, SCORES, LOCK = "settings.json", "results.jsonl", "scores.json", "eval.lock"
READINGS = ("strict", "flexible")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One problem of results.jsonl: what was asked (the prompt by its hash), and the outcome."""

    id: str
    kind: str
    question: str
    answer: str
    prompt_sha256: str
    output: str
    strict_answer: str | None
    flexible_answer: str | None
    strict: bool
    flexible: bool
    failure: str | None

    @classmethod
    def of(cls, asked: PromptedProblem, outcome: Outcome) -> Line:
        fields = dataclasses.asdict(outcome)
        fields["id"] = fields.pop("problem_id")
        problem = asked.problem
        return cls(
            kind=problem.kind,
            question=problem.question,
            answer=problem.answer,
            prompt_sha256=asked.sha256,
            **fields,
        )


class Results:
    """The lines of an evaluation; in a folder, those that an interrupted one has left too.

    Attributes:
        lines: what is known, by problem.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]):
        """Raises UserError where the folder holds something else or other settings, or another
        process is writing it."""
        self.lines: dict[str, Line] = {}
        self._folder = folder
        self._file: IO[str] | None = None
        self._open = contextlib.ExitStack()
        if folder is None:
            return
        with contextlib.ExitStack() as opened, _writing(folder):
            if not _ours(folder):
                raise UserError(f"{folder}: is not empty and no evaluation; choose another --out")
            folder.mkdir(parents=True, exist_ok=True)
            opened.callback(lock_folder(folder, LOCK).release)
            if (folder / SETTINGS).is_file():
                _check(folder, settings)
                self.lines = {line.id: line for line in _read_torn(folder / RESULTS)}
            _replace(folder / SETTINGS, [json.dumps(settings, indent=2)])
            _replace(folder / RESULTS, map(_json, self.lines.values()))
            self._file = opened.enter_context((folder / RESULTS).open("a", encoding="utf-8"))
            self._open = opened.pop_all()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def missing(self, asked: Sequence[PromptedProblem]) -> list[PromptedProblem]:
        """The problems without a line. UserError where a line is of another prompt or answer."""
        for one in asked:
            line, problem = self.lines.get(one.problem.id), one.problem
            if line is None:
                continue
            if line.prompt_sha256 != one.sha256:
                raise UserError(
                    f"{self._folder}: its evaluation puts problem {line.id} by another prompt; "
                    "keep data, shots and chat as they were, or choose another --out"
                )
            told = (line.kind, line.question, line.answer)
            if told != (problem.kind, problem.question, problem.answer):
                raise UserError(
                    f"{self._folder}: its evaluation has another question, answer or kind of "
                    f"problem {line.id}; keep the data as they were, or choose another --out"
                )
        return [one for one in asked if one.problem.id not in self.lines]

    def add(self, line: Line) -> None:
        """Keeps one problem's line at once."""
        self.lines[line.id] = line
        if self._folder is not None:
            with _writing(self._folder):
                print(_json(line), file=self._file, flush=True)

    def finish(self, order: Sequence[str]) -> None:
        """Writes the lines in the order of the problems, those of earlier calls behind them."""
        if self._folder is None:
            return
        rest = [id for id in self.lines if id not in set(order)]
        lines = [self.lines[id] for id in (*order, *rest)]
        with _writing(self._folder):
            _replace(self._folder / RESULTS, map(_json, lines))
            _replace(self._folder / SCORES, [json.dumps(scores(lines), indent=2)])


def read_results(path: Path) -> list[Line]:
    """The lines of a results file or of the folder that it is in. UserError where it is none."""
    file = path / RESULTS if path.is_dir() else path
    names = [field.name for field in dataclasses.fields(Line)]
    rows = read_jsonl(file, names)
    if not rows:
        raise UserError(f"{file}: holds no result")
    return [_line({n: row[n] for n in names}, f"{file}, line {at}") for at, row in rows]


def scores(lines: Sequence[Line]) -> dict[str, Any]:
    """Accuracies by reading with their intervals, and how often what failed."""
    found: dict[str, Any] = {"problems": len(lines)}
    for reading in READINGS:
        interval = accuracy_interval([getattr(line, reading) for line in lines])
        found[reading] = dataclasses.asdict(interval)
    return found | {"failures": failures(lines)}


def failures(lines: Sequence[Line]) -> dict[str, int]:
    """Reason to the number of problems that count as wrong for it; a prompt's length left out."""
    found: dict[str, int] = {}
    for line in lines:
        if line.failure is not None:
            long = line.failure.startswith("the prompt has ")
            reason = "the prompt is too long" if long else line.failure
            found[reason] = found.get(reason, 0) + 1
    return found


def _ours(folder: Path) -> bool:
    """Whether an evaluation is in the folder, or may begin there."""
    if not folder.is_dir():
        return not folder.exists()
    first = {LOCK, partial_path(folder / SETTINGS).name}  # of one that was killed as it began
    return (folder / SETTINGS).is_file() or {path.name for path in folder.iterdir()} <= first


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); mend that, or choose another --out"
        ) from None


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    kept = read_json(folder / SETTINGS)
    for key in {**kept, **settings}:
        if kept.get(key) != settings.get(key):
            raise UserError(
                f"{folder}: its evaluation has {key} = {kept.get(key)!r}, not "
                f"{settings.get(key)!r}; choose another --out"
            )


def _read_torn(path: Path) -> list[Line]:
    """The lines of a file that may end in one that was cut short."""
    whole = path.read_bytes() if path.exists() else b""
    found = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        where = f"{path}, line {number}"
        try:
            found.append(_line(json.loads(line), where))
        except (ValueError, RecursionError):
            raise UserError(f"{where}: no result of an evaluation; remove the line") from None
    return found


def _line(row: Any, where: str) -> Line:
    """UserError for what is no line of results."""
    wanted = typing.get_type_hints(Line)
    if not isinstance(row, dict) or row.keys() != wanted.keys():
        raise UserError(f"{where}: no result of an evaluation; remove the line")
    for name, kind in wanted.items():
        if not isinstance(row[name], kind):
            raise UserError(f"{where}: {name} is {row[name]!r}; it must be {_words(kind)}")
    return Line(**row)


def _words(kind: Any) -> str:
    return {str: "text", bool: "true or false"}.get(kind, "text or null")


def _replace(path: Path, lines: Iterable[str]) -> None:
    write_file(path, "".join(f"{line}\n" for line in lines))


def _json(line: Line) -> str:
    return json.dumps(dataclasses.asdict(line))
