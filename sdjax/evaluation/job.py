"""`sdjax eval`: one model on one task."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.decoding.decoder import Decoder, DecoderSettings
from sdjax.errors import UserError
from sdjax.evaluation.evaluate import evaluate
from sdjax.evaluation.statistics import accuracy_interval
from sdjax.evaluation.task import Outcome, Problem
from sdjax.evaluation.tasks import find_task
from sdjax.io.checkpoint import read_model
from sdjax.io.folders import model_folder
from sdjax.io.tokenizer import read_tokenizer
from sdjax.progress import progress_bar

MAX_NEW_TOKENS = 64


def evaluate_model(
    model: str, task: str, *, split: str, limit: int | None = None, out: Path | None = None
) -> str:
    """Scores a model greedily; returns what to print, with 95 % intervals.

    Args:
        model: a folder or zoo:NAME.
        task: a name or a JSONL file.
        split: "development", "test", or "all" for both.
        limit: the first so many problems.
        out: a file that gets one JSON line a problem.

    Raises:
        UserError: no such model or task, or a prompt longer than the model's context.
    """
    folder = model_folder(model)
    config, params = read_model(folder)
    tokenizer = read_tokenizer(folder)
    chosen = find_task(task)
    splits = ("development", "test") if split == "all" else (split,)
    problems = [problem for one in splits for problem in chosen.problems(one)][:limit]
    if not problems:
        raise UserError(f"task {task!r}: has no {split} problem")
    longest = max(
        len(tokenizer.encode(chosen.prompt(problem), add_special=True)) for problem in problems
    )
    buckets = (*(size for size in (16, 32, 64, 128, 256, 512, 1024) if size < longest), longest)
    if longest + MAX_NEW_TOKENS > config.context:
        raise UserError(
            f"{model}: the longest prompt has {longest} tokens, which with {MAX_NEW_TOKENS} new "
            f"ones is more than the context of {config.context}"
        )
    decoder = Decoder(
        config,
        DecoderSettings(slots=64, rows=32, buckets=buckets, max_new_tokens=MAX_NEW_TOKENS),
        stop_tokens=tokenizer.eos_ids,
        compute_dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
    )
    with progress_bar("eval", len(problems)) as advance:
        outcomes = evaluate(
            decoder, tokenizer, params, chosen, problems, on_outcome=lambda outcome: advance()
        )
    if out is not None:
        _write_lines(out, problems, outcomes)
    return _table(model, chosen.name, split, problems, outcomes)


def _table(
    model: str, task: str, split: str, problems: list[Problem], outcomes: list[Outcome]
) -> str:
    kinds = np.array([problem.kind for problem in problems])
    lines = [f"{model} on {task} ({split}, {len(problems)} problems), 95 % intervals"]
    for kind in [*dict.fromkeys(kinds), "all"]:
        chosen = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        cells = []
        for reading in ("strict", "flexible"):
            right = np.array([getattr(outcome, reading) for outcome in outcomes])[chosen]
            interval = accuracy_interval(right)
            cells.append(f"{interval.mean:6.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        lines.append(f"{kind:14s} strict {cells[0]}   flexible {cells[1]}")
    return "\n".join(lines)


def _write_lines(out: Path, problems: list[Problem], outcomes: list[Outcome]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for problem, outcome in zip(problems, outcomes, strict=True):
            row = {"question": problem.question, "answer": problem.answer, "kind": problem.kind}
            file.write(json.dumps(row | dataclasses.asdict(outcome)) + "\n")
    os.replace(partial, out)
