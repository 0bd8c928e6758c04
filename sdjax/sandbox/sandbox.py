"""The sandbox: takes source text and returns a verdict with a verified array program.

This is the parent's side, which never executes source text. Workers (`worker/`) trace a candidate
and send its IR as untrusted bytes; the parent decodes and verifies the IR (`verify/`). Other
workers (`compiler/`) compile the program and run it on probe tensors. Verdicts are issued in the
order of the sources, so that duplicates are the same in every run.
"""

import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdjax.core.errors import UserError
from sdjax.isolation.client import Job
from sdjax.isolation.confine import require_layers
from sdjax.isolation.pool import Reply, Request, WorkerPool
from sdjax.sandbox.findings import Findings
from sdjax.sandbox.merge_trial import MergeTrial
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.replies import parse_probe, parse_trace, parse_trial
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import ADMITTED, DUPLICATE, DuplicateIndex, Verdict
from sdjax.sandbox.verify.verified_program import VerifiedProgram, verify_ir

TRACER, COMPILER = 0, 1  # jobs of the pool
JOBS = ("sdjax.sandbox.worker.entry", "sdjax.sandbox.compiler.entry")


class Sandbox:
    """Sandbox that judges candidates in confined worker processes.

    A candidate is Python source text that defines `merge_models(task_vectors, ...)`, which returns
    one tensor (float32, of the task vectors' shape), or `merge_trees(task_vectors, ...)`, which
    returns a dict from tensor path to tensor. The sandbox is a context manager.

    `verdict.program` is callable with a dict from expert to task vector and can be traced by
    `jax.jit`.

    Attributes:
        signature: expert slots, tensors and limits that candidates are judged against.
        workers: number of candidates that are traced, and that are compiled, at the same time.
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
        'line 1: `import os` is not allowed; available: jax, numpy, math, functools, ...'
    """

    def __init__(
        self, signature: MergeSignature, workers: int = 2, allow_missing: Collection[str] = ()
    ):
        """Prepare a sandbox; entering it starts the workers.

        Args:
            signature: expert slots, tensors and limits that candidates are judged against.
            workers: number of candidates that are traced, and that are compiled, at the same time.
            allow_missing: layers of confinement that this machine may lack. Entering the sandbox
                raises UserError if any other layer is missing.
        """
        if workers < 1:
            raise ValueError("a sandbox needs at least one worker")
        self.signature, self.workers = signature, workers
        self.allow_missing = tuple(allow_missing)
        self.layers: tuple[str, ...] = ()
        self._entered = False
        limits = (signature.limits.worker, signature.limits.compiler)
        jobs = [
            Job(module=module, argument=signature.to_json(), limits=limit, workers=workers)
            for module, limit in zip(JOBS, limits, strict=True)
        ]
        self._pool = WorkerPool(jobs, self.allow_missing)

    def __enter__(self) -> "Sandbox":
        self.layers = require_layers(self.allow_missing)
        self._entered = True
        self._pool.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._entered = False
        self._pool.stop()

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
        self._check_running()
        batch = _Batch(seen=DuplicateIndex() if seen is None else seen)
        pending = enumerate(sources)
        next_index, count = 0, None  # count: number of sources once it is known
        try:
            while count is None or next_index < count:
                while self._pool.idle(TRACER) and count is None and batch.size < 4 * self.workers:
                    index, source = next(pending, (None, ""))
                    if index is None:
                        count = next_index + batch.size
                    else:
                        self._trace(batch, index, source)
                while batch.waiting and self._pool.idle(COMPILER):
                    self._probe(batch.waiting.popleft())
                if batch.is_decided(next_index):
                    name = names[next_index] if names else f"#{next_index}"
                    yield next_index, batch.conclude(next_index, name)
                    next_index += 1
                elif self._pool.busy:
                    self._collect(batch)
        finally:
            if self._pool.busy:  # the caller abandoned the iteration
                self._pool.stop()

    def try_merge(self, ir: str, trial: MergeTrial) -> Refusal | None:
        """Compile and run a merge with a program in a worker before this process does.

        Args:
            ir: IR of an admitted program.
            trial: what the merge will compile.

        Returns:
            the reason why the program must not be compiled here; None if there is none.

        Raises:
            UserError: the sandbox has not been entered.
        """
        self._check_running()
        data = json.dumps({"ir": ir, "trial": trial.to_json()}).encode()
        replies: list[Reply] = []
        try:
            self._pool.submit(Request(job=COMPILER, key=None, data=data))
            while not replies:
                replies = self._pool.collect()
        finally:
            if self._pool.busy:
                self._pool.stop()
        return parse_trial(replies[0], self.signature.limits)

    def _check_running(self) -> None:
        if not self._entered:
            raise UserError("the sandbox is not running: use it as `with Sandbox(...) as sandbox:`")
        self._pool.start()  # the previous iteration may have been abandoned

    def _trace(self, batch: "_Batch", index: int, source: str) -> None:
        batch.size += 1
        max_bytes = self.signature.limits.source_bytes
        if len(source) > max_bytes:
            message = f"the source is longer than {max_bytes} bytes"
            batch.traced[index] = Refusal("refused", "size", message)
        else:
            data = source.encode("utf-8", "surrogatepass")
            self._pool.submit(Request(job=TRACER, key=index, data=data))

    def _probe(self, candidate: "_Candidate") -> None:
        identity = candidate.program.identity
        data = json.dumps({"ir": candidate.ir, "trial": None}).encode()
        self._pool.submit(Request(job=COMPILER, key=identity, data=data))

    def _collect(self, batch: "_Batch") -> None:
        """Wait for a reply: the IR of a candidate, or the findings on a program."""
        limits = self.signature.limits
        for reply in self._pool.collect():
            if isinstance(reply.key, str):
                batch.findings[reply.key] = parse_probe(reply, limits, self.signature.slots)
                continue
            assert isinstance(reply.key, int)
            ir = parse_trace(reply, limits)
            try:
                if isinstance(ir, Refusal):
                    raise ir
                candidate = _Candidate(ir=ir, program=verify_ir(ir, self.signature))
            except Refusal as refusal:
                batch.traced[reply.key] = refusal
                continue
            batch.add(reply.key, candidate)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A candidate whose IR is verified."""

    ir: str
    program: VerifiedProgram


@dataclass(kw_only=True)
class _Batch:
    """State of one iteration over candidates.

    Attributes:
        seen: index of the distinct programs.
        size: number of candidates that have been taken and have no verdict yet.
        traced: candidate or refusal by index.
        waiting: candidates to probe.
        findings: result of the probe by identity; None while it is pending.
    """

    seen: DuplicateIndex
    size: int = 0
    traced: dict[int, _Candidate | Refusal] = field(default_factory=dict)
    waiting: deque[_Candidate] = field(default_factory=deque)
    findings: dict[str, Findings | Refusal | None] = field(default_factory=dict)

    def add(self, index: int, candidate: _Candidate) -> None:
        """Add a verified candidate; an identity is probed once."""
        self.traced[index] = candidate
        identity = candidate.program.identity
        if identity not in self.findings and self.seen.find(identity) is None:
            self.findings[identity] = None
            self.waiting.append(candidate)

    def is_decided(self, index: int) -> bool:
        """Return whether the verdict of a candidate can be concluded."""
        traced = self.traced.get(index)
        if not isinstance(traced, _Candidate):
            return traced is not None
        identity = traced.program.identity
        return self.seen.find(identity) is not None or self.findings.get(identity) is not None

    def conclude(self, index: int, name: str) -> Verdict:
        """Return the verdict of a candidate, given those of all earlier ones."""
        self.size -= 1
        traced = self.traced.pop(index)
        if isinstance(traced, Refusal):
            return _refused(traced)
        program = traced.program
        fields: dict[str, Any] = {
            "identity": program.identity,
            "structure": program.structure,
            "cost": program.cost,
            "memory": program.memory,
            "requests": program.requests,
            "form": program.form,
            "ir": traced.ir,
            "program": program,
        }
        if original := self.seen.find(program.identity):
            message = f"equals {original}: the same array program"
            return Verdict(
                verdict=DUPLICATE, rule=DUPLICATE, message=message, duplicate_of=original, **fields
            )
        findings = self.findings[program.identity]
        if isinstance(findings, Refusal):
            return replace(_refused(findings), **fields | {"ir": None, "program": None})
        assert findings is not None
        fields |= {"fingerprint": findings.fingerprint, "notes": findings.notes}
        similar_to = self.seen.find_similar(findings.fingerprint)
        self.seen.add(program.identity, findings.fingerprint, name)
        return Verdict(verdict=ADMITTED, similar_to=similar_to, **fields)


def _refused(refusal: Refusal) -> Verdict:
    return Verdict(verdict=refusal.verdict, rule=refusal.rule, message=refusal.message)
