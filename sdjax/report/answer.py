"""The answer of a run: was anything discovered that tuning a human-designed merge does not give?

A program is compared with the best control that has at most as many tuned numbers, selected by
development score alone. The comparison is paired by test problem, at a confidence level that is
corrected for the number of programs that were tested (Bonferroni, the first step of Holm 1979), and
"discovered" is said only if the interval is above zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdjax.evaluation.statistics import Interval, paired_by_key
from sdjax.report.results import display_name
from sdjax.search.ranking import complete_scores, controls, ranked, ranked_programs
from sdjax.search.store import Store
from sdjax.search.types import MAIN, TEST, Entry

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A tested program, compared with a control.

    Attributes:
        program: entry name of the program.
        program_numbers: number of its tuned numbers; 0 if it is as the generator wrote it.
        control: entry name of the control.
        control_numbers: number of the control's tuned numbers; 0 for a method from a grid.
        finalists: number of programs that were tested.
        gain: accuracy of the program minus that of the control on the test problems, with an
            interval for all finalists together.
    """

    program: str
    program_numbers: int
    control: str
    control_numbers: int
    finalists: int
    gain: Interval

    @property
    def is_discovery(self) -> bool:
        """Whether the program is better than the control."""
        return self.gain.low > 0

    def sentence(self) -> str:
        """Return the answer in one sentence."""
        verdict = "Discovered" if self.is_discovery else "Nothing discovered"
        how = _numbers(self.program_numbers) if self.program_numbers else "as written"
        control_how = f" ({_numbers(self.control_numbers)})" if self.control_numbers else ""
        return (
            f"{verdict}: the best program, {display_name(self.program)} ({how}), minus the best "
            f"control, {display_name(self.control)}{control_how}: "
            f"{self.gain.in_percent(signed=True)} points on the test problems"
            f"{_correction(self.finalists)}"
        )


def read_answers(store: Store, metric: str) -> tuple[Answer, ...]:
    """Return the answers of a run: the best tuned program, if any, then the best as written.

    Args:
        store: the run's store.
        metric: the run's metric, "strict" or "flexible".

    Returns:
        only comparisons of which both sides have been tested.
    """
    entries = store.by_key(Entry)
    tested = {one.entry for one in store.summaries(TEST, MAIN) if one.complete}
    scores = complete_scores(store, metric)
    programs = [entry for entry in ranked_programs(store, metric) if entry.name in tested]
    candidates = controls(store) & tested
    against = [entries[name] for name in ranked(scores) if name in candidates]
    answers = []
    for group in (
        [entry for entry in programs if _count(entry) > 0],
        [entry for entry in programs if _count(entry) == 0],
    ):
        program = next(iter(group), None)
        if program is None:
            continue
        control = next((c for c in against if _count(c) <= _count(program)), None)
        if control is None:
            continue
        answers.append(
            Answer(
                program=program.name,
                program_numbers=_count(program),
                control=control.name,
                control_numbers=_count(control),
                finalists=len(programs),
                gain=paired_by_key(
                    _correct(store, program.name, metric),
                    _correct(store, control.name, metric),
                    1 - (1 - _CONFIDENCE) / len(programs),
                ),
            )
        )
    return tuple(answers)


def _correct(store: Store, entry: str, metric: str) -> Mapping[str, float]:
    outcomes = store.outcomes(entry, TEST, MAIN)
    return {outcome.problem_id: float(getattr(outcome, metric)) for outcome in outcomes}


def _count(entry: Entry) -> int:
    return int(entry.detail.get("constants", 0))


def _numbers(count: int) -> str:
    return f"{count} tuned number{'s' * (count > 1)}"


def _correction(finalists: int) -> str:
    return "" if finalists == 1 else f", interval corrected for {finalists} tested programs"
