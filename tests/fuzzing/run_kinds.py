"""Kinds: programs, run folders and checkpoints."""

import io
from pathlib import Path

import numpy as np

from tests.fuzzing import inputs, mutations
from tests.fuzzing.kinds import Kind
from tests.fuzzing.model_kinds import shared_model

MAX_SOURCE = 16_384  # bytes
_PYTHON = ("lambda", "eval", "def merge_models(x):", "import os", 'f"{x}"', "match x:", "\\")


def program() -> Kind:
    """Source text of a program, checked by the text rules."""
    from sdjax.cli.open_algorithm import source_of_method
    from sdjax.merging.methods.registry import methods

    texts = [source_of_method(name).encode() for name in methods()]
    return Kind(
        folders=[{"program.py": text} for text in texts],
        formats={"program.py": mutations.mutate_text},
        loaders=[(check_program, 1)],
        words=(*inputs.words("sandbox/worker/rules.py"), *_PYTHON),
    )


def check_program(folder: Path) -> None:
    from sdjax.core.errors import UserError
    from sdjax.programs.program_file import read_program
    from sdjax.sandbox.refusal import Refusal
    from sdjax.sandbox.worker.rules import check_text

    try:
        check_text(read_program(folder / "program.py", MAX_SOURCE), MAX_SOURCE)
    except Refusal as refusal:  # as `sdjax merge` reports it
        raise UserError(f"{refusal.verdict} ({refusal.rule}): {refusal.message}") from None


def run() -> Kind:
    """Run folder."""
    return Kind(
        folders=[inputs.run()],
        formats={"run.sqlite": mutations.mutate_sqlite},
        loaders=[
            (watch, 1),
            (read_run, 1),
            (tabulate_run, 1),
            (extend_run, 4),
            (report_run, 20),
            (plan_stored_run, 100),
        ],
        words=inputs.words("search/types.py", "search/config.py", "search/ranking.py"),
        writes=True,
    )


def watch(folder: Path) -> None:
    from sdjax.search.attempts import attempt_seconds, pending_attempt

    pending_attempt(folder)
    attempt_seconds(folder)


def read_run(folder: Path) -> None:
    from sdjax.cli.sandbox_options import signature_from_options
    from sdjax.search.context import verify_stored
    from sdjax.search.pairs import preferences_of_run
    from sdjax.search.ranking import final_ranking
    from sdjax.search.store import Store

    preferences_of_run(folder)
    with Store.open(folder) as store:
        config = store.config()
        programs = final_ranking(store, config.task.metric)
        program = store.program(programs[0].identity or "") if programs else None
    signature = signature_from_options(model=None, experts=None, scope=None, run=folder)
    if program is not None:
        verify_stored(program, signature)


def tabulate_run(folder: Path) -> None:
    from rich.console import Console

    from sdjax.report import final_table
    from sdjax.search.store import Store
    from sdjax.search.types import Setting

    console = Console(file=io.StringIO(), width=80)
    with Store.open(folder) as store:
        for setting in store.select(Setting):
            console.print(final_table(store, setting.name, width=80))


def report_run(folder: Path) -> None:
    from sdjax.report import write_report
    from sdjax.search.store import Store

    with Store.open(folder) as store:
        write_report(store, folder / "report.html")


def plan_stored_run(folder: Path) -> None:
    from sdjax.search.announcement import dry_run
    from sdjax.search.multihost import stored_config

    dry_run(stored_config(folder), folder, resume=True, accept_versions=True)


def extend_run(folder: Path) -> None:
    from sdjax.search.multihost import stored_config
    from sdjax.search.resume import resume_store
    from sdjax.search.store import Store

    config = stored_config(folder, ["iterations=5"])
    with Store.open(folder, write=True) as store:
        resume_store(store, config, {}, accept_versions=True)


def training_folder() -> Kind:
    """Working folder of a training job: metrics and cached arrays."""
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 4)]
    return Kind(
        folders=[{"metrics.jsonl": inputs.jsonl(lines), "reference.npz": inputs.cached_array()}],
        formats={
            "metrics.jsonl": mutations.mutate_jsonl,
            "reference.npz": mutations.mutate_bytes,
        },
        loaders=[(resume_training, 1)],
        writes=True,
    )


def resume_training(folder: Path) -> None:
    from sdjax.training.checkpoints import MetricsLog, cached_array

    with MetricsLog(folder) as log:
        log.add(3, {"loss": 0.25})
    array = cached_array(folder / "reference.npz", {}, lambda: np.ones(3), {})
    assert array.shape == (3,)


def partial_merge() -> Kind:
    """Result of a merge that was interrupted."""
    return Kind(
        folders=[inputs.partial_merge()],
        formats={
            "journal": mutations.mutate_jsonl,
            "model.safetensors": mutations.mutate_safetensors,
        },
        loaders=[(resume_merge, 1)],
        words=(
            "fingerprint",
            "tensor",
            "file",
            "boot",
            "../outside/secret.txt",
            "model.safetensors",
        ),
        shared=shared_model(),
        writes=True,
    )


def resume_merge(folder: Path) -> None:
    from sdjax.io.atomic_write import partial_path

    folder.rename(partial_path(folder.parent / "merged"))
    inputs.merge_base(folder.parent)


def checkpoint() -> Kind:
    """Checkpoints of a run's generator."""
    files = inputs.checkpoint()
    formats = {
        name: mutations.mutate_json if content.lstrip()[:1] == b"{" else mutations.mutate_bytes
        for name, content in files.items()
    }
    return Kind(folders=[files], formats=formats, loaders=[(restore, 1)], writes=True)


def restore(folder: Path) -> None:
    from sdjax.io.orbax import GeneratorCheckpoints

    checkpoints = GeneratorCheckpoints(folder)
    try:
        checkpoints.restore_adapter()
    finally:
        checkpoints.close()
