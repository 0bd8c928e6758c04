"""`sdjax stats`: compute the statistics of a model on data, and store them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.core.versions import current_versions
from sdjax.evaluation.api import files_fingerprint
from sdjax.evaluation.task import read_problems, read_training
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.atomic_write import resolve_new_folder, staged_folder, write_file
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import locate
from sdjax.io.safetensors_writer import (
    MAX_FILE_BYTES,
    assign_files,
    write_index,
    write_safetensors,
)
from sdjax.io.statistics_folder import MANIFEST, default_folder
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.io.weights_digest import weights_digest
from sdjax.merging.statistics import BY
from sdjax.models.config import ModelConfig
from sdjax.models.types import Params
from sdjax.sharding.memory import exhaustion_reported, require_fit
from sdjax.statistics.config import StatisticsConfig
from sdjax.statistics.examples import batches, fingerprint, read_texts
from sdjax.statistics.progress import Progress
from sdjax.statistics.sums import Sums, add_batch, means, zero_sums
from sdjax.training.packing import Example
from sdjax.tuning.loss import training_examples
from sdjax.xla.compiler_options import lean_options

_FEWER = "lower --batch or --max-length, leave out --kinds gram, or use more devices"


@dataclass(frozen=True, kw_only=True)
class StatisticsResult:
    """Statistics that have been stored.

    Attributes:
        folder: their folder.
        examples: number of examples.
        tokens: number of their tokens.
        count: number of arrays.
        bytes: their size.
    """

    folder: Path
    examples: int
    tokens: int
    count: int
    bytes: int


def compute_stats(
    model: str,
    out: Path | None = None,
    *,
    data: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    chat: bool = False,
    settings: StatisticsConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    trust_code: bool = False,
    allow_missing: Collection[str] = (),
) -> StatisticsResult:
    """Compute the statistics of a model on data, and store them.

    The folder appears only when it is complete. An interrupted computation resumes when it is
    called again with the same arguments; its result is identical to that of an uninterrupted one.

    Args:
        model: a name as in `sdjax.load_model`, also MODEL+ADAPTER.
        out: folder of the statistics; MODEL.stats next to the model by default.
        data: JSONL file of texts; with `task`, the file or folder with the task's problems.
        task: task whose training problems are the examples.
        limit: use only the first examples.
        chat: format the problems with the tokenizer's chat template.
        settings: the statistics, and how they are computed.
        mesh: mesh to shard the model and the sums over.
        dtype: dtype of weights and activations; float32 on CPUs, bfloat16 elsewhere by default.
        trust_code: whether a task's class may be imported.
        allow_missing: layers of confinement that this machine may lack, for tasks that need them.

    Raises:
        UserError: the model or the data cannot be read, `out` exists, or the memory does not
            suffice.

    Examples:
        >>> from pathlib import Path
        >>> import sdjax
        >>> from sdjax.statistics.config import StatisticsConfig
        >>> settings = StatisticsConfig(kinds=("gram",))
        >>> out = Path("reader.stats")
        >>> result = sdjax.compute_stats(  # doctest: +SKIP
        ...     "zoo:reader", out, task="arithmetic", limit=100, settings=settings
        ... )
        >>> sdjax.load_stats(out)["gram/layers/0/mlp/down_proj"].shape  # doctest: +SKIP
        (512, 512)
    """
    settings = settings or StatisticsConfig()
    folder, adapter = locate(model)
    out = out or default_folder(model)
    if out is None:
        raise UserError(f"{model}: nothing is written next to this model; pass --out DIR")
    _require_new(out)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    length = min(settings.max_length, config.max_seq_len)
    if task is None:
        if data is None:
            raise UserError("stats requires --data FILE or --task TASK")
        examples = read_texts(data, tokenizer, length, limit)
    else:
        examples = _problems(
            task,
            tokenizer,
            length,
            data=data,
            chat=chat,
            trust_code=trust_code,
            allow_missing=tuple(allow_missing),
        )[:limit]
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    dtype = jnp.dtype(dtype)
    identity = {
        "settings": asdict(settings),
        "weights": weights_digest(folder, adapter),
        "text": fingerprint(examples),
        "dtype": dtype.name,
        "mesh": None if mesh is None else dict(mesh.shape),
        "versions": current_versions(),
    }
    params = load_model(folder, adapter=adapter, dtype=dtype, mesh=mesh)[1]
    files = files_fingerprint(*([folder] if adapter is None else [folder, adapter]))
    progress = Progress(out, hashlib.sha256(repr((identity, files)).encode()).hexdigest())
    with exhaustion_reported("computing statistics", remedy=_FEWER):
        sums = _sum_up(params, examples, progress, config=config, settings=settings, mesh=mesh)
    tokens = sum(map(len, examples))
    manifest = {
        "format": 1,
        "model": model,
        "data": data,
        "task": task,
        "chat": chat,
        "examples": len(examples),
        "tokens": tokens,
        **identity,
    }
    size = _write(out, sums, manifest, examples=len(examples), tokens=tokens)
    progress.remove()
    return StatisticsResult(
        folder=out, examples=len(examples), tokens=tokens, count=len(sums), bytes=size
    )


def _require_new(out: Path) -> None:
    """Raise UserError if a folder has statistics already, or anything else."""
    if (out / MANIFEST).is_file():
        raise UserError(
            f"{out}: has statistics already; write others with --out DIR and name DIR {BY}, or "
            "remove this folder"
        )
    resolve_new_folder(out)


def _problems(
    name: str, tokenizer: Tokenizer, max_length: int, *, chat: bool, **options: Any
) -> list[Example]:
    """Return the training problems of a task, without those of development and test."""
    task = find_task(name, **options)
    held_out = [p for split in ("development", "test") for p in read_problems(task, split)]
    problems = read_training(task, held_out)
    if not problems:
        raise UserError(f"task {task.name} has no training problems; use --data FILE")
    return training_examples(task, problems, tokenizer, max_length=max_length, chat=chat)


def _sum_up(
    params: Params,
    examples: list[Example],
    progress: Progress,
    *,
    config: ModelConfig,
    settings: StatisticsConfig,
    mesh: Mesh | None,
) -> Sums:
    """Return the sums over all examples, from where an earlier attempt was interrupted."""
    sums, done = progress.read(zero_sums(config, settings, mesh))
    placed = {name: value.sharding for name, value in sums.items()}
    step = jax.jit(
        partial(add_batch, config=config, settings=settings), donate_argnums=1, out_shardings=placed
    )
    executables: dict[int, jax.stages.Compiled] = {}
    steps = list(batches(examples, settings.batch))
    every = -(-settings.checkpoint_every // settings.batch)
    with progress_bar("statistics", len(steps), completed=done) as advance:
        for number, batch in enumerate(steps[done:], done + 1):
            time = batch["tokens"].shape[1]
            if time not in executables:
                options = lean_options() if jax.default_backend() == "cpu" else None
                executables[time] = step.lower(params, sums, batch).compile(options)
                require_fit(executables[time], "computing statistics", remedy=_FEWER)
            sums = executables[time](params, sums, batch)
            if number % every == 0 and number < len(steps):
                progress.write(sums, number)
            advance()
    return sums


def _write(
    out: Path, sums: Sums, manifest: Mapping[str, Any], *, examples: int, tokens: int
) -> int:
    """Write the statistics and the manifest; return their size in bytes."""
    arrays = jax.jit(partial(means, examples=examples, tokens=tokens), donate_argnums=0)(sums)
    files = assign_files(arrays, MAX_FILE_BYTES)
    with staged_folder(out) if jax.process_index() == 0 else nullcontext() as staged:
        for file, names in files.items():
            path = None if staged is None else staged / file
            write_safetensors(path, {name: arrays[name] for name in names})
        if staged is not None:
            write_index(staged, files, arrays)
            write_file(staged / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return sum(np.dtype(array.dtype).itemsize * array.size for array in arrays.values())
