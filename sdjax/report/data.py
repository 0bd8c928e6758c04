"""Data of a report, read from a run's store: frozen dataclasses for plots, page and terminal.

The run may be unfinished; parts that the store does not contain yet are empty.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from sdjax.core.errors import UserError
from sdjax.io.model_paths import local_model_folder
from sdjax.io.training_programs import read_training_sources
from sdjax.report.ablations import AblationTable, read_ablations
from sdjax.report.controls import ControlRow, control_rows
from sdjax.report.generators import GeneratorRow, generator_rows
from sdjax.report.nearest import Nearest, nearest_texts
from sdjax.report.results import TestRow, final_rows
from sdjax.report.selection import Selection, read_selection
from sdjax.sandbox.verdict import ADMITTED, is_admissible
from sdjax.search.answer import read_answer
from sdjax.search.ranking import (
    best_by_group,
    best_method,
    complete_scores,
    final_ranking,
)
from sdjax.search.run_limits import end_reason
from sdjax.search.score_types import Answer, Application, Comparison, StoredPair
from sdjax.search.store import Store
from sdjax.search.structures import program_scores
from sdjax.search.training_data import TrainingData
from sdjax.search.types import (
    MAIN,
    NOT_JUDGED,
    Entry,
    JudgedSample,
    Lineage,
    Program,
    Setting,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class IterationReport:
    """Statistics of the samples of one iteration.

    Attributes:
        iteration: number of the iteration, starting at 1.
        temperature: sampling temperature; None if it is not recorded.
        samples: number of samples.
        counts: number of samples by status.
        reasons: number of inadmissible samples by reason, such as "refused: import of os", most
            frequent first.
        scores: development scores of the distinct programs that first occurred here; of programs
            that stopped early in a race, over the problems that they have answered.
        sample_mean: mean score of all admissible samples; a duplicate has the score of its
            original.
        unseen: fraction of the novel programs that the generator was not trained on; None if
            unknown.
        held_out: number of novel programs by held-out family.
        training: number of preference pairs, of their texts, and of the texts with each fault;
            see `sdjax.search.training_data.TrainingData`.
    """

    iteration: int
    temperature: float | None
    samples: int
    counts: Mapping[str, int]
    reasons: Mapping[str, int]
    scores: tuple[float, ...]
    sample_mean: float | None
    unseen: float | None
    held_out: Mapping[str, int]
    training: Mapping[str, int]

    @property
    def admissible(self) -> int:
        """Number of admissible samples."""
        return sum(n for status, n in self.counts.items() if is_admissible(status))

    @property
    def novel(self) -> int:
        """Number of distinct programs that first occurred here."""
        return self.counts.get(ADMITTED, 0)

    @property
    def top_mean(self) -> float | None:
        """Mean of the ten best `scores`; None without any."""
        return _mean(sorted(self.scores)[-10:])

    @property
    def unique_scores(self) -> int:
        """Number of different `scores`."""
        return len(set(self.scores))


@dataclass(frozen=True, kw_only=True)
class ReferenceLine:
    """A horizontal line in the plot of development scores."""

    name: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One of the best programs.

    Attributes:
        rank: rank, starting at 1; see `sdjax.search.ranking.final_ranking`.
        name: name of the entry.
        program: the stored program; its source is untrusted and must be escaped.
        sample: the first sample of it; None if it is not the run's own.
        development: development score.
        test: test accuracy by the run's metric; None if the program was not tested.
        change: size of its change to the seed; see `sdjax.search.score_types.Application`.
        nearest: most similar training program, if the generator's training programs are available.
    """

    rank: int
    name: str
    program: Program
    sample: JudgedSample | None
    development: float
    test: float | None
    change: float | None
    nearest: Nearest | None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All data of a report.

    Attributes:
        metric: metric of the run, "strict" or "flexible".
        iterations: the iterations that have samples.
        generators: what each generator has found, if there are several.
        references: reference lines of the plot of development scores.
        tables: final table of each setting that was tested.
        best_method: entry name of the best human-designed method; see
            `sdjax.search.ranking.best_method`.
        min_change: programs that change the seed by less than this are flagged.
        best: the best programs.
        missing: sentences about results that do not exist yet.
        answer: the run's answer, see `sdjax.search.answer`; None if it has none yet.
        comparisons: comparisons of all tested programs with a control, best program first.
        controls: what the search and its controls have spent and reached.
        ablations: contribution of each part of the best programs.
        selection: how much selection by development score overestimates.
    """

    metric: str
    iterations: tuple[IterationReport, ...]
    generators: tuple[GeneratorRow, ...]
    references: tuple[ReferenceLine, ...]
    tables: Mapping[str, tuple[TestRow, ...]]
    best_method: str | None
    min_change: float
    best: tuple[ProgramReport, ...]
    missing: tuple[str, ...]
    answer: Answer | None
    comparisons: tuple[Comparison, ...]
    controls: tuple[ControlRow, ...]
    ablations: tuple[AblationTable, ...]
    selection: Selection


def read_report(store: Store) -> ReportData:
    """Read all data of a report from a run's store."""
    metric = _config_value(store, "task", "metric", default="strict")
    metric = metric if metric in ("strict", "flexible") else "strict"
    scores = complete_scores(store, metric)
    tables = {
        setting.name: final_rows(store, setting.name, metric) for setting in store.select(Setting)
    }
    tables = {setting: rows for setting, rows in tables.items() if rows}
    judged = store.judged()
    by_identity = program_scores(store, metric)
    iterations = _iterations(store, judged, by_identity)
    top_k = _config_value(store, "test", "top_k", default=15)
    answer, comparisons = read_answer(store, metric)
    return ReportData(
        metric=metric,
        iterations=iterations,
        generators=generator_rows(judged, by_identity),
        references=_reference_lines(store, scores),
        tables=tables,
        best_method=best_method(store, metric),
        min_change=_config_value(store, "selection", "min_change", default=0.0),
        best=_best_programs(store, judged, scores, metric, tables.get(MAIN, ()), top_k),
        missing=(
            *_missing(store, _config_value(store, "iterations", default=0), iterations, tables),
            *_no_answer(answer, tables.get(MAIN, ())),
        ),
        answer=answer,
        comparisons=comparisons,
        controls=control_rows(store, metric),
        ablations=read_ablations(store, metric),
        selection=read_selection(store, metric),
    )


