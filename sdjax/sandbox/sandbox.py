"""Source text in, a verdict out: the parent's side of the sandbox.

The worker's bytes are untrusted. The parent parses them, rebuilds the program (rebuild.py), runs
that on probe tensors (probe.py), and never executes source. Verdicts come in the order of the
sources, so that "duplicate of" is the same in every run.
"""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from sdjax.core.errors import UserError
from sdjax.isolation.client import ForkServer
from sdjax.isolation.confine import require_layers
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import Refusal, Verdict
from sdjax.sandbox.verify.probe import probe
from sdjax.sandbox.verify.verified_program import verify_ir

FORWARDED = ("refused", "wrong signature", "too costly")  # the verdicts that a worker may give


class Sandbox:
    """Judges programs in confined children of a fork server. A context manager.

        with Sandbox(contract) as sandbox:
            for index, verdict in sandbox.judge_all(sources):
                ...

    Entering it raises UserError where this machine lacks a layer of confinement that
    `allow_missing` does not name.

    `seen` maps identities and fingerprints of earlier programs to their names; both methods add
    what they admit, so one mapping can serve a whole run (fill it from the store to resume).
    """

    def __init__(
        self, signature: MergeSignature, workers: int = 2, allow_missing: Collection[str] = ()
    ):
        if workers < 1:
            raise ValueError("a sandbox needs at least one worker")
        self.signature, self.workers = signature, workers
        self.allow_missing = tuple(allow_missing)
        self.layers: tuple[str, ...] = ()  # in force, once it is entered
        self._entered = False
        self._server: ForkServer | None = None
        self._idle: list[Connection] = []
        self._busy: dict[Connection, _Task] = {}

    def __enter__(self) -> "Sandbox":
        self.layers = require_layers(self.allow_missing)
        self._entered = True
        if self._server is None:
            self._start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._entered = False
        self._stop()

    def judge(
        self, source: str, seen: MutableMapping[str, str] | None = None, name: str = "#0"
    ) -> Verdict:
        """The verdict on one source text."""
        ((_, verdict),) = self.judge_all([source], seen=seen, names=[name])
        return verdict

    def judge_all(
        self,
        sources: Iterable[str],
        *,
        seen: MutableMapping[str, str] | None = None,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) for every source, in order; `workers` of them are traced at a time.

        `names` are what a later duplicate is said to be a duplicate of ("#index" by default).
        """
        if not self._entered:
            raise UserError("the sandbox is not running: use it as `with Sandbox(...) as sandbox:`")
        if self._server is None:  # the last caller left early
            self._start()
        seen = {} if seen is None else seen
        waiting = enumerate(sources)
        replies: dict[int, str | Refusal] = {}
        due, last = 0, None  # the next index to yield; the number of sources once it is known
        try:
            while last is None or due < last:
                while self._idle and last is None and len(replies) < 4 * self.workers:
                    index, source = next(waiting, (None, ""))
                    if index is None:
                        last = due + len(replies) + len(self._busy)
                    else:
                        self._submit(_Task(index=index, source=source), replies)
                if due in replies:
                    name = names[due] if names else f"#{due}"
                    yield due, self._conclude(replies.pop(due), seen, name)
                    due += 1
                elif self._busy:
                    self._collect(replies)
        finally:
            if self._busy:  # the caller left early: nobody wants these any more
                self._stop()

    # --- the parent's own judgement ---

    def _conclude(
        self, reply: "str | Refusal", seen: MutableMapping[str, str], name: str
    ) -> Verdict:
        """The verdict on a worker's reply: rebuild, probe, compare."""
        if isinstance(reply, Refusal):
            return _refused(reply)
        known: dict[str, Any] = {}
        try:
            program = verify_ir(reply, self.signature)
            known = {
                "identity": program.identity,
                "structure": program.structure,
                "cost": program.cost,
                "memory": program.memory,
                "requests": program.requests,
                "form": program.form,
                "ir": reply,
            }
            if original := seen.get(program.identity):
                return _duplicate(original, "the same array program", known)
            findings = probe(program, self.signature)
        except Refusal as refusal:
            return replace(_refused(refusal), **known | {"ir": None})
        known |= {"fingerprint": findings.fingerprint, "notes": findings.notes}
        if original := seen.get(findings.fingerprint):
            seen[program.identity] = original
            return _duplicate(original, "the same results on the probe tensors", known)
        seen[program.identity] = seen[findings.fingerprint] = name
        return Verdict(verdict="admitted", **known)

    # --- the workers ---

    def _submit(self, task: "_Task", replies: dict[int, str | Refusal]) -> None:
        limits = self.signature.limits
        if len(task.source) > limits.source_bytes:  # not worth a worker's time
            message = f"the source is longer than {limits.source_bytes} bytes"
            replies[task.index] = Refusal("refused", "size", message)
            return
        connection = self._idle.pop()
        self._busy[connection] = task
        with contextlib.suppress(OSError):  # its end is gone: found out when the answer is read
            connection.send_bytes(task.source.encode("utf-8", "surrogatepass"))

    def _collect(self, replies: dict[int, str | Refusal]) -> None:
        """Wait for at least one worker; a lost server or a wall-clock time-out is tried again."""
        limits = self.signature.limits
        ready = wait(list(self._busy), timeout=3 * limits.wall_seconds + 10)
        late: list[_Task] = []
        lost = not ready
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                data = connection.recv_bytes(limits.ir_bytes + 1)
            except (EOFError, OSError):
                lost = True
                continue
            task = self._busy.pop(connection)
            self._idle.append(connection)
            if data[:1] == b"T" and not task.alone:
                late.append(task)
            else:
                replies[task.index] = _read(data, task, limits.wall_seconds)
        if lost:  # a dispatcher is gone: killed by a program, or by the machine for want of memory
            late.extend(self._busy.values())
            self._stop()
            self._start()
        for task in sorted(late, key=lambda t: t.index):
            if task.alone:
                message = "the worker was killed while it judged this program"
                replies[task.index] = Refusal("refused", "worker", message)
            else:
                self._alone(task, replies)

    def _alone(self, task: "_Task", replies: dict[int, str | Refusal]) -> None:
        """Once more, with nothing beside it."""
        while self._busy:
            self._collect(replies)
        self._submit(replace(task, alone=True), replies)
        while self._busy:
            self._collect(replies)

    def _start(self) -> None:
        signature, limits = self.signature.to_json(), self.signature.limits
        self._server = ForkServer(
            "sdjax.sandbox.worker.entry", signature, limits.worker, self.workers, self.allow_missing
        )
        self._idle = list(self._server.connections)

    def _stop(self) -> None:
        server, self._server = self._server, None
        self._idle, self._busy = [], {}
        if server is not None:
            server.stop()


