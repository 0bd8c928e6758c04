"""Result of judging one candidate."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sdjax.sandbox.verify.verified_program import VerifiedProgram


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of judging one candidate, identical on every machine.

    Attributes:
        verdict: one of `refusal.VERDICTS`.
        rule: name of the check that decided; empty if admitted.
        message: reason for the verdict, in one line; empty if admitted.
        identity: hash of the IR. Equal candidates have equal identities.
        structure: hash of the IR without the constants that can be tuned.
        fingerprint: hash of the rounded results on the probe tensors.
        duplicate_of: name of the earlier candidate that this one equals.
        cost: scalar operations over all tensors in scope, loop iterations included.
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
        return self.verdict == "admitted"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but `program`, in JSON-compatible form."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "program"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Verdict":
        """Build a verdict from the result of `to_dict`, possibly read back from JSON."""
        lists = {name: tuple(data[name]) for name in ("requests", "notes")}
        return cls(**{**data, **lists})