def _iterations(
    store: Store, judged: Sequence[JudgedSample], scores: Mapping[str, float]
) -> tuple[IterationReport, ...]:
    programs = store.by_key(Program)
    temperatures = {lineage.iteration: lineage.temperature for lineage in store.select(Lineage)}
    by_iteration = defaultdict(list)
    for sample in judged:
        by_iteration[sample.iteration].append(sample)
    reports = []
    for iteration, samples in sorted(by_iteration.items()):
        reasons = Counter(
            f"{s.status}: {s.rule}" if s.rule and s.rule != s.status else s.status
            for s in samples
            if not s.admissible and s.status != NOT_JUDGED
        )
        novel = [programs[s.identity] for s in samples if s.novel and s.identity in programs]
        novel_scores = [scores.get(program.identity) for program in novel]
        sample_scores = [scores.get(s.identity or "") for s in samples if s.admissible]
        in_training = [p.in_training for p in novel if p.in_training is not None]
        reports.append(
            IterationReport(
                iteration=iteration,
                temperature=temperatures.get(iteration),
                samples=len(samples),
                counts=dict(Counter(sample.status for sample in samples)),
                reasons=dict(reasons.most_common()),
                scores=tuple(score for score in novel_scores if score is not None),
                sample_mean=_mean([score for score in sample_scores if score is not None]),
                unseen=1 - fmean(in_training) if in_training else None,
                held_out=dict(Counter(f for p in novel for f in p.held_out or ())),
                training=TrainingData(
                    pairs=store.select(StoredPair, iteration=iteration)
                ).summary(),
            )
        )
    return tuple(reports)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _config_value(store: Store, *keys: str, default: T) -> T:
    """Return a value of the run's config; the default if it is missing or of another type.

    A report is also written for a run whose config this version of sdjax does not accept.
    """
    value: Any = store.run().config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if type(value) is type(default) else default


