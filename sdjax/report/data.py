"""What a report says, read from a run's store: plain frozen data for plots, page and terminal.

Nothing here needs a finished run: what the store does not hold yet is empty.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from sdjax.core.errors import UserError
from sdjax.evaluation.statistics import Interval, accuracy_interval, paired_by_key
from sdjax.io.model_paths import model_folder
from sdjax.io.training_programs import read_training_sources
from sdjax.report.nearest import Nearest, nearest_texts
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    MAIN,
    TEST,
    Candidate,
    Program,
    Summary,
    program_candidate,
)

KINDS = ("seed", "expert", "method", "control", "program")


@dataclass(frozen=True, kw_only=True)
class IterationReport:
    """One iteration's samples.

    counts: status -> samples; reasons: what decided ("refused: import of os") -> samples that are
    not admissible; scores: of the distinct programs first seen here; sample_mean: mean over all
    admissible samples, a duplicate having its original's score; unseen: share of the novel
    programs that were not among the generator's training programs, None where nobody looked.
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
    pairs: int

    @property
    def admissible(self) -> int:
        return self.counts.get("admitted", 0) + self.counts.get("duplicate", 0)

    @property
    def novel(self) -> int:
        return self.counts.get("admitted", 0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate on the test problems, and differences paired by problem.

    strict_gain, flexible_gain: from the seed. method_gain: by the run's metric, of a program, from
    the human-designed method that did best on the development problems.
    """

    name: str
    kind: str
    development: float | None
    problems: int
    strict: Interval
    flexible: Interval
    strict_gain: Interval | None
    flexible_gain: Interval | None
    method_gain: Interval | None


@dataclass(frozen=True, kw_only=True)
class ReferenceLine:
    """A horizontal line to compare programs with, on the development problems."""

    name: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One of the best programs, with its source (hostile text: escape it).

    nearest: of the programs that its generator was trained on, where its seed tells them.
    """

    rank: int
    name: str
    program: Program
    iteration: int | None
    development: float
    test: float | None
    change: float | None
    nearest: Nearest | None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A whole report.

    tables: a final table for each setting that was tested. min_change: what changes the seed less,
    relative to the experts' mean norm, is flagged.
    """

    metric: str
    iterations: tuple[IterationReport, ...]
    levels: tuple[ReferenceLine, ...]
    tables: Mapping[str, tuple[Row, ...]]
    best_method: str | None
    min_change: float
    best: tuple[ProgramReport, ...]
    missing: tuple[str, ...]


def read_contents(store: Store) -> ReportData:
    """Reads everything that a report shows."""
    config = store.run().config
    metric = config.get("task", {}).get("metric", "strict")
    development = {one.candidate: one for one in store.summaries(DEVELOPMENT) if one.complete}
    scores = {name: getattr(one, metric) for name, one in development.items()}
    tables = {}
    for setting in [one.name for one in store.settings()]:
        rows = final_rows(store, setting, metric)
        if rows:
            tables[setting] = rows
    iterations = _iterations(store, scores)
    best = _best(store, scores, tables.get(MAIN, ()), config.get("test", {}).get("top_k", 15))
    return ReportData(
        metric=metric,
        iterations=iterations,
        levels=_levels(store, scores),
        tables=tables,
        best_method=best_method(store, metric),
        min_change=config.get("selection", {}).get("min_change", 0.0),
        best=best,
        missing=_missing(store, config.get("iterations"), iterations, tables),
    )


def display_name(candidate: str) -> str:
    """A candidate's name as a reader wants it: "program 3fa9c1d0", "ties(density=0.4)"."""
    kind, _, rest = candidate.partition(":")
    if kind == "program":
        return f"program {rest[:8]}"
    return rest or kind.replace("_", " ")


def final_rows(store: Store, setting: str, metric: str) -> tuple[Row, ...]:
    """The final table: the seed, then experts, methods, controls and programs.

    Within a kind by development score, on which they were chosen, and never by test score.
    """
    candidates = store.candidates()
    tested = [one for one in store.summaries(TEST, setting) if one.complete]
    development = {
        one.candidate: getattr(one, metric)
        for one in store.summaries(DEVELOPMENT, setting)
        if one.complete
    }
    outcomes = {one.candidate: store.outcomes(one.candidate, TEST, setting) for one in tested}
    seed = next((name for name in outcomes if candidates[name].kind == "seed"), None)
    method = best_method(store, metric)

    def gain(name: str, other: str | None, reading: str) -> Interval | None:
        if other not in outcomes or name == other:
            return None
        mine, theirs = (
            {outcome.problem_id: getattr(outcome, reading) for outcome in outcomes[one]}
            for one in (name, other)
        )
        return paired_by_key(mine, theirs) if mine.keys() == theirs.keys() else None

    def row(summary: Summary) -> Row:
        name = summary.candidate
        kind = candidates[name].kind
        return Row(
            name=name,
            kind=kind,
            development=development.get(name),
            problems=len(outcomes[name]),
            strict=accuracy_interval([o.strict for o in outcomes[name]]),
            flexible=accuracy_interval([o.flexible for o in outcomes[name]]),
            strict_gain=gain(name, seed, "strict"),
            flexible_gain=gain(name, seed, "flexible"),
            method_gain=gain(name, method, metric) if kind == "program" else None,
        )

    rows = [row(summary) for summary in tested]
    rows.sort(key=lambda r: (KINDS.index(r.kind), -(r.development or 0.0), r.name))
    return tuple(rows)


def best_method(store: Store, metric: str) -> str | None:
    """The human-designed method with the best development score, by which it is chosen."""
    candidates = store.candidates()
    scores = {
        one.candidate: getattr(one, metric)
        for one in store.summaries(DEVELOPMENT)
        if one.complete and candidates[one.candidate].kind == "method"
    }
    return max(scores, key=lambda name: (scores[name], name), default=None)


def _iterations(store: Store, scores: Mapping[str, float]) -> tuple[IterationReport, ...]:
    programs = store.programs()
    lineage = {one.iteration: one for one in store.lineage()}
    by_iteration = defaultdict(list)
    for sample in store.judged():
        by_iteration[sample.iteration].append(sample)
    reports = []
    for iteration, samples in sorted(by_iteration.items()):
        counts = Counter(sample.status for sample in samples)
        reasons = Counter(
            f"{s.status}: {s.rule}" if s.rule and s.rule != s.status else s.status
            for s in samples
            if not s.admissible and s.status != "not judged"
        )
        novel = [programs[s.identity] for s in samples if s.novel and s.identity in programs]
        weighted = [
            scores[program_candidate(s.identity)]
            for s in samples
            if s.admissible and s.identity and program_candidate(s.identity) in scores
        ]
        known = [p.in_training for p in novel if p.in_training is not None]
        own = [scores.get(program_candidate(program.identity)) for program in novel]
        reports.append(
            IterationReport(
                iteration=iteration,
                temperature=lineage[iteration].temperature if iteration in lineage else None,
                samples=len(samples),
                counts=dict(counts),
                reasons=dict(reasons.most_common()),
                scores=tuple(score for score in own if score is not None),
                sample_mean=fmean(weighted) if weighted else None,
                unseen=1 - fmean(known) if known else None,
                held_out=dict(Counter(f for p in novel for f in p.held_out or ())),
                pairs=len(store.pairs(iteration)),
            )
        )
    return tuple(reports)


def _levels(store: Store, scores: Mapping[str, float]) -> tuple[ReferenceLine, ...]:
    """The seed, the best expert and the best tuned method of each grid, by development score."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, candidate in store.candidates().items():
        if name in scores:
            for group in _groups(candidate):
                groups[group].append(scores[name])
    return tuple(ReferenceLine(name=group, score=max(values)) for group, values in groups.items())


def _groups(candidate: Candidate) -> list[str]:
    match candidate.kind:
        case "seed":
            return ["seed"]
        case "expert":
            return ["best expert"]
        case "method":
            grids = candidate.detail.get("grids", [])
            return [f"best method, {grid} grid" for grid in grids] or ["best method"]
    return []


def _best(
    store: Store, scores: Mapping[str, float], rows: tuple[Row, ...], top: int
) -> tuple[ProgramReport, ...]:
    first: dict[str, int] = {}
    for sample in store.judged():
        if sample.novel and sample.identity is not None:
            first.setdefault(sample.identity, sample.iteration)
    applications = store.applications()
    tested = {row.name: row.strict.mean for row in rows}
    named = [(program_candidate(p.identity), p) for p in store.programs().values()]
    ranked = sorted(
        ((name, program) for name, program in named if name in scores),
        key=lambda item: (-scores[item[0]], item[1].identity),
    )
    nearest = _nearest(store, {name: program.source for name, program in ranked[:top]})
    return tuple(
        ProgramReport(
            rank=rank,
            name=name,
            program=program,
            iteration=first.get(program.identity),
            development=scores[name],
            test=tested.get(name),
            change=applications[name].change if name in applications else None,
            nearest=nearest.get(name),
        )
        for rank, (name, program) in enumerate(ranked[:top], 1)
    )


def _nearest(store: Store, sources: Mapping[str, str]) -> dict[str, Nearest]:
    """By name, where the first generator is on this machine and tells what it was taught."""
    config = store.run().config
    try:
        folder = model_folder(config.get("generator") or config.get("seed", ""))
        training = read_training_sources(folder)
    except UserError:
        return {}
    return nearest_texts(sources, training or ())


def _missing(
    store: Store,
    wanted: int | None,
    iterations: tuple[IterationReport, ...],
    tables: Mapping[str, tuple[Row, ...]],
) -> tuple[str, ...]:
    """What a reader might look for and will not find, in sentences."""
    said = []
    if store.run().finished_at is None:
        said.append("The run is not finished; this is what it has found so far.")
    if not iterations:
        said.append("No program has been sampled yet.")
    elif wanted is not None and len(iterations) < wanted:
        said.append(f"{len(iterations)} of {wanted} iterations have begun.")
    waiting = sum(one.counts.get("not judged", 0) for one in iterations)
    if waiting:
        said.append(f"{waiting} samples are not judged yet.")
    if not tables:
        said.append("Nothing has been scored on the test problems yet.")
    elif not any(row.kind == "seed" for rows in tables.values() for row in rows):
        said.append("The seed has not been tested, so there are no differences from it.")
    return tuple(said)
