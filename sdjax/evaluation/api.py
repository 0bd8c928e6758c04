"""Python API of `sdjax eval`: evaluate a model on a task."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.core.versions import current_versions
from sdjax.decoding.config import fit_decoder_config
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.results import ProblemResult, ResultsFolder, count_failures
from sdjax.evaluation.statistics import Interval, accuracy_interval
from sdjax.evaluation.task import Outcome, Problem, Task, call_checked, read_problems
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import locate
from sdjax.io.tokenizer import load_tokenizer
from sdjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of evaluating a model on a task.

    Attributes:
        model: name or folder of the model.
        task: name of the task.
        problems: outcome of each problem, in the task's order.
        notes: remarks about the problems, such as the source of the worked examples.
    """

    model: str
    task: str
    problems: tuple[ProblemResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def strict(self) -> Interval:
        """Accuracy of the strict metric with its 95% interval."""
        return accuracy_interval([problem.strict for problem in self.problems])

    @property
    def flexible(self) -> Interval:
        """Accuracy of the flexible metric with its 95% interval."""
        return accuracy_interval([problem.flexible for problem in self.problems])

    @property
    def failures(self) -> dict[str, int]:
        """Number of problems that were counted as wrong without being graded, by reason."""
        return count_failures(self.problems)

    def by_kind(self) -> dict[str, Evaluation]:
        """Return one evaluation per kind of problem."""
        kinds = dict.fromkeys(problem.kind for problem in self.problems)
        return {
            kind: dataclasses.replace(
                self, problems=tuple(problem for problem in self.problems if problem.kind == kind)
            )
            for kind in kinds
        }


def evaluate(
    model: str,
    task: str,
    *,
    data: str | Path | None = None,
    shots: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    chat: bool = False,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    batch: int | None = None,
    allow_missing: Sequence[str] = (),
    accept_versions: bool = False,
    trust_code: bool = False,
) -> Evaluation:
    """Evaluate a model on a task by greedy decoding.

    Args:
        model: zoo:NAME, a folder, OWNER/MODEL[@REVISION], or MODEL+ADAPTER.
        task: name of a task, a JSONL file, or the import path "module:Class" of a `Task`.
        data: file or folder with the task's problems.
        shots: number of worked examples before each problem; the task's default if None.
        split: "development", "test" or "all". By default, all test problems, with none of them
            reserved for development.
        limit: evaluate at most this many problems.
        chat: format prompts with the tokenizer's chat template.
        max_new_tokens: maximum number of tokens per answer. Defaults to the task's own limit, but
            at most half of the model's maximum sequence length.
        out: folder that stores the results; an interrupted evaluation resumes there.
        mesh: devices that the model is sharded over; the default device by default.
        dtype: dtype of weights, activations and KV cache. By default float32 on CPUs, where
            bfloat16 is slower, and bfloat16 elsewhere.
        batch: number of problems that are decoded at the same time; as many as is efficient by
            default. Answers do not depend on it, except at near-ties of two tokens.
        allow_missing: layers of confinement that the grader may run without.
        accept_versions: resume although versions of packages differ from those that the evaluation
            was started with; the difference is recorded.
        trust_code: whether `task` may name a class, whose code runs unconfined in this process.

    Returns:
        the outcomes with their accuracies.

    Raises:
        UserError: the model, the task or its data do not exist, or no prompt fits into the model.

    Examples:
        >>> import sdjax
        >>> evaluation = sdjax.evaluate("zoo:seed", "arithmetic", limit=8)
        >>> len(evaluation.problems)
        8
        >>> evaluation.strict.low <= evaluation.strict.mean <= evaluation.strict.high
        True
    """
    if not isinstance(model, str):
        raise UserError(
            f"evaluate: model must be a name or a folder's path, not {type(model).__name__}; write "
            "parameters to a folder first (sdjax.io.hf_checkpoint.write_model)"
        )
    out = None if out is None else Path(out)
    folder, adapter = locate(model)
    folders = [folder, adapter] if adapter else [folder]
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    loaded_task = find_task(
        task,
        data=data,
        shots=shots,
        development=0 if split is None else None,
        trust_code=trust_code,
        allow_missing=tuple(allow_missing),
    )
    problems = select_problems(loaded_task, split)[:limit]
    notes = list(map(str, call_checked(loaded_task, "notes", (list, tuple))))
    prompted = build_prompts(loaded_task, problems, tokenizer, chat=chat)
    new_tokens, remarks = limit_answers(loaded_task, config, max_new_tokens)
    notes += remarks
    decoder = Decoder(
        config,
        fit_decoder_config(config, [prompt.tokens for prompt in prompted], new_tokens, slots=batch),
        tokenizer=tokenizer,
        compute_dtype=dtype,
        mesh=mesh,
    )
    settings = {
        "model": "+".join(str(path.resolve()) for path in folders),
        "weights": files_fingerprint(*folders),
        "task": loaded_task.name,
        "max_new_tokens": new_tokens,
        "dtype": jnp.dtype(decoder.compute_dtype).name,
    }
    results_folder = ResultsFolder(
        out, settings, versions=current_versions(), accept_versions=accept_versions
    )
    with results_folder as results:
        missing = results.missing(prompted)
        by_id = {item.problem.id: item for item in missing}
        if missing:
            dtype = decoder.compute_dtype
            params = load_model(folder, adapter=adapter, dtype=dtype, mesh=mesh)[1]
        finished = len(prompted) - len(missing)
        with progress_bar("eval", len(prompted), completed=finished) as advance:

            def save(outcome: Outcome) -> None:
                results.add(ProblemResult.create(by_id[outcome.problem_id], outcome))
                advance()

            if missing:
                evaluate_problems(decoder, tokenizer, params, loaded_task, missing, on_outcome=save)
        results.finish([item.problem.id for item in prompted])
        return Evaluation(
            model=model,
            task=loaded_task.name,
            problems=tuple(results.by_id[item.problem.id] for item in prompted),
            notes=tuple(notes),
        )


def limit_answers(
    task: Task, config: ModelConfig, max_new_tokens: int | None
) -> tuple[int, list[str]]:
    """Return the maximum number of tokens per answer, and remarks about it.

    Args:
        task: the task.
        config: the model's config.
        max_new_tokens: the user's limit. By default the task's own, but at most half of the
            model's maximum sequence length.
    """
    if max_new_tokens:
        return max_new_tokens, []
    limit = min(task.max_new_tokens, config.max_seq_len // 2)
    if limit == task.max_new_tokens:
        return limit, []
    return limit, [
        f"answers are limited to {limit} tokens, half of the model's maximum sequence length, "
        f"instead of the task's {task.max_new_tokens}; use --max-new-tokens to change this"
    ]


def select_problems(task: Task, split: str | None) -> list[Problem]:
    """Return a task's problems, whose ids are unique.

    Args:
        task: the task.
        split: "development", "test", "all", or None for the test problems.

    Raises:
        UserError: there are none, or two have the same id.
    """
    splits = ("development", "test") if split == "all" else (split or "test",)
    problems = [problem for name in splits for problem in read_problems(task, name)]
    if not problems:
        raise UserError(f"task {task.name} has no {split or 'test'} problems")
    (id, count), *_ = Counter(problem.id for problem in problems).most_common(1)
    if count > 1:
        raise UserError(f"task {task.name}: {count} problems have the id {id!r}; make ids unique")
    return problems


def files_fingerprint(*folders: Path) -> str:
    """Return a digest of the files' names, sizes and modification times."""
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