def _reference_lines(store: Store, scores: Mapping[str, float]) -> tuple[ReferenceLine, ...]:
    """Return the scores of the seed, the best expert and the best method of each grid."""
    groups = [
        (group, name) for name, entry in store.by_key(Entry).items() for group in _groups(entry)
    ]
    best = best_by_group(groups, scores)
    return tuple(ReferenceLine(name=group, score=scores[name]) for group, name in best.items())


def _groups(entry: Entry) -> list[str]:
    match entry.kind:
        case "seed":
            return ["seed"]
        case "expert":
            return ["best expert"]
        case "method":
            grids = entry.detail.get("grids", [])
            grids = grids if isinstance(grids, list) else []
            return [f"best method, {grid} grid" for grid in grids] or ["best method"]
    return []


def _best_programs(
    store: Store,
    judged: Sequence[JudgedSample],
    scores: Mapping[str, float],
    metric: str,
    rows: Sequence[TestRow],
    top_k: int,
) -> tuple[ProgramReport, ...]:
    first: dict[str | None, JudgedSample] = {}
    for sample in judged:
        if sample.novel:
            first.setdefault(sample.identity, sample)
    programs, applications = store.by_key(Program), store.by_key(Application, setting=MAIN)
    tested = {row.name: row.accuracy(metric).mean for row in rows}
    entries = final_ranking(store, metric)[:top_k]
    best = {entry.name: programs[entry.identity or ""] for entry in entries}
    sampled = {entry.name: entry.detail.get("tuned_from", entry.identity) for entry in entries}
    nearest = _nearest(store, {name: program.source for name, program in best.items()})
    return tuple(
        ProgramReport(
            rank=rank,
            name=name,
            program=program,
            sample=first.get(sampled[name]),
            development=scores[name],
            test=tested.get(name),
            change=applications[name].change if name in applications else None,
            nearest=nearest.get(name),
        )
        for rank, (name, program) in enumerate(best.items(), 1)
    )


def _nearest(store: Store, sources: Mapping[str, str]) -> dict[str, Nearest]:
    """Return the most similar training programs, if the first generator's folder lists any."""
    config = store.run().config
    name = config.get("generator") or config.get("seed")
    folder = local_model_folder(name) if isinstance(name, str) else None
    if folder is None:
        return {}
    try:
        training = read_training_sources(folder)
    except UserError:
        return {}
    return nearest_texts(sources, training or ())


def _no_answer(answer: Answer | None, rows: Sequence[TestRow]) -> list[str]:
    """Return why there is no answer although programs have been tested."""
    if answer is not None or not any(row.kind == "program" for row in rows):
        return []
    return [
        "There is no answer: no control has been tested that has at most as many numbers as "
        "the best program."
    ]


def _missing(
    store: Store,
    total: int,
    iterations: Sequence[IterationReport],
    tables: Mapping[str, Sequence[TestRow]],
) -> tuple[str, ...]:
    """Return sentences about results that a reader may expect but that do not exist yet."""
    sentences = []
    with contextlib.suppress(UserError):  # a config that this version cannot read
        if reason := end_reason(store.config(), store):
            sentences.append(f"The search ended early, by {reason}.")
    if store.run().finished_at is None:
        sentences.append("The run is unfinished; these are the results so far.")
    if not iterations:
        sentences.append("No program has been sampled yet.")
    elif len(iterations) < total:
        sentences.append(f"{len(iterations)} of {total} iterations have started.")
    waiting = sum(iteration.counts.get(NOT_JUDGED, 0) for iteration in iterations)
    if waiting:
        sentences.append(f"{waiting} samples have not been judged yet.")
    if not tables:
        sentences.append("Nothing has been scored on the test problems yet.")
    elif not any(row.kind == "seed" for rows in tables.values() for row in rows):
        sentences.append("The seed has not been tested, so differences from it are not shown.")
    return tuple(sentences)
