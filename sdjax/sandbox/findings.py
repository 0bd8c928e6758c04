"""Results of a probe: fingerprint and notes."""

from dataclasses import dataclass

# Notes on an admitted program; if a note concerns one expert, ": expert_2" follows.
SEED, EXPERT = "equals the seed", "equals an expert"
SCALING = "plain scaling of one task vector"
ORDER = "depends on the order of experts"  # not checked if one of the others applies


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Conclusions from the probe runs of one program.

    Attributes:
        fingerprint: hash of the rounded results.
        notes: remarks on the results, such as "equals the seed".
    """

    fingerprint: str
    notes: tuple[str, ...]


def possible_notes(slots: tuple[str, ...]) -> frozenset[str]:
    """Return every note that a program for these expert slots may have."""
    of_experts = {f"{note}: {slot}" for note in (EXPERT, SCALING) for slot in slots}
    return frozenset({SEED, ORDER, *of_experts})
