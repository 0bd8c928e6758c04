"""The results folder of an evaluation.

settings.json   settings of the evaluation, which must be the same when it resumes; the versions
                that it was started with, and accepted changes of them
results.jsonl   one line per graded problem; an interrupted evaluation resumes from it
scores.json     accuracies with 95% intervals, once all problems are graded
eval.lock       lock file held by the process that writes to the folder
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.json import parse_json
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.statistics import accuracy_interval
from sdjax.evaluation.task import Outcome
from sdjax.io.atomic_write import write_file
from sdjax.io.jsonl import read_jsonl
from sdjax.io.links import member
from sdjax.io.resumable_log import ResumableLog

RESULTS, SCORES, LOCK = "results.jsonl", "scores.json", "eval.lock"
METRICS = ("strict", "flexible")
EQUAL_METRICS = "strict and flexible accuracy are equal"


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
        self._log: ResumableLog | None = None
        if folder is None:
            return
        self._log = ResumableLog(
            folder,
            settings,
            file=RESULTS,
            lock=LOCK,
            content="evaluation",
            versions=versions,
            accept_versions=accept_versions,
        )
        try:
            self.by_id = {result.id: result for result in _parse_lines(self._log)}
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def missing(self, prompted: Sequence[PromptedProblem]) -> list[PromptedProblem]:
        """Return the problems without a result.

        Raises:
            UserError: a stored result has a different prompt, question or answer, or results are
                missing and those of the folder were computed under other versions.
        """
        folder = self._log.folder if self._log is not None else None
        for item in prompted:
            result, problem = self.by_id.get(item.problem.id), item.problem
            if result is None:
                continue
            if result.prompt_sha256 != item.sha256:
                raise UserError(
                    f"{folder}: the stored prompt of problem {result.id} is different; use "
                    "the same data, shots and chat, or choose another --out"
                )
            stored = (result.kind, result.question, result.answer)
            if stored != (problem.kind, problem.question, problem.answer):
                raise UserError(
                    f"{folder}: the stored question, answer or kind of problem {result.id} "
                    "is different; use the same data, or choose another --out"
                )
        missing = [item for item in prompted if item.problem.id not in self.by_id]
        if missing and self.by_id and self._log is not None:
            self._log.check_versions()
        return missing

    def add(self, result: ProblemResult) -> None:
        """Append the result of one problem."""
        self.by_id[result.id] = result
        if self._log is not None:
            self._log.append(result.to_json())

    def finish(self, order: Sequence[str]) -> None:
        """Write the scores, and the results sorted by problem.

        Args:
            order: ids of this evaluation's problems; all other results come after them.
        """
        if self._log is None:
            return
        others = [id for id in self.by_id if id not in set(order)]
        results = [self.by_id[id] for id in (*order, *others)]
        self._log.rewrite(result.to_json() for result in results)
        write_file(self._log.folder / SCORES, json.dumps(summarize(results), indent=2) + "\n")


def read_results(path: Path) -> list[ProblemResult]:
    """Read a results file.

    Args:
        path: the file, or the folder that contains it.

    Raises:
        UserError: the file does not exist, or is not a results file.
    """
    file = member(path, RESULTS) if os.path.isdir(path) else path
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


def _parse_lines(log: ResumableLog) -> list[ProblemResult]:
    results = []
    for number, line in enumerate(log.lines, 1):
        where = f"{log.path}, line {number}"
        try:
            results.append(_parse(parse_json(line), where))
        except ValueError:
            raise UserError(f"{where}: not an evaluation result; remove the line") from None
    return results


def _parse(row: Any, where: str) -> ProblemResult:
    types = typing.get_type_hints(ProblemResult)
    if not isinstance(row, dict) or row.keys() != types.keys():
        raise UserError(f"{where}: not an evaluation result; remove the line")
    for name, expected in types.items():
        if not isinstance(row[name], expected):
            label = {str: "a string", bool: "true or false"}.get(expected, "a string or null")
            raise UserError(f"{where}: {name} must be {label}, not {truncated_repr(row[name])}")
    return ProblemResult(**row)
