"""Replies of the sandbox's workers, whose bytes are untrusted."""

import json
import string
from collections.abc import Collection
from typing import Any

from sdjax.isolation.pool import Reply
from sdjax.isolation.server import DONE, NOT_STARTED, OUT_OF_CPU, OUT_OF_TIME, TOO_LONG
from sdjax.sandbox.config import Limits
from sdjax.sandbox.findings import Findings, possible_notes
from sdjax.sandbox.refusal import COMPILER, NON_FINITE, Refusal

# Verdicts that a worker may send.
TRACE_VERDICTS = ("refused", "wrong signature", "too costly")
COMPILER_VERDICTS = ("refused", "too costly", NON_FINITE, COMPILER)
_NO_REPLY = "the worker exited without a valid reply"


def parse_trace(reply: Reply, limits: Limits) -> str | Refusal:
    """Return the IR or the refusal from the reply of a worker that traced a candidate."""
    if reply.status == OUT_OF_TIME:
        message = f"tracing took more than {limits.wall_seconds:g} s, twice"
        return Refusal("timed out", "wall-clock", message)
    if reply.status == OUT_OF_CPU:
        return Refusal("timed out", "cpu", "tracing takes too much processor time")
    if reply.status == TOO_LONG:
        return Refusal("too costly", "ir", "the traced program is too large")
    fields = _fields(reply)
    if fields is not None and set(fields) == {"ir"} and type(fields["ir"]) is str:
        return fields["ir"]
    return _refusal(fields, TRACE_VERDICTS) or Refusal("refused", "worker", _NO_REPLY)


def parse_probe(reply: Reply, limits: Limits, slots: tuple[str, ...]) -> Findings | Refusal:
    """Return the findings or the refusal from the reply of a worker that probed a program."""
    if (failure := _compiler_failure(reply, limits)) is not None:
        return failure
    fields = _fields(reply)
    if fields is not None and set(fields) == {"fingerprint", "notes"}:
        fingerprint, notes = fields["fingerprint"], fields["notes"]
        is_hash = type(fingerprint) is str and len(fingerprint) == 64
        if is_hash and set(fingerprint) <= set(string.hexdigits) and type(notes) is list:
            allowed = possible_notes(slots)
            if len(notes) <= 1 and all(type(n) is str and n in allowed for n in notes):
                return Findings(fingerprint=fingerprint, notes=tuple(notes))
    return _refusal(fields, COMPILER_VERDICTS) or Refusal(COMPILER, "worker", _NO_REPLY)


def parse_trial(reply: Reply, limits: Limits) -> Refusal | None:
    """Return the refusal from the reply of a worker that tried a merge; None if it succeeded."""
    if (failure := _compiler_failure(reply, limits)) is not None:
        return failure
    fields = _fields(reply)
    if fields == {}:
        return None
    return _refusal(fields, COMPILER_VERDICTS) or Refusal(COMPILER, "worker", _NO_REPLY)


def _compiler_failure(reply: Reply, limits: Limits) -> Refusal | None:
    """Return the refusal of a program that its compilation or its first run did not survive."""
    what = "compiling the program and running it on small tensors"
    if reply.status == OUT_OF_TIME:
        text = f"{what} took more than {limits.compile_wall_seconds:g} s, twice"
        return Refusal(COMPILER, "wall-clock", text)
    if reply.status == OUT_OF_CPU:
        text = f"{what} takes more than {limits.compile_cpu_seconds} s of processor time"
        return Refusal(COMPILER, "cpu", text)
    if reply.status == NOT_STARTED:
        return Refusal(COMPILER, "worker", "the confined compiler did not start, twice")
    if reply.status != DONE:
        return Refusal(COMPILER, "crash", "XLA crashed or ran out of memory on the program, twice")
    return None


def _fields(reply: Reply) -> dict[str, Any] | None:
    """Return the JSON object of a reply; None if it is anything else."""
    if reply.status != DONE:
        return None
    try:
        fields = json.loads(reply.data)
    except (ValueError, RecursionError):
        return None
    return fields if type(fields) is dict else None


def _refusal(fields: dict[str, Any] | None, verdicts: Collection[str]) -> Refusal | None:
    if fields is None or set(fields) != {"verdict", "rule", "message"}:
        return None
    if not all(type(value) is str for value in fields.values()):
        return None
    verdict, rule = fields["verdict"], fields["rule"]
    if verdict not in verdicts or not rule.replace("-", "").isalpha() or len(rule) > 40:
        return None
    return Refusal(verdict, rule, fields["message"])
