"""The sandbox: takes source text and returns a verdict with a verified array program.

This is the parent's side, which never executes source text. Workers (`worker/`) trace a candidate
and send its IR as untrusted bytes; the parent decodes and verifies the IR (`verify/`) and runs the
result on probe tensors. Verdicts are issued in the order of the sources, so that duplicates are the
same in every run.
"""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from sdjax.core.errors import UserError
from sdjax.isolation.client import ForkServer
from sdjax.isolation.confine import require_layers
from sdjax.isolation.server import DONE, OUT_OF_CPU, OUT_OF_TIME, TOO_LONG
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import ADMITTED, DUPLICATE, DuplicateIndex, Verdict
from sdjax.sandbox.verify.probe import probe
from sdjax.sandbox.verify.verified_program import verify_ir

WORKER_JOB = "sdjax.sandbox.worker.entry"
WORKER_VERDICTS = ("refused", "wrong signature", "too costly")  # verdicts that a worker may send


class Sandbox:
    """Sandbox that judges candidates in confined worker processes.

    A candidate is Python source text that defines `merge_models(task_vectors, ...)`, which returns
    one tensor (float32, of the task vectors' shape), or `merge_trees(task_vectors, ...)`, which
    returns a dict from tensor path to tensor. The sandbox is a context manager.

    `verdict.program` is callable with a dict from expert to task vector and can be traced by
    `jax.jit`.

    Attributes:
        signature: expert slots, tensors and limits that candidates are judged against.
        workers: number of candidates that are traced at the same time.
        layers: layers of confinement in force; empty until the sandbox is entered.

    Examples:
        >>> import sdjax
        >>> from sdjax.sandbox.signature import MergeSignature
        >>> tensors = {"layers/0/mlp/up_proj": ("mlp.up_proj", (16, 8))}
        >>> signature = MergeSignature.of(("expert_1", "expert_2"), tensors)
        >>> source = '''
        ... def merge_models(task_vectors):
        ...     return 0.5 * sum(task_vectors.values())
        ... '''
        >>> with sdjax.Sandbox(signature, workers=1) as sandbox:
        ...     verdict = sandbox.judge(source)
        ...     refused = sandbox.judge("import os")
        >>> verdict.verdict, verdict.program.requests
        ('admitted', ())
        >>> refused.message
        'line 1: `import os` is not allowed'
    """

    def __init__(
        self, signature: MergeSignature, workers: int = 2, allow_missing: Collection[str] = ()
    ):
        """Prepare a sandbox; entering it starts the workers.

        Args:
            signature: expert slots, tensors and limits that candidates are judged against.
            workers: number of candidates that are traced at the same time.
            allow_missing: layers of confinement that this machine may lack. Entering the sandbox
                raises UserError if any other layer is missing.
        """
        if workers < 1:
            raise ValueError("a sandbox needs at least one worker")
        self.signature, self.workers = signature, workers
        self.allow_missing = tuple(allow_missing)
        self.layers: tuple[str, ...] = ()
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

    def judge(self, source: str, seen: DuplicateIndex | None = None, name: str = "#0") -> Verdict:
        """Judge one candidate. See `judge_all`."""
        ((_, verdict),) = self.judge_all([source], seen=seen, names=[name])
        return verdict

    def judge_all(
        self,
        sources: Iterable[str],
        *,
        seen: DuplicateIndex | None = None,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge candidates, `workers` of them at a time.

        Args:
            sources: source texts.
            seen: index of earlier candidates. Admitted candidates are added, so one index can
                serve a whole run.
            names: names to report in `Verdict.duplicate_of`; "#index" by default.

        Yields:
            the index and the verdict of every source, in order.

        Raises:
            UserError: the sandbox has not been entered.
        """
        if not self._entered:
            raise UserError("the sandbox is not running: use it as `with Sandbox(...) as sandbox:`")
        if self._server is None:  # the previous iteration was abandoned
            self._start()
        seen = DuplicateIndex() if seen is None else seen
        pending = enumerate(sources)
        replies: dict[int, str | Refusal] = {}
        next_index, count = 0, None  # count: number of sources once it is known
        try:
            while count is None or next_index < count:
                while self._idle and count is None and len(replies) < 4 * self.workers:
                    index, source = next(pending, (None, ""))
                    if index is None:
                        count = next_index + len(replies) + len(self._busy)
                    else:
                        self._submit(_Task(index=index, source=source), replies)
                if next_index in replies:
                    name = names[next_index] if names else f"#{next_index}"
                    yield next_index, self._conclude(replies.pop(next_index), seen, name)
                    next_index += 1
                elif self._busy:
                    self._collect(replies)
        finally:
            if self._busy:  # the caller abandoned the iteration
                self._stop()

    # --- verdicts ---

    def _conclude(self, reply: "str | Refusal", seen: DuplicateIndex, name: str) -> Verdict:
        """Verify, probe and compare the IR that a worker sent."""
        if isinstance(reply, Refusal):
            return _refused(reply)
        fields: dict[str, Any] = {}
        try:
            program = verify_ir(reply, self.signature)
            fields = {
                "identity": program.identity,
                "structure": program.structure,
                "cost": program.cost,
                "memory": program.memory,
                "requests": program.requests,
                "form": program.form,
                "ir": reply,
                "program": program,
            }
            if original := seen.find(program.identity):
                return _duplicate(original, "the same array program", fields)
            findings = probe(program, self.signature)
        except Refusal as refusal:
            return replace(_refused(refusal), **fields | {"ir": None, "program": None})
        fields |= {"fingerprint": findings.fingerprint, "notes": findings.notes}
        if original := seen.add(program.identity, findings.fingerprint, name):
            return _duplicate(original, "the same results on the probe tensors", fields)
        return Verdict(verdict=ADMITTED, **fields)

    # --- workers ---

    def _submit(self, task: "_Task", replies: dict[int, str | Refusal]) -> None:
        max_bytes = self.signature.limits.source_bytes
        if len(task.source) > max_bytes:
            message = f"the source is longer than {max_bytes} bytes"
            replies[task.index] = Refusal("refused", "size", message)
            return
        connection = self._idle.pop()
        self._busy[connection] = task
        with contextlib.suppress(OSError):  # the dispatcher is gone; `_collect` will notice
            connection.send_bytes(task.source.encode("utf-8", "surrogatepass"))

    def _collect(self, replies: dict[int, str | Refusal]) -> None:
        """Wait for a worker; retry once after a lost server or a wall-clock timeout."""
        limits = self.signature.limits
        ready = wait(list(self._busy), timeout=3 * limits.wall_seconds + 10)
        retries: list[_Task] = []
        server_lost = not ready
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                data = connection.recv_bytes(limits.ir_bytes + 1)
            except (EOFError, OSError):
                server_lost = True
                continue
            task = self._busy.pop(connection)
            self._idle.append(connection)
            if data[:1] == OUT_OF_TIME and not task.is_retry:
                retries.append(task)
            else:
                replies[task.index] = _parse_reply(data, limits.wall_seconds)
        if server_lost:  # a dispatcher was killed, by a candidate or for lack of memory
            retries.extend(self._busy.values())
            self._stop()
            self._start()
        for task in sorted(retries, key=lambda t: t.index):
            if task.is_retry:
                message = "the worker was killed while it judged this candidate"
                replies[task.index] = Refusal("refused", "worker", message)
            else:
                self._retry_alone(task, replies)

    def _retry_alone(self, task: "_Task", replies: dict[int, str | Refusal]) -> None:
        """Run a task again while no other worker is busy."""
        while self._busy:
            self._collect(replies)
        self._submit(replace(task, is_retry=True), replies)
        while self._busy:
            self._collect(replies)

    def _start(self) -> None:
        self._server = ForkServer(
            WORKER_JOB,
            self.signature.to_json(),
            self.signature.limits.worker,
            self.workers,
            self.allow_missing,
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
    is_retry: bool = False


def _parse_reply(data: bytes, wall_seconds: float) -> str | Refusal:
    """Return the IR or the refusal from a dispatcher's reply, whose body is untrusted."""
    status, body = data[:1], data[1:]
    if status == OUT_OF_TIME:
        message = f"tracing took more than {wall_seconds:g} s, twice"
        return Refusal("timed out", "wall-clock", message)
    if status == OUT_OF_CPU:
        return Refusal("timed out", "cpu", "tracing takes too much processor time")
    if status == TOO_LONG:
        return Refusal("too costly", "ir", "the traced program is too large")
    malformed = Refusal("refused", "worker", "the worker exited without a valid reply")
    if status != DONE:
        return malformed
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return malformed
    if type(reply) is not dict or not all(type(v) is str for v in reply.values()):
        return malformed
    if set(reply) == {"ir"}:
        return reply["ir"]
    if set(reply) != {"verdict", "rule", "message"} or reply["verdict"] not in WORKER_VERDICTS:
        return malformed
    if not reply["rule"].replace("-", "").isalpha() or len(reply["rule"]) > 40:
        return malformed
    return Refusal(reply["verdict"], reply["rule"], reply["message"])


def _refused(refusal: Refusal) -> Verdict:
    return Verdict(verdict=refusal.verdict, rule=refusal.rule, message=refusal.message)


def _duplicate(original: str, reason: str, fields: dict[str, Any]) -> Verdict:
    return Verdict(
        verdict=DUPLICATE,
        rule=DUPLICATE,
        message=f"equals {original}: {reason}",
        duplicate_of=original,
        **fields,
    )
