"""The results folder of an evaluation.

settings.json   settings of the evaluation, which must be the same when it resumes; the versions
                that it was started with, and accepted changes of them
results.jsonl   one line per graded problem; an interrupted evaluation resumes from it
scores.json     accuracies with 95% intervals, once all problems are graded
eval.lock       lock file held by the process that writes to the folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from sdjax.core.errors import UserError
from sdjax.core.storage_errors import storage_errors
from sdjax.core.versions import version_differences
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.statistics import accuracy_interval
from sdjax.evaluation.task import Outcome
from sdjax.io.atomic_write import partial_path, write_file
from sdjax.io.jsonl import read_jsonl
from sdjax.io.lock import lock_folder
from sdjax.io.safetensors_reader import read_json

SETTINGS, RESULTS, SCORES, LOCK = "settings.json", "results.jsonl", "scores.json", "eval.lock"
METRICS = ("strict", "flexible")
EQUAL_METRICS = "strict and flexible accuracy are equal"
_VERSIONS, _ACCEPTED = "versions", "accepted"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """A line of results.jsonl: a problem and its outcome.

    Attributes:
        id: unique in the task.
        kind: kind of the problem.
        question: text of the question.
        answer: the correct answer.
        prompt_sha256: hexadecimal hash of the prompt.
        output: the model's output.
        strict_answer: answer that the strict metric extracted, if any.
        flexible_answer: answer that the flexible metric extracted, if any.
        strict: whether the strict answer is correct.
        flexible: whether the flexible answer is correct.
        failure: why the problem counts as wrong without being graded, if so.
    """

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
    def create(cls, prompted: PromptedProblem, outcome: Outcome) -> ProblemResult:
        """Combine a problem with its outcome."""
        fields = dataclasses.asdict(outcome)
        fields["id"] = fields.pop("problem_id")
        problem = prompted.problem
        return cls(
            kind=problem.kind,
            question=problem.question,
            answer=problem.answer,
            prompt_sha256=prompted.sha256,
            **fields,
        )

    def to_json(self) -> str:
        """Return the line of results.jsonl."""
        return json.dumps(dataclasses.asdict(self))


class ResultsFolder:
    """Results of an evaluation, kept in memory and, if there is a folder, on disk.

    Attributes:
        by_id: results by problem id, including those of an interrupted evaluation.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        *,
        versions: Mapping[str, str] | None = None,
        accept_versions: bool = False,
    ) -> None:
        """Open or create the folder.

        Args:
            folder: the folder, or None to keep results in memory only.
            settings: everything that the results depend on.
            versions: versions of packages, which `missing` compares with those of the folder.
            accept_versions: continue although versions differ, and record the difference.

        Raises:
            UserError: the folder contains something else or an evaluation with different settings,
                or another process is writing to it.
        """
        self.by_id: dict[str, ProblemResult] = {}
        self._folder = folder
        self._file: IO[str] | None = None
        self._settings = dict(settings)
        self._versions = dict(versions or {})
        self._accept_versions = accept_versions
        self._stored: dict[str, Any] = {_VERSIONS: self._versions, _ACCEPTED: []}
        self._resources = contextlib.ExitStack()
        if folder is None:
            return
        with contextlib.ExitStack() as resources, storage_errors(folder):
            if not _is_usable(folder):
                raise UserError(
                    f"{folder}: not empty, and not a results folder; choose another --out"
                )
            folder.mkdir(parents=True, exist_ok=True)
            resources.callback(lock_folder(folder, LOCK).release)
            if (folder / SETTINGS).is_file():
                stored = read_json(folder / SETTINGS)
                self._stored = {  # sdjax 0.2 stored no versions
                    _VERSIONS: stored.pop(_VERSIONS, {}),
                    _ACCEPTED: stored.pop(_ACCEPTED, []),
                }
                _check_settings(folder, stored, settings)
                self.by_id = {result.id: result for result in _read_truncated(folder / RESULTS)}
            self._write_settings(folder)
            _write_lines(folder / RESULTS, (result.to_json() for result in self.by_id.values()))
            self._file = resources.enter_context((folder / RESULTS).open("a", encoding="utf-8"))
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with storage_errors(self._folder or ""):
            self._resources.close()

    def missing(self, prompted: Sequence[PromptedProblem]) -> list[PromptedProblem]:
        """Return the problems without a result.

        Raises:
            UserError: a stored result has a different prompt, question or answer, or results are
                missing and those of the folder were computed under other versions.
        """
        for item in prompted:
            result, problem = self.by_id.get(item.problem.id), item.problem
            if result is None:
                continue
            if result.prompt_sha256 != item.sha256:
                raise UserError(
                    f"{self._folder}: the stored prompt of problem {result.id} is different; use "
                    "the same data, shots and chat, or choose another --out"
                )
            stored = (result.kind, result.question, result.answer)
            if stored != (problem.kind, problem.question, problem.answer):
                raise UserError(
                    f"{self._folder}: the stored question, answer or kind of problem {result.id} "
                    "is different; use the same data, or choose another --out"
                )
        missing = [item for item in prompted if item.problem.id not in self.by_id]
        if missing and self.by_id:
            self._check_versions()
        return missing

    def _check_versions(self) -> None:
        """Raise UserError if versions differ from those of the folder and are not accepted."""
        changes = version_differences(self._stored[_VERSIONS], self._versions)
        if not changes or self._folder is None:
            return
        if not self._accept_versions:
            raise UserError(
                f"{self._folder}: started differently: {', '.join(changes)}; so its results may "
                "differ from those to come; go back to what it was started with, accept this with "
                "--accept-versions, or choose another --out"
            )
        logger.warning("resuming with other versions: %s", ", ".join(changes))
        accepted = [*self._stored[_ACCEPTED], *changes]
        self._stored = {_VERSIONS: self._versions, _ACCEPTED: accepted}
        with storage_errors(self._folder):
            self._write_settings(self._folder)

    def _write_settings(self, folder: Path) -> None:
        content = json.dumps(self._settings | self._stored, indent=2)
        _write_lines(folder / SETTINGS, [content])

    def add(self, result: ProblemResult) -> None:
        """Append the result of one problem."""
        self.by_id[result.id] = result
        if self._folder is not None:
            with storage_errors(self._folder):
                os.stat(self._folder / RESULTS)  # writing to a removed file does not fail
                print(result.to_json(), file=self._file, flush=True)

    def finish(self, order: Sequence[str]) -> None:
        """Write the scores, and the results sorted by problem.

        Args:
            order: ids of this evaluation's problems; all other results come after them.
        """
        if self._folder is None:
            return
        others = [id for id in self.by_id if id not in set(order)]
        results = [self.by_id[id] for id in (*order, *others)]
        with storage_errors(self._folder):
            _write_lines(self._folder / RESULTS, (result.to_json() for result in results))
            _write_lines(self._folder / SCORES, [json.dumps(summarize(results), indent=2)])