@dataclass(frozen=True, kw_only=True)
class _Task:
    index: int
    source: str
    alone: bool = False


def _read(data: bytes, task: _Task, seconds: float) -> str | Refusal:
    """A dispatcher's answer as a wire to verify or as a refusal; the worker's words are tidied."""
    status, body = data[:1], data[1:]
    if status == b"T":
        message = f"tracing took more than {seconds:g} s, twice"
        return Refusal("timed out", "wall-clock", message)
    if status == b"C":
        return Refusal("timed out", "cpu", "tracing takes too much processor time")
    if status == b"L":
        return Refusal("too costly", "ir", "the traced program is too large")
    malformed = Refusal("refused", "worker", "the worker ended without a legal message")
    if status != b"D":
        return malformed
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return malformed
    if type(reply) is not dict or not all(type(v) is str for v in reply.values()):
        return malformed
    if set(reply) == {"ir"}:
        return reply["ir"]
    if set(reply) != {"verdict", "rule", "message"} or reply["verdict"] not in FORWARDED:
        return malformed
    if not reply["rule"].replace("-", "").isalpha() or len(reply["rule"]) > 40:
        return malformed
    return Refusal(reply["verdict"], reply["rule"], reply["message"])


def _refused(refusal: Refusal) -> Verdict:
    return Verdict(verdict=refusal.verdict, rule=refusal.rule, message=refusal.message)


def _duplicate(original: str, how: str, known: dict[str, Any]) -> Verdict:
    return Verdict(
        verdict="duplicate",
        rule="duplicate",
        message=f"equals {original}: {how}",
        duplicate_of=original,
        **known,
    )
