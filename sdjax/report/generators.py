"""What each generator of a run has found, if there are several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdjax.search.types import JudgedSample


@dataclass(frozen=True, kw_only=True)
class GeneratorRow:
    """Statistics of the samples of one generator.

    Attributes:
        name: name of the generator, "seed" for the run's own.
        samples: number of its samples.
        admissible: number of the admissible ones.
        distinct: number of programs that it found first.
        best: best development score of these; None if none of them has a score.
    """

    name: str
    samples: int
    admissible: int
    distinct: int
    best: float | None


def generator_rows(
    samples: Sequence[JudgedSample], scores: Mapping[str, float]
) -> tuple[GeneratorRow, ...]:
    """Return a row per generator, in the order of their first samples; none if there is only one.

    Args:
        samples: the samples of the search, in order.
        scores: development score of each program, by identity.
    """
    by_name = defaultdict[str, list[JudgedSample]](list)
    for sample in samples:
        by_name[sample.generator].append(sample)
    if len(by_name) < 2:
        return ()
    return tuple(_row(name, written, scores) for name, written in by_name.items())


def _row(name: str, samples: Sequence[JudgedSample], scores: Mapping[str, float]) -> GeneratorRow:
    found = [sample.identity or "" for sample in samples if sample.novel]
    return GeneratorRow(
        name=name,
        samples=len(samples),
        admissible=sum(sample.admissible for sample in samples),
        distinct=len(found),
        best=max((scores[identity] for identity in found if identity in scores), default=None),
    )
