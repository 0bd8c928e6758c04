"""`sdjax train`: fine-tune a model and write a model folder or an adapter folder."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdjax.cli.group import FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import handle_signals, resume_hint
from sdjax.cli.run import overrides_option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import jax
    from jax.sharding import Mesh

    from sdjax.io.tokenizer import Tokenizer
    from sdjax.models.lora import Adapter
    from sdjax.training.config import DPOJob, SFTJob, TrainingJob
    from sdjax.training.data import TrainingRow
    from sdjax.training.trainable import Trainable

logger = logging.getLogger(__name__)

# Keys that may change when a job is resumed, for example after the loss became NaN. `out` names the
# folder that the checkpoints are in, whichever way it is written.
_CHANGEABLE = ("learning_rate", "max_grad_norm", "checkpoint_every", "out")

# Keys that the reference log-probabilities depend on, in addition to the pairs and the versions.
_REFERENCE_KEYS = (
    *("model", "adapter", "rank", "alpha", "target_modules", "rng_seed"),
    *("reference", "compute_dtype", "batch_size", "mesh"),
)


@click.command(
    epilog=examples(
        "sdjax train sft train-sft",
        "sdjax train dpo train-dpo --out trained --set learning_rate=1e-5",
    )
)
@click.argument("kind", type=click.Choice(["sft", "dpo", "warmstart"]))
@click.argument("config")
@click.option("--out", type=FOLDER_PATH, help="Folder to write, in place of the config's `out`.")
@overrides_option
@click.option(
    "--accept-versions",
    is_flag=True,
    help="Resume although versions of packages, weights or data differ.",
)
def train(
    kind: str, config: str, out: Path | None, overrides: tuple[str, ...], accept_versions: bool
) -> None:
    """Fine-tune a model.

    KIND is sft (prompts with completions), dpo (preference pairs), or warmstart (candidates in the
    algorithm API, to prepare a generator for a search). CONFIG is a YAML file, or the name of a
    config that ships with the package: train-sft, train-dpo or train-warmstart. Run the same
    command again to resume an interrupted job.
    """
    from sdjax.core.config import read_dataclass
    from sdjax.core.config_files import find_config
    from sdjax.sharding.multihost import start_distributed
    from sdjax.training.config import JOBS

    command = ["sdjax", "train", kind, config, *([] if out is None else ["--out", str(out)])]
    command += [word for override in overrides for word in ("--set", override)]
    with resume_hint(f"resume with: {shlex.join(command)}"):
        if start_distributed():
            handle_signals()  # JAX has replaced a handler
        options = {} if out is None else {"out": str(out)}
        job = read_dataclass(JOBS[kind], find_config(config, kind), overrides, options=options)
        echo(_run_job(kind, job, accept_versions=accept_versions))


def _run_job(kind: str, job: TrainingJob, *, accept_versions: bool) -> str:
    """Run a training job and return a one-line summary.

    The folder OUT.training contains the metrics and, until OUT is complete, the checkpoints and the
    reference log-probabilities.

    Raises:
        UserError: a key, a model, an adapter, a row of the data or the output folder is invalid,
            the job was started under other versions, the loss is not finite, or the disk is full.
    """
    import shutil

    import jax
    import jax.numpy as jnp

    from sdjax.core.config import errors_at
    from sdjax.core.errors import UserError
    from sdjax.core.random_keys import fold_in_name
    from sdjax.core.versions import current_versions
    from sdjax.io.hf_checkpoint import load_model
    from sdjax.io.model_paths import adapter_folder, locate
    from sdjax.io.peft import read_adapter
    from sdjax.io.tokenizer import load_tokenizer
    from sdjax.models.fingerprint import fingerprint
    from sdjax.models.lora import init_adapter, shard_adapter
    from sdjax.training.trainable import full_finetune, lora_finetune

    out = Path(job.out)
    if os.path.lexists(out):  # pathlib raises on invalid names
        raise UserError(f"{out}: already exists; choose another folder with --out")
    with errors_at(job, "model"):
        folder = locate(job.model)[0]
    full = job.rank is None and job.adapter is None
    compute_dtype = jnp.dtype(job.compute_dtype)
    mesh = job.mesh.make(default_axis="fsdp")
    # Frozen weights are stored in the compute dtype.
    model, params = load_model(job.model, dtype=jnp.float32 if full else compute_dtype, mesh=mesh)
    key = jax.random.key(job.rng_seed)
    adapter = None
    if job.adapter is not None:
        with errors_at(job, "adapter"):
            adapter = read_adapter(adapter_folder(job.adapter), model, model=folder)
    elif job.rank is not None:
        adapter = init_adapter(
            model,
            fold_in_name(key, "adapter"),
            rank=job.rank,
            alpha=job.alpha,
            target_modules=job.target_modules,
        )
    if adapter is not None and mesh is not None:
        adapter = shard_adapter(adapter, model, mesh)
    if adapter is None:
        trainable = full_finetune(model, params, dtype=compute_dtype)
    else:
        trainable = lora_finetune(model, params, adapter)
    versions = current_versions() | {"model": fingerprint(params)}
    if job.adapter is not None:
        versions["adapter"] = fingerprint(trainable.trainable)
    del params  # training donates them
    work_folder = out.with_name(f"{out.name}.training")
    trained, losses, candidates = _train(
        kind,
        job,
        trainable,
        load_tokenizer(folder),
        fold_in_name(key, "data"),
        work_folder,
        versions=versions,
        accept_versions=accept_versions,
    )
    programs = _write_result(job, trainable, trained, adapter, candidates, out, mesh)
    shutil.rmtree(work_folder / "checkpoints", ignore_errors=True)
    (work_folder / "reference.npz").unlink(missing_ok=True)
    suffix = f"; {programs}" if programs else ""
    if not losses:
        return f"{out}: written from its last checkpoint{suffix}"
    first, last = min(losses), max(losses)
    change = f"loss {losses[first]:.4f} at step {first}, {losses[last]:.4f} at step {last}"
    return f"{out}: {change}{suffix}"


def _train(
    kind: str,
    job: TrainingJob,
    trainable: Trainable,
    tokenizer: Tokenizer,
    key: jax.Array,
    work_folder: Path,
    *,
    versions: Mapping[str, str],
    accept_versions: bool,
) -> tuple[Any, dict[int, float], Sequence[str]]:
    """Prepare the data and train.

    Returns:
        the trained pytree, the loss of each step that this call executed, and the candidates of a
        warm start.
    """
    import dataclasses
    from functools import partial

    from sdjax.core.config import errors_at, path_of
    from sdjax.models.fingerprint import text_fingerprint
    from sdjax.programs.prompts import find_prompt, names
    from sdjax.training import api
    from sdjax.training.checkpoints import MetricsLog, TrainingCheckpoints, cached_array
    from sdjax.training.config import DPOJob, SFTJob, WarmstartJob
    from sdjax.training.data import fingerprint, tokenize_examples, tokenize_pairs
    from sdjax.training.warmstart import make_warmstart_data, sample_candidates

    max_seq_len = trainable.config.max_seq_len
    rows: Sequence[TrainingRow] = ()
    candidates: Sequence[str] = ()
    tokens = ""
    if isinstance(job, SFTJob):
        rows = _rows(job)
        # Each example must fit the model, but a row that packs several may be longer.
        examples = tokenize_examples(rows, tokenizer, min(job.max_length, max_seq_len))
        tokens = text_fingerprint(examples)
    elif isinstance(job, DPOJob):
        rows = _rows(job)
        pairs = tokenize_pairs(rows, tokenizer, min(job.max_length or max_seq_len, max_seq_len))
        tokens = text_fingerprint(pairs)
    elif isinstance(job, WarmstartJob):
        with errors_at(job, "prompt"):
            shipped = job.prompt in names()
            prompt = job.prompt if shipped else str(path_of(job, "prompt", job.prompt))
            find_prompt(prompt)  # checked before the candidates, which may take minutes
            candidates = sample_candidates(job.programs, job.rng_seed, slots=len(job.experts))
            data = make_warmstart_data(tokenizer, prompt, job.experts, candidates)
        tokens = text_fingerprint(data)
        logger.info("%d candidates, prompt of %d tokens", len(candidates), len(data.prompt))
    description = {"kind": kind, "rows": fingerprint(rows)} | dataclasses.asdict(job)
    for name in _CHANGEABLE:
        del description[name]
    versions = {**versions, "tokens": tokens}
    losses: dict[int, float] = {}
    with (
        TrainingCheckpoints(
            work_folder / "checkpoints",
            every=job.checkpoint_every,
            job=description,
            versions=versions,
            accept_versions=accept_versions,
        ) as checkpoints,
        MetricsLog(work_folder) as metrics_log,
    ):

        def on_step(step: int, metrics: dict[str, float]) -> None:
            metrics_log.add(step, metrics)
            losses[step] = metrics["loss"]

        options: dict[str, Any] = {
            "key": key,
            "remat": job.remat,
            "title": f"train {kind}",
            "on_step": on_step,
            "checkpoints": checkpoints,
        }
        if isinstance(job, SFTJob):
            trained, _ = api.train_sft(
                trainable,
                examples,
                job,
                max_length=job.max_length,
                batch_size=job.batch_size,
                **options,
            )
        elif isinstance(job, DPOJob):
            settings = {name: description[name] for name in _REFERENCE_KEYS}
            settings["versions"] = versions  # of packages, weights, adapter and tokens
            cache = partial(cached_array, work_folder / "reference.npz", settings)
            trained, _ = api.train_dpo(trainable, pairs, job, reference_cache=cache, **options)
        else:
            assert isinstance(job, WarmstartJob)
            trained, _ = api.train_warmstart(
                trainable, data, job, batch_size=job.batch_size, **options
            )
    return trained, losses, candidates


def _rows(job: SFTJob | DPOJob) -> Sequence[TrainingRow]:
    """Read rows from a file, a dataset or, for preferences, a run folder."""
    from sdjax.core.config import errors_at, path_of
    from sdjax.core.errors import UserError
    from sdjax.search.pairs import preferences_of_run
    from sdjax.training.config import DPOJob
    from sdjax.training.data import number_rows, read_rows

    with errors_at(job, "data"):
        path = path_of(job, "data", job.data)
        if not (isinstance(job, DPOJob) and os.path.isdir(path)):
            return read_rows(str(path), job.split)
        rows = number_rows(str(path), preferences_of_run(path))
        if not rows:
            raise UserError(
                f"{path}: the run has no preference pairs yet; complete an iteration first"
            )
        return rows


def _write_result(
    job: TrainingJob,
    trainable: Trainable,
    trained: Any,
    adapter: Adapter | None,
    candidates: Sequence[str],
    out: Path,
    mesh: Mesh | None,
) -> str:
    """Write the model or the adapter; return the number of training programs, or ""."""
    import dataclasses

    import jax

    from sdjax.io.hf_checkpoint import load_model, write_model
    from sdjax.io.model_paths import adapter_folder, locate
    from sdjax.io.peft import write_adapter
    from sdjax.io.training_programs import (
        TrainingPrograms,
        read_training_programs,
        training_program_files,
    )
    from sdjax.merging.engine import default_slots
    from sdjax.models.lora import merge_lora
    from sdjax.models.tree import unflatten
    from sdjax.programs.signature import model_signature
    from sdjax.sandbox.trusted_identities import candidate_identities
    from sdjax.training.config import WarmstartJob
    from sdjax.training.warmstart import signature_digest

    folder, merged_adapter = locate(job.model)
    start_folder = merged_adapter or folder if job.adapter is None else adapter_folder(job.adapter)
    extra_files, summary = training_program_files(start_folder), ""
    if candidates:
        assert isinstance(job, WarmstartJob)
        signature = model_signature(trainable.config, default_slots(len(job.experts)), job.scope)
        programs = TrainingPrograms.create(
            candidates,
            candidate_identities(candidates, signature),
            signature=signature_digest(signature),
        )
        earlier = read_training_programs(start_folder)
        union = programs.union(earlier)
        extra_files = union.write(out.with_name(f"{out.name}.training"))
        total = len(union.identities)
        new = total - (0 if earlier is None else len(earlier.identities))
        summary = f"{new} new training programs, {total} with those of the start"
    if adapter is not None:
        adapter = dataclasses.replace(adapter, factors=trained)
    if job.save == "adapter":
        assert adapter is not None  # checked by the config class
        base = str(folder) if merged_adapter is None else job.model
        write_adapter(out, trainable.config, adapter, base=base, extra_files=extra_files)
        return summary
    # Stored in the dtypes of the original model, regardless of the compute dtype.
    original = load_model(job.model, mesh=mesh)[1]
    if adapter is None:
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), unflatten(trained), original)
    else:
        params = merge_lora(original, adapter)
    write_model(out, trainable.config, params, assets_from=folder, extra_files=extra_files)
    return summary
