"""`sdjax train`: a training job from a YAML file to a model or an adapter folder.

Beside OUT stands OUT.training: metrics, and until OUT is there checkpoints and what a reference
made of the data. An interrupted job goes on when it is started again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.core.config import read_dataclass
from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.io.atomic_write import is_disk_full
from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.io.model_paths import model_folder
from sdjax.io.peft import read_adapter, write_adapter
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.io.training_programs import (
    TrainingPrograms,
    read_training_programs,
    training_program_files,
)
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter, init_adapter, merge_lora, shard_adapter
from sdjax.models.tree import unflatten
from sdjax.training.checkpoints import Metrics, TrainingCheckpoints, kept_array
from sdjax.training.data import Row, preference_pairs, read_rows, texts_to_learn
from sdjax.training.dpo import (
    DPOSettings,
    dpo_loss,
    pad_pairs,
    pair_batches,
    reference_logprobs,
)
from sdjax.training.fit import Loss, fit, parts_of, rematerialised
from sdjax.training.job_config import JOBS, DPOJob, Job, SFTJob, WarmstartJob
from sdjax.training.packing import batches_of, pack
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import Trainable, full_finetune, lora_finetune
from sdjax.training.warmstart import (
    draw_programs,
    identities_of,
    lesson_batches,
    make_lesson,
    name_of,
    signature_for,
)

# Of a run's folder, the rows to train on: prompt, chosen and rejected.
ReadRun = Callable[[Path], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training that is ready to begin.

    Attributes:
        batches: makes them, after what they need, which may take long.
        notes: what a user should know of the data.
        programs: those that are learnt from, where they are programs.
        rows: of the data, by which a training that goes on knows them again.
    """

    loss: Loss
    batches: Callable[[], Iterable[Any]]
    notes: Sequence[str]
    programs: tuple[str, ...] = ()
    rows: str = ""


# Metrics on the progress bar, beside the loss.
SHOWN = ("margin", "accuracy")

# What a training that goes on may have changed, such as after a loss that was not finite.
CHANGEABLE = ("learning_rate", "clip", "checkpoint_every")


# Beside OUT, the reference's log-probabilities; and what they depend on beside the pairs.
REFERENCE = "reference.npz"
OF_REFERENCE = (
    *("model", "adapter", "rank", "alpha", "projections", "random"),
    *("reference", "compute", "batch"),
)


def train_model(kind: str, config: Path, *, read_run: ReadRun, say: Callable[[str], None]) -> str:
    """Runs the job of a YAML file; returns what to print.

    Args:
        kind: of `JOBS`.
        read_run: reads the pairs of a run's folder.
        say: gets lines of news.

    Raises:
        UserError: a key, a model, an adapter, a row of the data or the output folder is wrong, the
            loss is not finite, or the disk is full.
    """
    job = read_dataclass(JOBS[kind], config)
    folder = model_folder(job.model)
    out = Path(job.out)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another out")
    # What training reads alone is kept in the dtype that it computes in.
    dtype = jnp.float32 if job.rank is None and job.adapter is None else jnp.dtype(job.compute)
    mesh = job.mesh.make(default_axis="fsdp")
    model, params = load_model(folder, dtype=dtype, mesh=mesh)
    tokenizer = load_tokenizer(folder)
    key = jax.random.key(job.random)
    adapter = _adapter(job, model, folder, key)
    if adapter is not None and mesh is not None:
        adapter = shard_adapter(adapter, model, mesh)
    trainee = (
        full_finetune(model, params, dtype=jnp.dtype(job.compute))
        if adapter is None
        else lora_finetune(model, params, adapter)
    )
    del params
    beside = out.with_name(f"{out.name}.training")
    course = _course(job, trainee, tokenizer, key, read_run, beside)
    for note in course.notes:
        say(note)
    try:
        trained, history = _run(kind, job, trainee, course, beside, say)
        programs = _write(job, trainee, trained, adapter, course, out, folder, mesh)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"{error.filename or out}: the disk is full; free some space and start the same "
            "command again, it goes on from its last checkpoint"
        ) from None
    shutil.rmtree(beside / "checkpoints", ignore_errors=True)
    (beside / REFERENCE).unlink(missing_ok=True)
    if not history:
        return f"{out}: written from its last checkpoint{programs}"
    first, last = history[0]["loss"], history[-1]["loss"]
    begun = job.steps - len(history) + 1
    return f"{out}: loss {first:.4f} at step {begun}, {last:.4f} at step {job.steps}{programs}"


