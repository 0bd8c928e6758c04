"""Refusal of a candidate, worded identically on every machine."""

import re

NON_FINITE = "non-finite"
COMPILER = "compiler"  # compiling the program or running it for the first time failed
REFUSALS = ("refused", "timed out", "too costly", "wrong signature", NON_FINITE, COMPILER)
MESSAGE_LENGTH = 500


class Refusal(Exception):
    """Raised when a candidate fails a check; becomes its verdict.

    Attributes:
        verdict: one of `REFUSALS`.
        rule: name of the check that failed.
        message: what is wrong, in one line.
    """

    def __init__(self, verdict: str, rule: str, message: str):
        assert verdict in REFUSALS
        super().__init__(message)
        self.verdict, self.rule, self.message = verdict, rule, sanitize(message)


def sanitize(message: str) -> str:
    """Return one line of bounded length without addresses, URLs, paths or control characters."""
    message = re.sub(r"0x[0-9a-fA-F]{4,}", "0x…", str(message)[: 8 * MESSAGE_LENGTH])
    message = re.sub(r"\w+://\S+", "…", message)
    message = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*", "…", message)
    message = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if len(message) <= MESSAGE_LENGTH:
        return message
    return message[: MESSAGE_LENGTH - 1] + "…"
