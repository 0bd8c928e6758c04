"""Result of judging one candidate, and the rules that every other module shares.

These are the statuses of a candidate, which of them are admissible, and what a duplicate is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sdjax.sandbox.refusal import REFUSALS
from sdjax.sandbox.verify.verified_program import VerifiedProgram

ADMITTED, DUPLICATE = "admitted", "duplicate"
ADMISSIBLE = (ADMITTED, DUPLICATE)
VERDICTS = (*ADMISSIBLE, *REFUSALS)


def is_admissible(status: str) -> bool:
    """Return whether a candidate of this status counts as a usable program."""
    return status in ADMISSIBLE


class DuplicateIndex:
    """An index of the programs seen so far, by name.

    Programs with the same identity are duplicates. Programs with the same results on the probe
    tensors may still differ on the weights of a model, so a search compares their merges
    (`sdjax.search.duplicates`).
    """

    def __init__(self) -> None:
        """Create an empty index."""
        self._by_identity: dict[str, str] = {}
        self._by_fingerprint: dict[str, str] = {}

    def find(self, identity: str) -> str | None:
        """Return the name of the first program with an identity; None if there is none."""
        return self._by_identity.get(identity)

    def find_similar(self, fingerprint: str | None) -> str | None:
        """Return the name of the first program with a fingerprint; None if there is none."""
        return None if fingerprint is None else self._by_fingerprint.get(fingerprint)

    def add(self, identity: str, fingerprint: str | None, name: str) -> None:
        """Add a program, unless one with its identity or its fingerprint is already there.

        Args:
            identity: the program's identity.
            fingerprint: hash of its results on the probe tensors; None if it was not probed.
            name: name of the program.
        """
        self._by_identity.setdefault(identity, name)
        if fingerprint is not None:
            self._by_fingerprint.setdefault(fingerprint, name)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of judging one candidate, identical on every machine under one version of JAX.

    For a few programs, cost and memory differ between versions of JAX.

    Attributes:
        verdict: one of `VERDICTS`.
        rule: name of the check that decided; empty if admitted.
        message: reason for the verdict, in one line; empty if admitted.
        identity: hash of the IR. Equal candidates have equal identities.
        structure: hash of the IR without the constants that can be tuned.
        fingerprint: hash of the rounded results on the probe tensors.
        duplicate_of: name of the earlier candidate with the same identity.
        similar_to: name of the earlier candidate with the same results on the probe tensors.
        cost: units of cost over all tensors in scope, loop iterations included; one unit is a
            product of two elements.
        memory: peak bytes alive at once in one array program.
        requests: optional inputs that the candidate reads: base, key, depth, kind.
        form: "tensor" for merge_models, "tree" for merge_trees.
        ir: verified IR as JSON text; `verify_ir` turns it into a program again.
        notes: remarks on the results, such as "equals the seed".
        program: the verified program if admitted or a duplicate. Not serialized.
    """

    verdict: str
    rule: str = ""
    message: str = ""
    identity: str | None = None
    structure: str | None = None
    fingerprint: str | None = None
    duplicate_of: str | None = None
    similar_to: str | None = None
    cost: int | None = None
    memory: int | None = None
    requests: tuple[str, ...] = ()
    form: str | None = None
    ir: str | None = None
    notes: tuple[str, ...] = ()
    program: VerifiedProgram | None = field(default=None, compare=False, repr=False)

    @property
    def admitted(self) -> bool:
        """Whether the candidate was admitted."""
        return self.verdict == ADMITTED

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and the earlier candidate that may be the same program."""
        if self.similar_to is None:
            return self.notes
        return (*self.notes, f"same results as {self.similar_to} on the probe tensors")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but `program`, in JSON-compatible form."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "program"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Verdict":
        """Build a verdict from the result of `to_dict`, possibly read back from JSON."""
        lists = {name: tuple(data[name]) for name in ("requests", "notes")}
        return cls(**{**data, **lists})
