"""Tuning within a run: the numbers of the best programs.

A discovered program has a structure and constants, and its score depends on both. So that programs
and human-designed merges are compared as what they are, the numbers of both are tuned by the same
searches (see `sdjax.tuning`, and `sdjax.search.control_search` for the merges): by gradient on
training problems where possible, with development scores choosing between candidates. A tuned
program is again a program of the run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.evaluation.task import read_training
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import trial_of
from sdjax.search.attempts import too_many_attempts
from sdjax.search.bases import context_on_base
from sdjax.search.budget import TUNING
from sdjax.search.context import RunContext, ScoringContext
from sdjax.search.multihost import SharedJudge
from sdjax.search.phases import judged_program
from sdjax.search.ranking import ranked_programs
from sdjax.search.scoring import score_program
from sdjax.search.store import Store
from sdjax.search.structures import scored_programs, structures_of
from sdjax.search.types import (
    DEVELOPMENT,
    MAIN,
    SEARCH,
    Entry,
    Program,
    phase_name,
    program_entry,
)
from sdjax.sharding.memory import MemoryLimitExceeded
from sdjax.training.packing import Example
from sdjax.tuning.candidates import CandidateScorer
from sdjax.tuning.evolution import search_by_evolution
from sdjax.tuning.gradient import search_by_gradient
from sdjax.tuning.loss import MergeLoss, training_examples
from sdjax.tuning.programs import program_tunable
from sdjax.tuning.search import Evaluations, SearchConfig
from sdjax.tuning.trace import Trace
from sdjax.tuning.types import Tunable

TUNING_FOLDER = "tuning"
CONTINUED_FROM = "continued_from"  # in an entry's details: the program that tuning started from
NOT_TUNED = "not_tuned"  # in an entry's details: why no later start of the run tunes the program

logger = logging.getLogger(__name__)


def tune_entries(
    context: RunContext, store: Store, sandbox: Sandbox | None, purpose: str = SEARCH
) -> None:
    """Tune the best programs of a purpose; score the results on development.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        purpose: whose programs: those of the search, or of a control.
    """
    config = context.config.tuning
    if config is None:
        return
    best = _finalists(context, store, config.programs, purpose)
    tune_programs(context, store, sandbox, best, title=phase_name("tune", purpose))


def tune_programs(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    identities: Sequence[str],
    *,
    title: str = "tune",
) -> None:
    """Tune programs that have a development score; score the results on development.

    A search continues from the numbers of the program, which are the best ones of its structure if
    structures were scored. It has a trace in the run folder, `tuning/NAME/`, and resumes from it.
    A program that was tuned before is not tuned again.

    Args:
        context: the loaded run, whose config has settings of the tuning.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        identities: identities of the programs.
        title: title of the progress bar.
    """
    entries = store.by_key(Entry)
    programs = [one for one in identities if TUNING not in entries[program_entry(one)].detail]
    examples = training_texts(context) if programs else []
    total = len(identities)
    with progress_bar(title, total, completed=total - len(programs)) as advance:
        for identity in programs:
            _tune_program(context, store, sandbox, identity, examples)
            advance()
    # Unless the run was interrupted in between, only these programs are not scored: the results,
    # and what they were as they were written, if the race of the structures left that open.
    entries = store.by_key(Entry)
    results = [one for one in entries.values() if one.detail.get(CONTINUED_FROM) in identities]
    written = [entries[program_entry(one)].detail.get("tuned_from", one) for one in identities]
    for identity in (*(one.identity for one in results), *written):
        score_program(context, store, sandbox, identity, DEVELOPMENT)


def _tune_program(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    identity: str,
    examples: Sequence[Example],
) -> None:
    assert context.config.tuning is not None
    search = context.config.tuning.search
    context = context_on_base(context, store, store.program(identity).base, sandbox=sandbox)
    judge = SharedJudge(sandbox, context.signature)
    title, name = f"program {identity[:8]}", program_entry(identity)
    (entry,) = store.select(Entry, name=name)
    trial = trial_of(context, MAIN) if jax.default_backend() == "cpu" else None
    try:
        if reason := entry.detail.get(NOT_TUNED):
            raise UserError(f"{title}: {reason}")
        tunable = program_tunable(
            store.program(identity).source,
            judge,
            name=title,
            trial=trial,
            with_gradient=search.optimizer != "cmaes",
        )
        with store.attempt(name, TUNING_FOLDER) as number:
            if refusal := too_many_attempts(number):
                detail = {**entry.detail, NOT_TUNED: refusal.message}
                store.save(dataclasses.replace(entry, detail=detail))
                raise UserError(f"{title}: {refusal.message}")
            loss = differentiable_loss(context, tunable, examples, search)
            loss = run_once(context, tunable, loss)
    except UserError as error:
        logger.info("not tuned: %s", error)
        return
    except jax.errors.JaxRuntimeError as error:
        message = "the array program fails on the model"
        logger.info("not tuned: %s: %s (%s)", title, message, type(error).__name__)
        return
    values, cost = _search(context, store, tunable, loss, search, folder=identity[:16])
    source = tunable.write(values)
    verdict = judge.judge(source, name=title)
    program = judged_program(context, source, verdict)
    detail = {**entry.detail, TUNING: cost}
    records: list[Program | Entry] = []
    if program is None:
        logger.info("not tuned: %s: %s (%s)", title, verdict.verdict, verdict.message)
    elif program.identity == identity:  # no other numbers were better
        detail["constants"] = len(values)
    else:
        new = {
            "tuned_from": entry.detail.get("tuned_from", identity),
            CONTINUED_FROM: identity,
            "constants": len(values),
        }
        name = program_entry(program.identity)
        records += [
            program,
            Entry(name=name, kind="program", identity=program.identity, detail=new),
        ]
    store.save(dataclasses.replace(entry, detail=detail), *records)


def differentiable_loss(
    context: ScoringContext,
    tunable: Tunable,
    examples: Sequence[Example],
    search: SearchConfig,
    *,
    partly: bool = False,
) -> MergeLoss | None:
    """Return the loss on training problems, or None if the search is by CMA-ES.

    Args:
        context: the loaded run.
        tunable: what is tuned.
        examples: the training problems.
        search: settings of the search.
        partly: also return a loss that has a gradient in some of the numbers only.
    """
    if search.optimizer == "cmaes" or not examples:
        return None
    if refusal := tunable.gradient_refusal:
        logger.info("%s: the gradient is refused: %s: tuned by CMA-ES", tunable.name, refusal)
        return None
    loss = MergeLoss(
        context.mergers[MAIN],
        tunable,
        context.seed,
        config=context.model,
        compute_dtype=context.eval_decoder.compute_dtype,
        key=context.key("merge"),
        examples=examples,
        search=search,
        compile_cache=context.model_gradients,
    )
    blocked = loss.blocking()
    if len(blocked) == len(tunable.parameters) or (blocked and not partly):
        return None
    return loss


def run_once(context: ScoringContext, tunable: Tunable, loss: MergeLoss | None) -> MergeLoss | None:
    """Compile and run what a search does, without using the results.

    Returns:
        the loss, or None if its gradient does not fit into memory.
    """
    context.mergers[MAIN](tunable.bind(tunable.start), key=context.key("merge"))
    return compile_gradient(tunable, loss)


def compile_gradient(tunable: Tunable, loss: MergeLoss | None) -> MergeLoss | None:
    """Compile and run a gradient step; return the loss, or None if it does not fit into memory."""
    if loss is not None:
        try:
            loss(tunable.start, 0, 0)
        except MemoryLimitExceeded as error:
            logger.info("%s: %s: tuned by CMA-ES", tunable.name, error)
            return None
    return loss


def candidate_scorer(context: ScoringContext, tunable: Tunable) -> CandidateScorer:
    """Return a scorer of a tunable's candidates on problems of the run."""
    return CandidateScorer(
        context.mergers[MAIN],
        tunable.bind,
        decoder=context.eval_decoder,
        tokenizer=context.tokenizer,
        task=context.task,
        metric=context.config.task.metric,
        key=context.key("merge"),
    )