def _adapter(job: Job, model: ModelConfig, folder: Path, key: jax.Array) -> Adapter | None:
    if job.adapter is not None:
        return read_adapter(model_folder(job.adapter), model, model=folder)
    if job.rank is None:
        return None
    return init_adapter(model, key, rank=job.rank, alpha=job.alpha, target_modules=job.projections)


def _course(
    job: Job,
    trainee: Trainable,
    tokenizer: Tokenizer,
    key: jax.Array,
    read_run: ReadRun,
    beside: Path,
) -> TrainingSetup:
    match job:
        case SFTJob():
            return _sft_course(job, trainee, tokenizer)
        case DPOJob():
            return _dpo_course(job, trainee, tokenizer, key, read_run, beside)
        case WarmstartJob():
            return _warmstart_course(job, trainee, tokenizer, key)
    raise AssertionError(job)


def _sft_course(job: SFTJob, trainee: Trainable, tokenizer: Tokenizer) -> TrainingSetup:
    rows = read_rows(job.data, job.split)
    # A text has to fit the context; a row of several may be longer.
    examples, notes = texts_to_learn(rows, tokenizer, min(job.length, trainee.config.max_seq_len))
    packed = pack(examples, job.length)
    order = np.random.default_rng(job.random)
    chosen = [
        # With replacement, so that few rows still make a whole batch.
        order.integers(len(packed["tokens"]), size=job.rows)
        for _ in range(job.steps * job.accumulate)
    ]
    return TrainingSetup(
        loss=sft_loss(trainee.config, trainee.assemble),
        batches=partial(batches_of, packed, chosen, parts=parts_of(trainee.trainable, job.rows)),
        notes=notes,
        rows=_fingerprint(rows),
    )


def _dpo_course(
    job: DPOJob,
    trainee: Trainable,
    tokenizer: Tokenizer,
    key: jax.Array,
    read_run: ReadRun,
    beside: Path,
) -> TrainingSetup:
    if Path(job.data).is_dir():
        rows = [
            Row(where=f"{job.data}, pair {number}", fields=fields)
            for number, fields in enumerate(read_run(Path(job.data)), 1)
        ]
        if not rows:
            raise UserError(f"{job.data}: its run has no preference pairs yet")
    else:
        rows = read_rows(job.data, job.split)
    length = min(job.length or trainee.config.max_seq_len, trainee.config.max_seq_len)
    pairs, notes = preference_pairs(rows, tokenizer, length)
    settings = DPOSettings(
        loss=job.loss,
        beta=job.beta,
        reference=job.reference,
        nll_weight=job.nll_weight,
        batch=job.batch,
        steps=job.steps * job.accumulate,
    )

    def batches() -> Iterable[Any]:
        data = pad_pairs(pairs, trainee.config.max_seq_len)

        def compute() -> np.ndarray:
            with progress_bar("reference", len(pairs)) as advance:
                return reference_logprobs(trainee, data, settings, on_pairs=advance)

        told = {name: getattr(job, name) for name in OF_REFERENCE}
        reference = kept_array(beside / REFERENCE, compute, data=data, told=told)
        return pair_batches(trainee, data | {"reference": reference}, settings, key=key)

    return TrainingSetup(
        loss=dpo_loss(trainee.config, trainee.assemble, settings),
        batches=batches,
        notes=notes,
        rows=_fingerprint(rows),
    )


