"""`sdjax train`: a training job from a YAML file to a model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from sdjax.config import read_dataclass
from sdjax.errors import UserError
from sdjax.io.checkpoint import read_model, write_model
from sdjax.io.folders import model_folder
from sdjax.io.json_lines import read_json_lines
from sdjax.io.tokenizer import Tokenizer, read_tokenizer
from sdjax.models.adapter import fold, initialise_adapter
from sdjax.models.config import ModelConfig
from sdjax.models.tree import flatten, unflatten
from sdjax.progress import progress_bar
from sdjax.training.dpo import DPOSettings, TokenPair, train_dpo
from sdjax.training.fit import OptimiserSettings, fit
from sdjax.training.packing import Example, pack
from sdjax.training.sft import sft_loss, split

STRICT = ConfigDict(extra="forbid", strict=True)
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SFTJob:
    """Fine-tunes the whole model on a JSONL file with `prompt` and `completion`.

    Attributes:
        model: a folder or zoo:NAME.
        out: the new model folder.
        length: tokens of a packed row.
        rows: packed rows a step.
    """

    model: str
    data: str
    out: str
    steps: Count
    learning_rate: Positive = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 0
    length: Count = 128
    rows: Count = 8
    random: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPOJob:
    """Trains a LoRA adapter on a JSONL file with `prompt`, `chosen` and `rejected`, and folds it.

    Attributes:
        model: a folder or zoo:NAME.
        out: the new model folder.
        nll_weight: weight of the chosen side's likelihood.
    """

    model: str
    data: str
    out: str
    steps: Count
    beta: Positive = 0.1
    learning_rate: Positive = 1e-5
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    batch: Count = 4
    rank: Count = 16
    alpha: Positive = 32.0
    random: Annotated[int, Field(ge=0)] = 0


def train_model(kind: str, config: Path) -> str:
    """Runs the job of a YAML file; returns what to print.

    Raises:
        UserError: a key, a model, a line of the data or the output folder is wrong.
    """
    job: SFTJob | DPOJob = (
        read_dataclass(SFTJob, config) if kind == "sft" else read_dataclass(DPOJob, config)
    )
    folder = model_folder(job.model)
    out = Path(job.out)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another out")
    model, params = read_model(folder, dtype=jnp.float32)
    tokenizer = read_tokenizer(folder)
    with progress_bar(f"train {kind}", job.steps) as advance:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            advance(description=f"train {kind}, loss {metrics['loss']:.3f}")

        if isinstance(job, SFTJob):
            trained, history = _sft(job, model, params, tokenizer, on_step)
        else:
            trained, history = _dpo(job, model, params, tokenizer, on_step)
    stored = read_model(folder)[1]
    same_dtype = jax.tree.map(lambda new, old: new.astype(old.dtype), trained, stored)
    write_model(out, model, same_dtype, assets_from=folder)
    first, last = history[0]["loss"], history[-1]["loss"]
    return f"{out}: loss {first:.4f} at step 1, {last:.4f} at step {len(history)}"


OnStep = Callable[[int, dict[str, float]], None]
Trained = tuple[dict, list[dict[str, float]]]


def _sft(
    job: SFTJob, model: ModelConfig, params: dict, tokenizer: Tokenizer, on_step: OnStep
) -> Trained:
    rows = _read_rows(job.data, ("prompt", "completion"))
    examples = [_example(tokenizer, row["prompt"], row["completion"]) for row in rows]
    longest = max(map(len, examples))
    if longest > job.length:
        raise UserError(f"{job.data}: an example has {longest} tokens; raise length to that")
    packed = pack(examples, job.length)
    order = np.random.default_rng(job.random)

    def batches():
        for _ in range(job.steps):
            # With replacement, so that few rows still make a whole batch.
            chosen = order.integers(len(packed["tokens"]), size=job.rows)
            yield {name: array[chosen] for name, array in packed.items()}

    trainable, frozen = split(params, set(flatten(params)))
    optimiser = OptimiserSettings(
        learning_rate=job.learning_rate, steps=job.steps, warmup=job.warmup
    )
    trained, history = fit(
        sft_loss(model), trainable, frozen, batches(), optimiser, on_step=on_step
    )
    return unflatten(trained), history


def _dpo(
    job: DPOJob, model: ModelConfig, params: dict, tokenizer: Tokenizer, on_step: OnStep
) -> Trained:
    pairs = []
    for row in _read_rows(job.data, ("prompt", "chosen", "rejected")):
        if row["chosen"] == row["rejected"]:
            raise UserError(f"{job.data}, line {row['line']}: chosen and rejected are equal")
        sides = [_example(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        pairs.append(TokenPair(winner=sides[0], loser=sides[1]))
    key = jax.random.key(job.random)
    adapter = initialise_adapter(model, key, rank=job.rank, alpha=job.alpha)
    settings = DPOSettings(
        beta=job.beta,
        learning_rate=job.learning_rate,
        nll_weight=job.nll_weight,
        batch=job.batch,
        steps=job.steps,
    )
    trained, history = train_dpo(model, params, adapter, pairs, settings, key=key, on_step=on_step)
    return fold(params, trained), history


def _example(tokenizer: Tokenizer, prompt: str, target: str) -> Example:
    return Example(
        prompt=tuple(tokenizer.encode(prompt, add_special=True)),
        target=(*tokenizer.encode(target, add_special=False), *tokenizer.eos_ids[:1]),
    )


def _read_rows(path: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The fields as text, and the line that they stand in."""
    rows = [
        {field: str(row[field]) for field in fields} | {"line": number}
        for number, row in read_json_lines(path, fields)
    ]
    if not rows:
        raise UserError(f"{path}: holds no example")
    return rows
