"""Contribution of each part of the best programs, from the ablations of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdjax.evaluation.statistics import Interval, paired_by_key
from sdjax.search.ablations import ablations_of
from sdjax.search.entry_names import display_name
from sdjax.search.ranking import both_forms, correct_answers, final_ranking, is_tuned
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import CONFIRMATION, MAIN


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """An ablation of a program on the confirmation problems.

    Attributes:
        title: what was changed.
        accuracy: accuracy by the run's metric; None if it has none.
        gain: its accuracy minus that of the program, with a 95 % interval paired by problem.
        refusal: why its merge was refused; empty if it was not.
    """

    title: str
    accuracy: float | None
    gain: Interval | None
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class AblationTable:
    """The ablations of a program.

    Attributes:
        program: name of its entry.
        form: "as tuned" or "as written".
        accuracy: its accuracy on the confirmation problems.
        problems: number of confirmation problems.
        rows: first its other form, if it has been scored, then the ablations.
    """

    program: str
    form: str
    accuracy: float
    problems: int
    rows: tuple[AblationRow, ...]


def read_ablations(store: Store, metric: str) -> tuple[AblationTable, ...]:
    """Return the ablations of each program that has some, best program first.

    Args:
        store: the run's store.
        metric: the run's metric.
    """
    correct = correct_answers(store, CONFIRMATION, metric)
    applications = store.by_key(Application, setting=MAIN)
    tables = []
    for program in final_ranking(store, metric) if correct else ():
        ablations = ablations_of(store, program.name)
        if not ablations or program.name not in correct:
            continue
        own = correct[program.name]
        rows = []
        for form, entry in zip(
            ("as tuned", "as written"), both_forms(store, metric, program), strict=True
        ):
            if entry is not None and entry.name != program.name and entry.name in correct:
                rows.append(_row(form, correct[entry.name], own))
        for ablation in ablations:
            applied = applications.get(ablation.name)
            refusal = "" if applied is None or applied.admitted else applied.message
            rows.append(
                _row(display_name(ablation.name), correct.get(ablation.name, {}), own, refusal)
            )
        tables.append(
            AblationTable(
                program=program.name,
                form="as tuned" if is_tuned(program) else "as written",
                accuracy=sum(own.values()) / len(own),
                problems=len(own),
                rows=tuple(rows),
            )
        )
    return tuple(tables)


def _row(
    title: str, correct: Mapping[str, bool], own: Mapping[str, bool], refusal: str = ""
) -> AblationRow:
    if correct.keys() != own.keys():  # refused, or not complete
        return AblationRow(title=title, accuracy=None, gain=None, refusal=refusal)
    return AblationRow(
        title=title,
        accuracy=sum(correct.values()) / len(correct),
        gain=paired_by_key(correct, own),
    )
