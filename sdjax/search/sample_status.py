"""Status of a sample, from its verdict, its merge and the samples before it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from sdjax.core.errors import truncated_repr
from sdjax.sandbox.verdict import ADMITTED, DUPLICATE, DuplicateIndex, is_admissible
from sdjax.search.score_types import Application
from sdjax.search.types import NO_PROGRAM, NOT_JUDGED, JudgedSample, Sample, StoredVerdict


def judged_sample(
    sample: Sample,
    verdict: StoredVerdict | None,
    application: Application | None,
    earlier: DuplicateIndex,
    fingerprints: Mapping[str, str | None],
    *,
    by_structure: bool = False,
) -> JudgedSample:
    """Return a sample with its status; add its program to `earlier`.

    Args:
        sample: the sample.
        verdict: the sandbox's verdict on its source, if there is one.
        application: the result of merging with its program, if there is one.
        earlier: the programs of the samples before it.
        fingerprints: hash of the results on the probe tensors, by identity.
        by_structure: whether programs that differ only in constants are duplicates, and equal
            results on the probe tensors are not, since tuning separates them.
    """

    def judged(
        status: str, rule: str, identity: str | None = None, unconfirmed: str | None = None
    ) -> JudgedSample:
        values = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
        return JudgedSample(
            **values, status=status, rule=rule, identity=identity, unconfirmed=unconfirmed
        )

    if sample.source is None:
        return judged(NO_PROGRAM, "no program in the text")
    if verdict is None:
        return judged(NOT_JUDGED, "")
    if not is_admissible(verdict.verdict) or verdict.identity is None:
        return judged(verdict.verdict, verdict.rule)
    if application is not None and not is_admissible(application.verdict):
        return judged(application.verdict, application.rule)
    identity, unconfirmed = verdict.identity, None
    if by_structure:
        if application is not None and application.original is not None:
            return judged(DUPLICATE, "", application.original)
        key = verdict.structure or identity
        original = earlier.find(key)
        earlier.add(key, None, original or identity)
        return judged(DUPLICATE if original else ADMITTED, "", original or identity)
    if application is not None and application.original is not None:
        identity = application.original
    fingerprint = fingerprints.get(verdict.identity)
    original = earlier.find(identity)
    if original is None and application is None:
        original = earlier.find_similar(fingerprint)
        unconfirmed = original and identity
    earlier.add(identity, fingerprint, original or identity)
    if original is None:
        return judged(ADMITTED, "", identity)
    return judged(DUPLICATE, "", original, unconfirmed)


def describe_failures(
    samples: Sequence[JudgedSample], verdicts: Mapping[str, StoredVerdict]
) -> str:
    """Return how many samples failed for which reason, the most frequent first, and an example.

    Args:
        samples: samples without a score.
        verdicts: the verdicts by source.
    """
    counts = Counter(
        f"{one.status} ({one.rule})" if one.rule and one.status != NO_PROGRAM else one.status
        for one in samples
    )
    parts = [f"{count} {reason}" for reason, count in counts.most_common()]
    for one in sorted(samples, key=lambda sample: sample.status == NO_PROGRAM):
        if not one.admissible:
            verdict = verdicts.get(one.source or "")
            reason = verdict.message if verdict is not None and verdict.message else one.status
            text = one.text if one.source is None else one.source
            parts[-1] += f"; for example sample {one.number}: {reason}: {truncated_repr(text)}"
            break
    return ", ".join(parts) or "no samples"
