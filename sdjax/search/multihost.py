"""A run on one process or on several: what there is once, and what every process has.

The phases are one program that all processes run, each with a store of its own: the main process
writes the file, the others a mirror in memory, so that all read the same and decide the same. The
sandbox is the main process's; every process gets its verdicts.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from sdjax.isolation.confine import require_layers
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import Verdict
from sdjax.search.config import RunConfig
from sdjax.search.config_reader import config_from
from sdjax.search.context import RunContext
from sdjax.search.database import FILE
from sdjax.search.store import Store
from sdjax.sharding.multihost import broadcast_from_main, is_main_process


def open_store(config: RunConfig, folder: Path) -> Store:
    """The store of a new run, or of the run with this very configuration in the folder."""
    if jax.process_count() == 1:
        return _open_file(config, folder)
    if not is_main_process():
        return Store.mirror(folder, broadcast_from_main(bytes))
    store = _open_file(config, folder)
    broadcast_from_main(store.content)
    return store


def stored_config(folder: Path) -> RunConfig:
    """The configuration of the run in a folder."""

    def read() -> bytes:
        with Store.open(folder) as store:
            return json.dumps(store.run().config).encode()

    return config_from(json.loads(broadcast_from_main(read)), f"{folder}: its config")


def open_sandbox(bench: RunContext) -> AbstractContextManager[Sandbox | None]:
    """The sandbox, on the main process."""
    if not is_main_process():
        return nullcontext()
    settings = bench.config.sandbox
    return Sandbox(bench.signature, settings.workers, allow_missing=settings.allow_missing)


def judge_all(
    sandbox: Sandbox | None, sources: Sequence[str]
) -> Iterator[tuple[int, Verdict, tuple[str, ...]]]:
    """(index, verdict, layers it was given under) for every source, in order.

    On every process, as soon as it is known.
    """
    verdicts = iter(()) if sandbox is None else sandbox.judge_all(sources)

    def judge_next() -> bytes:
        assert sandbox is not None  # the main process, which alone calls this, has it
        _, verdict = next(verdicts)
        return json.dumps([verdict.to_dict(), sandbox.layers]).encode()

    for index in range(len(sources)):
        fields, layers = json.loads(broadcast_from_main(judge_next))
        yield index, Verdict.from_dict(fields), tuple(layers)


def _open_file(config: RunConfig, folder: Path) -> Store:
    if (folder / FILE).exists():
        store = Store.open(folder, write=True)
        store.check_config(config.to_json())
        return store
    versions = {
        name: importlib.metadata.version(name) for name in ("sdjax", "jax", "flax", "optax")
    }
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    versions |= {"python": platform.python_version(), "devices": devices}
    layers = require_layers(config.sandbox.allow_missing)
    return Store.create(folder, config=config.to_json(), versions=versions, layers=layers)
