"""What earlier iterations have found, read from a run's store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdjax.programs.memory_prompts import RefusedProgram
from sdjax.search.base_identity import base_of_iteration
from sdjax.search.config import RunConfig
from sdjax.search.memory.population import Member, Population, Trial
from sdjax.search.ranking import development_scores, first_samples
from sdjax.search.score_types import Application, Promotion
from sdjax.search.store import Store
from sdjax.search.structures import scored_programs, structures_of
from sdjax.search.types import (
    MAIN,
    NO_PROGRAM,
    NOT_JUDGED,
    SEARCH,
    UNTRAINED,
    JudgedSample,
    Program,
    StoredVerdict,
    program_entry,
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the earlier iterations of a purpose have found.

    Attributes:
        population: the scored programs and the samples that wrote them.
        refused: the refused programs of the newest iteration that has any, in sampling order.
    """

    population: Population
    refused: tuple[RefusedProgram, ...] = ()


def read_findings(config: RunConfig, store: Store, *, purpose: str, iteration: int) -> Findings:
    """Return what the iterations of a purpose before the given one have found.

    Programs that leave the seed as it was are left out (`selection.min_change`), and so are those
    on another base than that of the iteration, since their scores say nothing about it. If
    structures are scored, the member of a structure is the program with its best numbers.

    Args:
        config: the run's config.
        store: the run's store.
        purpose: purpose whose prompts are asked for; see `earlier_samples`.
        iteration: number of the iteration, or of the batch of a control.
    """
    samples = earlier_samples(store, purpose, iteration)
    if not samples:
        return Findings(population=Population.of((), ()))
    base = base_of_iteration(
        store.select(Promotion), purpose if purpose == UNTRAINED else SEARCH, iteration
    )
    members = _members(config, store, [sample for _, sample in samples], base)
    per_prompt = config.generation.memory.samples_per_prompt if config.generation.memory else 1
    scored = scored_programs(store)
    trials = []
    for number, sample in samples:
        identity = scored.get(sample.identity or "") if sample.admissible else None
        trials.append(
            Trial(
                round=number,
                group=sample.number // per_prompt,
                parents=sample.parents,
                identity=identity if identity in members else None,
            )
        )
    return Findings(
        population=Population.of(members.values(), trials), refused=_refused(store, samples)
    )


def earlier_samples(store: Store, purpose: str, iteration: int) -> list[tuple[int, JudgedSample]]:
    """Return the samples that prompts of an iteration may show, each with its round.

    The untrained generator has its own earlier batches, and the first iteration of the search,
    whose generator was untrained. A measurement has those of the search.

    Args:
        store: the run's store.
        purpose: "search", that of a control, or the name of a measurement.
        iteration: number of the iteration, or of the batch of a control.
    """
    if purpose != UNTRAINED:
        return [(one.iteration, one) for one in store.judged() if one.iteration < iteration]
    own = [one for one in store.judged(purpose=purpose) if one.iteration < iteration]
    return [(1, one) for one in first_samples(store)] + [(one.iteration + 1, one) for one in own]


def _members(
    config: RunConfig, store: Store, samples: Sequence[JudgedSample], base: str | None
) -> dict[str, Member]:
    """Return the scored programs of samples on a base, by identity."""
    scores = development_scores(store, config.task.metric)
    changes = {one.entry: one.change for one in store.select(Application, setting=MAIN)}
    scored, structures = scored_programs(store), structures_of(store)
    programs = {
        identity: (source, families)
        for identity, source, families, base_of_program in store.values(
            Program, "identity", "source", "families", "base"
        )
        if base_of_program == base
    }
    members: dict[str, Member] = {}
    for sample in samples:
        identity = scored.get(sample.identity or "")
        if not sample.admissible or identity is None or identity in members:
            continue
        entry = program_entry(identity)
        if (
            identity not in programs
            or entry not in scores
            or changes.get(entry, 0.0) < config.selection.min_change
        ):
            continue
        source, families = programs[identity]
        members[identity] = Member(
            identity=identity,
            structure=structures.get(sample.identity or "", identity),
            source=source,
            score=scores[entry],
            change=changes[entry],
            families=tuple(families or ()),
        )
    return members


def _refused(
    store: Store, samples: Sequence[tuple[int, JudgedSample]]
) -> tuple[RefusedProgram, ...]:
    """Return the distinct refused programs of the newest round that has any."""
    refused = [
        (number, sample)
        for number, sample in samples
        if not sample.admissible and sample.status not in (NO_PROGRAM, NOT_JUDGED)
    ]
    newest = max((number for number, _ in refused), default=0)
    messages = dict(store.values(StoredVerdict, "source", "message"))
    found = {
        sample.source: RefusedProgram(
            source=sample.source,
            status=sample.status,
            message=messages.get(sample.source) or sample.rule,
        )
        for number, sample in refused
        if number == newest and sample.source is not None
    }
    return tuple(found.values())
