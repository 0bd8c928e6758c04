"""`sdjax eval`: one model on one task."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.decoding.config import fit_decoder_config
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.evaluate import evaluate
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.results import READINGS, Line, Results, failures
from sdjax.evaluation.statistics import accuracy_interval
from sdjax.evaluation.task import Outcome, Problem, Task, call_checked, problems_of
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import locate
from sdjax.io.tokenizer import load_tokenizer


def evaluate_model(
    model: str,
    task: str,
    *,
    data: str | Path | None = None,
    shots: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    chat: bool = False,
    max_new_tokens: int | None = None,
    out: Path | None = None,
    allow_missing: Sequence[str] = (),
) -> str:
    """Scores a model greedily; returns what to print, with 95 % intervals.

    Args:
        model: as `sdjax.io.model_paths.locate` has it; an adapter is folded in.
        task: a name, a JSONL file, or the import path of a class.
        data: a file or folder with the task's problems.
        shots: worked examples before each problem; the task's own number by default.
        split: "development" or "test" as the task divides its problems, or "all" for both. By
            default the test problems, with none set apart for development.
        limit: the first so many problems.
        chat: puts the problems by the tokenizer's chat template.
        max_new_tokens: the longest answer; the task's own by default, or half of the context
            where that is less.
        out: a folder that keeps the results and goes on where it was interrupted.
        allow_missing: layers that the confinement of a grader may lack.

    Raises:
        UserError: no such model, task or data, or no prompt that fits into the model's context.
    """
    folder, adapter = locate(model)
    folders = [folder, adapter] if adapter else [folder]
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    whole = 0 if split is None else None
    chosen = find_task(
        task, data=data, shots=shots, development=whole, allow_missing=tuple(allow_missing)
    )
    problems = _problems(chosen, split)[:limit]
    notes = list(map(str, call_checked(chosen, "notes", (list, tuple))))
    asked = build_prompts(chosen, problems, tokenizer, chat=chat)
    new_tokens = max_new_tokens or min(chosen.max_new_tokens, config.max_seq_len // 2)
    if max_new_tokens is None and new_tokens < chosen.max_new_tokens:
        notes.append(
            f"an answer has at most {new_tokens} tokens, half of the model's context, not the "
            f"{chosen.max_new_tokens} of the task; --max-new-tokens sets another number"
        )
    sizes = fit_decoder_config(config, [one.tokens for one in asked], new_tokens)
    settings = {
        "model": "+".join(str(one.resolve()) for one in folders),
        "weights": _fingerprint(*folders),
        "task": chosen.name,
        "max_new_tokens": new_tokens,
    }
    with Results(out, settings) as results, progress_bar("eval", len(asked)) as advance:
        missing = results.missing(asked)
        advance(len(asked) - len(missing))
        by_id = {one.problem.id: one for one in missing}

        def keep(outcome: Outcome) -> None:
            results.add(Line.of(by_id[outcome.problem_id], outcome))
            advance()

        if missing:
            decoder = Decoder(
                config,
                sizes,
                stop_token_ids=tokenizer.eos_ids,
                compute_dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
            )
            params = load_model(folder, adapter=adapter)[1]
            evaluate(decoder, tokenizer, params, chosen, missing, on_outcome=keep)
        lines = [results.lines[one.problem.id] for one in asked]
        results.finish([one.problem.id for one in asked])
    title = f"{model} on {chosen.name} ({len(lines)} problems{', chat' if chat else ''})"
    return "\n".join([f"{title}, 95 % intervals", *notes, *_table(lines)])


def _problems(task: Task, split: str | None) -> list[Problem]:
    splits = ("development", "test") if split == "all" else (split or "test",)
    problems = [problem for one in splits for problem in problems_of(task, one)]
    if not problems:
        raise UserError(f"task {task.name}: has no {split or 'test'} problem")
    counted = Counter(problem.id for problem in problems)
    (id, count), *_ = counted.most_common(1)
    if count > 1:
        raise UserError(f"task {task.name}: {count} problems have the id {id!r}; give each its own")
    return problems


def _fingerprint(*folders: Path) -> str:
    """Of the folders' files by name, size and time: weights that were written anew are others."""
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _table(lines: Sequence[Line]) -> list[str]:
    """Accuracies by kind where there are several, and of all; then what failed."""
    kinds = list(dict.fromkeys(line.kind for line in lines))
    groups = {kind: [line for line in lines if line.kind == kind] for kind in kinds}
    rows = (groups if len(groups) > 1 else {}) | {"all": lines}
    width = max(map(len, rows))
    table = []
    for name, group in rows.items():
        cells = []
        for reading in READINGS:
            interval = accuracy_interval([getattr(line, reading) for line in group])
            cells.append(f"{reading} {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        table.append(f"{name:{width}s}  {'   '.join(cells)}")
    told = [f"{count} counted as wrong: {reason}" for reason, count in failures(lines).items()]
    return [*table, *told]