def _search(
    context: RunContext,
    store: Store,
    tunable: Tunable,
    loss: MergeLoss | None,
    search: SearchConfig,
    *,
    folder: str,
) -> tuple[np.ndarray, dict[str, float]]:
    """Return the tuned values [parameters], and the problems and device-seconds that they cost."""
    settings = {"tuned": tunable.name, "start": tunable.start.tolist()}
    with Trace(store.folder / TUNING_FOLDER / folder, settings) as trace:
        score = partial(candidate_scorer(context, tunable), problems=context.problems[DEVELOPMENT])
        evaluations = Evaluations(score, search.budget, trace)
        if loss is not None:
            search_by_gradient(tunable, loss, evaluations, search, trace)
        else:
            search_by_evolution(tunable, evaluations, search)
        cost = {
            "problems": evaluations.count * len(context.problems[DEVELOPMENT]),
            "seconds": round(trace.seconds * jax.device_count(), 1),
        }
    assert evaluations.best is not None  # every search evaluates at least one candidate
    return np.array(evaluations.best["values"]), cost


def _finalists(context: RunContext, store: Store, count: int, purpose: str) -> list[str]:
    """Return the identities of the best programs of different structures, before this tuning."""

    def distinct() -> Iterator[str]:
        structures, seen = structures_of(store), set()
        scored = set(scored_programs(store).values())  # without the results of this tuning
        for entry in ranked_programs(store, context.config.task.metric, purpose):
            written = entry.detail.get("tuned_from", entry.identity)
            structure = structures.get(written, written)
            if entry.identity in scored and structure not in seen:
                seen.add(structure)
                yield entry.identity or ""

    return [identity for identity, _ in zip(distinct(), range(count), strict=False)]


def training_texts(context: ScoringContext) -> list[Example]:
    """Return the task's training problems as tokens, without those of the run's splits."""
    held_out = [item.problem for split in context.problems.values() for item in split]
    training = read_training(context.task, held_out)
    if not training:
        return []
    chat = context.config.task.prompt == "chat"
    return training_examples(
        context.task, training, context.tokenizer, max_length=context.model.max_seq_len, chat=chat
    )