def read_results(path: Path) -> list[ProblemResult]:
    """Read a results file.

    Args:
        path: the file, or the folder that contains it.

    Raises:
        UserError: the file does not exist, or is not a results file.
    """
    file = path / RESULTS if path.is_dir() else path
    names = [field.name for field in dataclasses.fields(ProblemResult)]
    rows = read_jsonl(file, names)
    if not rows:
        raise UserError(f"{file}: contains no results")
    return [
        _parse({name: row[name] for name in names}, f"{file}, line {number}")
        for number, row in rows
    ]


def summarize(results: Sequence[ProblemResult]) -> dict[str, Any]:
    """Return the content of scores.json: accuracies with intervals, and failures."""
    summary: dict[str, Any] = {"problems": len(results)}
    for metric in METRICS:
        interval = accuracy_interval([getattr(result, metric) for result in results])
        summary[metric] = dataclasses.asdict(interval)
    return summary | {"failures": count_failures(results)}


def count_failures(results: Sequence[ProblemResult]) -> dict[str, int]:
    """Return the number of failed problems by reason; all overlong prompts share one reason."""
    counts: dict[str, int] = {}
    for result in results:
        if result.failure is not None:
            too_long = result.failure.startswith("the prompt has ")
            reason = "the prompt is too long" if too_long else result.failure
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def _is_usable(folder: Path) -> bool:
    """Return whether the folder is missing, empty, or contains an evaluation."""
    if not folder.is_dir():
        return not folder.exists()
    # Files left by an evaluation that was killed during startup.
    leftovers = {LOCK, partial_path(folder / SETTINGS).name}
    return (folder / SETTINGS).is_file() or {path.name for path in folder.iterdir()} <= leftovers


def _check_settings(folder: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for key in stored:  # version 0.2.0 stored no dtype
        if stored.get(key) != settings.get(key):
            raise UserError(
                f"{folder}: contains an evaluation with {key} = {stored.get(key)!r}, not "
                f"{settings.get(key)!r}; choose another --out"
            )


def _read_truncated(path: Path) -> list[ProblemResult]:
    """Read a file whose last line may be incomplete."""
    content = path.read_bytes() if path.exists() else b""
    results = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        where = f"{path}, line {number}"
        try:
            results.append(_parse(json.loads(line), where))
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not an evaluation result; remove the line") from None
    return results


def _parse(row: Any, where: str) -> ProblemResult:
    types = typing.get_type_hints(ProblemResult)
    if not isinstance(row, dict) or row.keys() != types.keys():
        raise UserError(f"{where}: not an evaluation result; remove the line")
    for name, expected in types.items():
        if not isinstance(row[name], expected):
            label = {str: "a string", bool: "true or false"}.get(expected, "a string or null")
            raise UserError(f"{where}: {name} must be {label}, not {row[name]!r}")
    return ProblemResult(**row)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_file(path, "".join(f"{line}\n" for line in lines))
