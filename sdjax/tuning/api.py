"""Python API of `sdjax tune`: tune the numbers of a merge on a task."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sdjax.core.config import dataclass_from
from sdjax.core.errors import UserError
from sdjax.core.progress import Advance, progress_bar
from sdjax.core.versions import current_versions
from sdjax.io.atomic_write import resolve_new_folder
from sdjax.merging.recipe.from_algorithm import merge_algorithm
from sdjax.merging.recipe.model_card import Provenance
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.merging.recipe.recipe_reader import parse_recipe
from sdjax.merging.scope import Scope
from sdjax.sharding.multihost import is_main_process
from sdjax.tuning.effect import listed
from sdjax.tuning.evolution import search_by_evolution
from sdjax.tuning.gradient import search_by_gradient
from sdjax.tuning.loss import MergeLoss
from sdjax.tuning.results import TUNED, Tuning, paired_results, steps_of, write_result
from sdjax.tuning.search import Evaluations, SearchConfig
from sdjax.tuning.setup import TuningSetup, TuningWeights, build_setup
from sdjax.tuning.trace import Trace
from sdjax.tuning.types import Tunable


def tune(
    what: str | Tunable,
    task: str | None = None,
    *,
    base: str | None = None,
    experts: Mapping[str, str] | Sequence[str] = (),
    budget: int,
    optimizer: str = "auto",
    steps: int = 60,
    learning_rate: float = 0.02,
    batch: int = 8,
    starts: int = 1,
    seed: int = 0,
    overrides: Mapping[str, Sequence[float]] | None = None,
    scope: Scope | None = None,
    data: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    metric: str = "strict",
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    merged: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    allow_missing: Collection[str] = (),
    accept_versions: bool = False,
    trust_code: bool = False,
) -> Tuning:
    """Tune the numbers of a merge on a task, by gradient or by CMA-ES.

    Half of the development problems choose between candidates; the other half measures the gain of
    the tuned merge over the untuned one.

    Args:
        what: a family of merges, a shipped method, a program file, a recipe, a configuration of
            mergekit-evolve, or a `Tunable`.
        task: name of a task, a JSONL file, or the import path "module:Class" of a `Task`. By
            default the one that `what` names, or arithmetic.
        base: the base model; a recipe names its own.
        experts: the experts, in order, or a mapping from name to model.
        budget: number of development evaluations.
        optimizer: "auto", by gradient if the task has training problems, in the numbers in which
            the merge has one, and otherwise by CMA-ES; "gradient", by gradient or not at all; or
            "cmaes".
        steps: gradient steps per start.
        learning_rate: of Adam, as a fraction of the distance between a number's bounds.
        batch: rows of packed training problems per step.
        starts: searches from different initial values, which share the budget.
        seed: seed of the search, and of random merge methods.
        overrides: name of a number to (start,) or (start, low, high).
        scope: tensors to merge: "all" (the default), "mlp", "attention" or glob patterns.
        data: file or folder with the task's problems.
        shots: number of worked examples before each problem that is decoded.
        limit: use at most this many problems of each half.
        chat: format prompts with the tokenizer's chat template.
        metric: "strict" or "flexible" accuracy is the score.
        max_new_tokens: maximum number of tokens per answer; see `sdjax.evaluate`.
        out: folder for the trace, the tuned program or recipe and a plot; an interrupted search
            resumes there.
        merged: folder for the merged model; not written by default.
        mesh: devices that the models are sharded over; the default device by default.
        dtype: dtype of activations and of the forward pass; see `sdjax.evaluate`.
        allow_missing: layers of confinement that programs and the grader may run without.
        accept_versions: resume although versions of packages differ.
        trust_code: whether `task` may name a class, whose code runs unconfined in this process.

    Returns:
        the tuned values with their gain; nothing of it is estimated from problems that were used to
        find them, except `development`.

    Raises:
        UserError: a model, the task or its data do not exist, there is nothing to tune, a program
            is refused, the budget is below one evaluation, bounds exclude the start, or `optimizer`
            is "gradient" and there is none.

    Examples:
        >>> import sdjax
        >>> experts = ["zoo:reader", "zoo:calculator", "zoo:judge"]
        >>> models = {"base": "zoo:seed", "experts": experts, "scope": "mlp"}
        >>> result = sdjax.tune("weights", **models, budget=2, optimizer="cmaes", limit=4)
        >>> len(result.values), result.evaluations
        (3, 2)
    """
    fields = {
        "budget": budget,
        "optimizer": optimizer,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch": batch,
        "starts": starts,
        "seed": seed,
    }
    search = dataclass_from(SearchConfig, fields, "tune")
    if metric not in ("strict", "flexible"):
        raise UserError(f"metric must be strict or flexible, not {metric!r}")
    if merged is not None:
        resolve_new_folder(Path(merged))
    setup = build_setup(
        what,
        task,
        base=base,
        experts=experts,
        scope=scope,
        data=data,
        shots=shots,
        limit=limit,
        chat=chat,
        max_new_tokens=max_new_tokens,
        mesh=mesh,
        dtype=dtype,
        allow_missing=allow_missing,
        trust_code=trust_code,
        overrides={name: tuple(map(float, new)) for name, new in (overrides or {}).items()},
        with_training=search.optimizer != "cmaes",
    )
    if search.optimizer == "gradient" and (reason := _why_no_gradient(setup)):
        raise _gradient_refused(setup, reason)
    settings = setup.fingerprint() | {"metric": metric, **dataclasses.asdict(search)}
    trace = Trace(
        None if out is None else Path(out),
        settings,
        versions=current_versions(),
        accept_versions=accept_versions,
    )
    key = jax.random.key(seed)
    with trace:
        weights = setup.load(key, metric)
        setup = dataclasses.replace(
            setup, tunable=weights.tunable, notes=(*setup.notes, *weights.notes)
        )
        result = _search(setup, weights, search, metric, trace)
        if out is not None and is_main_process():
            write_result(Path(out), result)
    if merged is not None:
        _write_merged(setup, result, Path(merged), seed)
    return result


def _search(
    setup: TuningSetup, weights: TuningWeights, search: SearchConfig, metric: str, trace: Trace
) -> Tuning:
    tunable, key = setup.tunable, jax.random.key(search.seed)
    evaluations = Evaluations(
        partial(weights.scorer, problems=setup.development), search.budget, trace
    )
    loss, complete, notes = _training_loss(setup, weights, search, key)
    optimizers = []
    if loss is not None:
        optimizers.append("gradient")
        first = search if complete else dataclasses.replace(search, budget=search.budget // 2)
        with _reporting(trace, "step", search.starts * search.steps) as advance:

            def on_step(start: int, step: int, event: Mapping[str, Any]) -> None:
                shown = [] if event["loss"] is None else [f"loss {event['loss']:.3f}"]
                advance(description=f"tune: {', '.join([*shown, *_best(evaluations)])}")

            search_by_gradient(tunable, loss, evaluations, first, trace, on_step=on_step)
    if not complete:
        optimizers.append("cmaes")
        total = search.budget - evaluations.count
        with _reporting(trace, "evaluation", total, before=evaluations.count) as advance:

            def on_evaluation(event: Mapping[str, Any]) -> None:
                advance(description=f"tune: {', '.join(_best(evaluations))}")

            evaluations.on_evaluation = on_evaluation
            search_by_evolution(tunable, evaluations, search, resume=loss is not None)
    best = evaluations.best
    assert best is not None  # every search evaluates at least one candidate
    values = np.array(best["values"])
    confirmed = []
    for title, candidate in (("untuned", tunable.start), ("tuned", values)):
        request = {"event": "confirmation", "which": title, "values": candidate.tolist()}
        confirmed.append(
            trace.record(request, partial(weights.scorer, candidate, problems=setup.confirmation))
        )
    steps, dropped = steps_of(trace.events)
    if dropped:
        were = "steps were" if dropped > 1 else "step was"
        notes.append(f"{dropped} gradient {were} dropped: the gradient was not finite")
    if np.array_equal(values, tunable.start):
        notes.append(
            "the budget allowed to evaluate the initial values only; raise --budget"
            if loss is None and evaluations.count == 1
            else "no better values were found; these are the initial ones"
        )
    return Tuning(
        name=tunable.name,
        optimizers=tuple(optimizers),
        metric=metric,
        parameters=tunable.parameters,
        values=tuple(best["values"]),
        text=tunable.write(values),
        suffix=tunable.suffix,
        development=best["score"],
        evaluations=evaluations.count,
        steps=steps,
        dropped_steps=dropped,
        max_steps=search.starts * search.steps if loss is not None else 0,
        seconds=trace.seconds,
        notes=(*setup.notes, *notes),
        trace=tuple(trace.events),
        **paired_results(confirmed[0], confirmed[1], metric),
    )


def _best(evaluations: Evaluations) -> list[str]:
    best = evaluations.best
    return [] if best is None else [f"best {100 * best['score']:.1f} %"]


def _training_loss(
    setup: TuningSetup, weights: TuningWeights, search: SearchConfig, key: jax.Array
) -> tuple[MergeLoss | None, bool, list[str]]:
    """Return the loss of a search by gradient, if there is one, and what is said about it.

    Returns:
        the loss; whether it has a gradient in every number; and the reason for CMA-ES.

    Raises:
        UserError: the optimizer is "gradient", and a number has no gradient.
    """
    if search.optimizer == "cmaes":
        return None, False, []
    if reason := _why_no_gradient(setup):
        return None, False, [f"{reason}: tuned by CMA-ES"]
    loss = MergeLoss(
        weights.merger,
        setup.tunable,
        weights.base,
        config=setup.config,
        compute_dtype=setup.decoder.compute_dtype,
        key=key,
        examples=setup.training,
        search=search,
    )
    blocked = loss.blocking()
    if not blocked:
        return loss, True, []
    names = [setup.tunable.parameters[index].name for index in blocked]
    operations = sorted({name for found in blocked.values() for name in found})
    note = f"no gradient in {listed(names)} ({', '.join(operations)})"
    if search.optimizer == "gradient":
        raise _gradient_refused(setup, note)
    # One evaluation is needed for each optimizer and start.
    usable = len(blocked) < len(setup.tunable.parameters) and search.budget // 2 >= search.starts
    return (loss if usable else None), False, [f"{note}: tuned by CMA-ES"]


def _why_no_gradient(setup: TuningSetup) -> str | None:
    """Return why no gradient is available, if that is known before weights are loaded."""
    if not setup.training:
        return f"task {setup.task.name} has no training problems"
    if refusal := setup.tunable.gradient_refusal:
        return f"the gradient is refused: {refusal}"
    return None


def _gradient_refused(setup: TuningSetup, reason: str) -> UserError:
    return UserError(
        f"{setup.tunable.name} cannot be tuned by gradient: {reason}; use --optimizer auto"
    )


@contextlib.contextmanager
def _reporting(trace: Trace, kind: str, total: int, *, before: int = 0) -> Iterator[Advance]:
    """Yield a function that reports events of one kind, except those that were replayed.

    Args:
        trace: the trace.
        kind: kind of the events.
        total: number of events.
        before: number of events of this kind that precede them.
    """
    done = max(0, trace.count_stored(kind) - before)
    with progress_bar("tune", total, completed=done) as advance:

        def report(
            steps: float = 1, *, description: str | None = None, total: float | None = None
        ) -> None:
            if not trace.is_replayed:
                advance(steps, description=description, total=total)

        yield report


def _write_merged(setup: TuningSetup, result: Tuning, folder: Path, seed: int) -> None:
    """Write the merged model, whose tensors are those that were evaluated."""
    if not is_main_process():
        return
    if setup.recipe is not None:  # as `sdjax merge` does with the tuned recipe
        merge_recipe(parse_recipe(result.text, setup.recipe), folder, seed=seed)
    else:
        merge_algorithm(
            setup.tunable.bind(np.array(result.values)),
            setup.sources,
            setup.model_set.scope,
            folder,
            provenance=Provenance(
                method=f"{result.name}, tuned on {setup.task.name}",
                file=f"{TUNED}{result.suffix}",
                text=result.text,
                seed=seed,
            ),
            key=jax.random.key(seed),
        )
