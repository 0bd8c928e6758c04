"""Support for runs on several processes.

All processes execute the same phases, each with its own store: the main process writes to the file
and the others to an in-memory mirror, so all processes read the same data and make the same
decisions. Only the main process has a sandbox; it broadcasts the verdicts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from sdjax.core.config import errors_at
from sdjax.core.versions import current_versions
from sdjax.isolation.confine import require_layers
from sdjax.sandbox.merge_trial import MergeTrial
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import Verdict
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.search.attempts import DATABASE_FILE
from sdjax.search.config import RunConfig, config_from
from sdjax.search.context import ScoringContext
from sdjax.search.limits import check_endpoints, check_limits
from sdjax.search.provenance import run_inputs
from sdjax.search.resume import resume_store, stored_config_changes
from sdjax.search.store import Store
from sdjax.sharding.multihost import broadcast_from_main, is_main_process


def open_store(context: ScoringContext, folder: Path, *, accept_versions: bool = False) -> Store:
    """Create the store of a new run, or open that of an existing run to resume it.

    Args:
        context: the loaded run.
        folder: the run folder.
        accept_versions: resume an existing run although versions or inputs differ.

    Raises:
        UserError: the existing run cannot be resumed with this config, or with these versions and
            inputs unless they are accepted.
    """
    inputs = run_inputs(context)  # on every process, since weights are distributed
    if jax.process_count() == 1:
        return _open_file(context.config, inputs, folder, accept_versions)
    if not is_main_process():
        return Store.mirror(folder, broadcast_from_main(bytes))
    store = _open_file(context.config, inputs, folder, accept_versions)
    broadcast_from_main(store.content)
    return store


def stored_config(
    folder: Path, overrides: Sequence[str] = (), *, trust_limits: bool = False
) -> RunConfig:
    """Return the config of the run in a folder, with overrides such as "iterations=5".

    Raises:
        UserError: an invalid config, or limits above the defaults or endpoints that are not
            trusted; see `sdjax.search.limits`.
    """

    def read() -> bytes:
        with Store.open(folder) as store:
            return json.dumps(store.run().config).encode()

    stored = json.loads(broadcast_from_main(read))
    config = config_from(stored, f"{folder}: its config", overrides)
    check_limits(config.sandbox, str(folder), trusted=trust_limits, overrides=overrides)
    check_endpoints(config, str(folder), trusted=trust_limits, overrides=overrides)
    return config


def check_resumption(config: RunConfig, folder: Path) -> None:
    """Check a config against that of the run in a folder, if there is one, before loading models.

    Raises:
        UserError: a change that is not possible; see `sdjax.search.extension`.
    """
    if is_main_process() and (folder / DATABASE_FILE).exists():
        with Store.open(folder) as store:
            stored_config_changes(store, config)


def main_process_layers(config: RunConfig) -> tuple[str, ...]:
    """Return the confinement layers of the sandbox, which only the main process has.

    Raises:
        UserError: a layer is missing on the main process, and the config does not allow that.
    """
    if not is_main_process():
        return ()
    with errors_at(config, "sandbox.allow_missing"):
        return require_layers(config.sandbox.allow_missing)


def open_sandbox(context: ScoringContext) -> AbstractContextManager[Sandbox | None]:
    """Start the sandbox on the main process; return a context of None on the others."""
    if not is_main_process():
        return nullcontext()
    config = context.config.sandbox
    return Sandbox(context.signature, config.workers, allow_missing=config.allow_missing)


def judge_all(
    sandbox: Sandbox | None, sources: Sequence[str]
) -> Iterator[tuple[int, Verdict, tuple[str, ...]]]:
    """Yield (index, verdict, confinement layers) of each source in order, on every process.

    Only the main process yields verdicts with a program, which it need not verify again.

    Args:
        sandbox: the sandbox on the main process; None on the others.
        sources: source code of the candidates.
    """
    if jax.process_count() == 1:
        assert sandbox is not None
        yield from ((n, verdict, sandbox.layers) for n, verdict in sandbox.judge_all(sources))
        return
    verdicts = iter(()) if sandbox is None else sandbox.judge_all(sources)
    local: Verdict | None = None

    def judge_next() -> bytes:
        nonlocal local
        assert sandbox is not None  # only the main process calls this
        _, local = next(verdicts)
        return json.dumps([local.to_dict(), sandbox.layers]).encode()

    for index in range(len(sources)):
        data, layers = json.loads(broadcast_from_main(judge_next))
        yield index, local or Verdict.from_dict(data), tuple(layers)


class SharedJudge:
    """The sandbox of the main process, with the same verdicts and programs on every process.

    Attributes:
        signature: merge signature that programs are verified against.
    """

    def __init__(self, sandbox: Sandbox | None, signature: MergeSignature) -> None:
        """Wrap the sandbox, which is None on all processes but the main one."""
        self._sandbox = sandbox
        self.signature = signature

    def judge(self, source: str, *, name: str) -> Verdict:
        """Judge one candidate; `name` is unused, since it is not compared with others."""
        del name
        ((_, verdict),) = self.judge_all([source])
        return verdict

    def judge_all(self, sources: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the verdict of each source, in order."""
        for index, verdict, _ in judge_all(self._sandbox, sources):
            if verdict.program is None and verdict.ir is not None:
                program = verify_ir(verdict.ir, self.signature)
                verdict = dataclasses.replace(verdict, program=program)
            yield index, verdict

    def try_merge(self, ir: str, trial: MergeTrial) -> Refusal | None:
        """Return why a merge is refused, or None."""
        return try_merge(self._sandbox, ir, trial)


def try_merge(sandbox: Sandbox | None, ir: str, trial: MergeTrial) -> Refusal | None:
    """Return on every process why the main process's sandbox refuses a merge; None if it does not.

    Args:
        sandbox: the sandbox on the main process; None on the others.
        ir: IR of an admitted program.
        trial: what the merge compiles.
    """

    def run() -> bytes:
        assert sandbox is not None  # only the main process calls this
        refusal = sandbox.try_merge(ir, trial)
        fields = refusal and (refusal.verdict, refusal.rule, refusal.message)
        return json.dumps(fields).encode()

    fields = json.loads(broadcast_from_main(run))
    return None if fields is None else Refusal(*fields)


def _open_file(
    config: RunConfig, inputs: Mapping[str, str], folder: Path, accept_versions: bool
) -> Store:
    if (folder / DATABASE_FILE).exists():
        store = Store.open(folder, write=True)
        try:
            resume_store(store, config, inputs, accept_versions=accept_versions)
        except BaseException:
            store.close()
            raise
        return store
    return Store.create(
        folder,
        config=config.to_json(),
        versions=current_versions(),
        layers=main_process_layers(config),
        inputs=inputs,
    )