def _fingerprint(rows: Sequence[Row]) -> str:
    told = json.dumps([row.fields for row in rows], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _warmstart_course(
    job: WarmstartJob, trainee: Trainable, tokenizer: Tokenizer, key: jax.Array
) -> TrainingSetup:
    programs = draw_programs(job.programs, job.random, slots=len(job.experts))
    lesson = make_lesson(tokenizer, job.prompt, job.experts, programs)
    longest = len(lesson.prompt) + max(map(len, lesson.targets))
    if longest > trainee.config.max_seq_len:
        raise UserError(
            f"prompt {job.prompt} and a program have {longest} tokens, the model's context is "
            f"{trainee.config.max_seq_len}; take prompt: short, or another model"
        )
    return TrainingSetup(
        loss=sft_loss(trainee.config, trainee.assemble),
        batches=partial(
            lesson_batches, lesson, batch=job.batch, steps=job.steps * job.accumulate, key=key
        ),
        notes=[f"{len(programs)} programs behind a prompt of {len(lesson.prompt)} tokens"],
        programs=programs,
    )


def _run(
    kind: str,
    job: Job,
    trainee: Trainable,
    course: TrainingSetup,
    beside: Path,
    say: Callable[[str], None],
) -> tuple[Any, list[dict[str, float]]]:
    origin = {"kind": kind, "rows": course.rows} | dataclasses.asdict(job)
    origin = {key: value for key, value in origin.items() if key not in CHANGEABLE}
    loss = rematerialised(course.loss) if job.remat else course.loss
    batches = course.batches()
    last = time.perf_counter()
    with (
        TrainingCheckpoints(
            beside / "checkpoints",
            every=job.checkpoint_every,
            last=job.steps,
            origin=origin,
            say=say,
        ) as checkpoints,
        Metrics(beside) as metrics,
        progress_bar(f"train {kind}", job.steps) as advance,
    ):
        shown = 0

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal shown, last
            now = time.perf_counter()
            speed = values["tokens"] * job.accumulate / (now - last)
            last = now
            metrics.add(step, values)
            parts = [f"loss {values['loss']:.3f}"]
            parts += [f"{name} {values[name]:.2f}" for name in SHOWN if name in values]
            advance(
                step - shown, description=f"train {kind}: {', '.join(parts)}, {speed:.0f} tokens/s"
            )
            shown = step

        return fit(
            loss,
            trainee.trainable,
            trainee.frozen,
            batches,
            job.optimiser(),
            on_step=on_step,
            checkpoints=checkpoints,
        )


def _write(
    job: Job,
    trainee: Trainable,
    trained: Any,
    adapter: Adapter | None,
    course: TrainingSetup,
    out: Path,
    folder: Path,
    mesh: Mesh | None,
) -> str:
    """Writes the result; what to say of it beside the losses."""
    begun_with = folder if job.adapter is None else model_folder(job.adapter)
    beside, said = training_program_files(begun_with), ""
    if course.programs:
        assert isinstance(job, WarmstartJob)
        signature = signature_for(trainee.config, experts=len(job.experts), scope=job.scope)
        identities = identities_of(course.programs, signature)
        learnt = TrainingPrograms.create(course.programs, identities, signature=name_of(signature))
        learnt = learnt.union(read_training_programs(begun_with))
        beside = learnt.write(out.with_name(f"{out.name}.training"))
        said = f"; {len(learnt.identities)} distinct training programs"
    if adapter is not None:
        adapter = dataclasses.replace(adapter, factors=trained)
    if job.save == "adapter":
        assert adapter is not None  # by the job's own check
        write_adapter(out, trainee.config, adapter, base=str(folder), extra_files=beside)
        return said
    # In the dtypes of the model that the training began with, whatever it computed in.
    stored = load_model(folder, mesh=mesh)[1]
    if adapter is None:
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), unflatten(trained), stored)
    else:
        params = merge_lora(stored, adapter)
    write_model(out, trainee.config, params, assets_from=folder, extra_files=beside)
    return said
