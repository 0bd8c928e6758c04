"""The outcome of judging one program, in words that are the same on every machine."""

import re
from dataclasses import dataclass

VERDICTS = (
    "admitted",
    "refused",
    "timed out",
    "too costly",
    "wrong signature",
    "non-finite",
    "duplicate",
)
MESSAGE_LENGTH = 500


class Refusal(Exception):
    """Raised wherever a program falls; becomes a verdict and never a traceback."""

    def __init__(self, verdict: str, rule: str, message: str):
        assert verdict in VERDICTS
        super().__init__(message)
        self.verdict, self.rule, self.message = verdict, rule, tidy(message)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one source text.

    `rule` names the check that decided ("" when admitted); `wire` is the verified array program
    as JSON, the input of `sdjax.sandbox.verify.verified_program.to_algorithm`; `cost` is in
    scalar operations over the scope, trip counts included; `memory` the largest sum of bytes alive
    at once in one program; `fingerprint` stands for the results on the probe tensors;
    `duplicate_of` is the name that the caller gave to the equal program.
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

    @property
    def admitted(self) -> bool:
        return self.verdict == "admitted"


def tidy(message: str) -> str:
    """One line of bounded length without addresses, links, absolute paths or control characters."""
    message = re.sub(r"0x[0-9a-fA-F]{4,}", "0x…", str(message)[: 8 * MESSAGE_LENGTH])
    message = re.sub(r"\w+://\S+", "…", message)
    message = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*", "…", message)
    message = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if len(message) <= MESSAGE_LENGTH:
        return message
    return message[: MESSAGE_LENGTH - 1] + "…"
