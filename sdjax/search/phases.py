"""The phases of an iteration: generate, judge, score, choose pairs, refine.

Phases are idempotent: each computes and saves only what the store is missing, so an interrupted
phase resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import jax

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.decoding.decoder import Completion
from sdjax.decoding.sampling import Sampling
from sdjax.models.lora import Adapter
from sdjax.programs.extraction import extract_source
from sdjax.programs.families import HELD_OUT, families_of
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import Verdict, is_admissible
from sdjax.search.context import RunContext
from sdjax.search.memory.prompts import iteration_prompts
from sdjax.search.multihost import judge_all
from sdjax.search.pairs import make_pairs, select
from sdjax.search.ranking import development_scores
from sdjax.search.run_limits import end_if, never
from sdjax.search.sample_status import describe_failures
from sdjax.search.score_types import Application, Pair, ScoredSample, StoredPair
from sdjax.search.store import Store
from sdjax.search.structures import scored_programs
from sdjax.search.types import (
    MAIN,
    NOT_JUDGED,
    SEARCH,
    Program,
    Prompt,
    Sample,
    StoredVerdict,
    phase_title,
    program_entry,
)
from sdjax.training.api import train_dpo
from sdjax.training.dpo import TokenPair
from sdjax.training.packing import Example
from sdjax.training.trainable import lora_finetune

logger = logging.getLogger(__name__)


def generate(
    context: RunContext,
    store: Store,
    adapter: Adapter,
    *,
    iteration: int,
    count: int,
    temperature: float,
    purpose: str = SEARCH,
    out_of_time: Callable[[], bool] = never,
) -> None:
    """Sample the programs of an iteration from the generator.

    Args:
        context: the loaded run.
        store: the run's store.
        adapter: the generator's adapter.
        iteration: number of the iteration.
        count: number of samples of the iteration.
        temperature: sampling temperature.
        purpose: "search", that of a control, or the name of a measurement.
        out_of_time: called after each sample; returns whether to stop.

    Raises:
        OutOfTime: samples are missing; those that are there are saved.
    """
    missing = sorted(set(range(count)) - store.sample_numbers(iteration, purpose))
    if not missing:
        return
    prompted = iteration_prompts(
        context.renderer, store, purpose=purpose, iteration=iteration, numbers=missing
    )
    prompts = [Prompt.of(context.config.generation.prompt, one.prompt) for one in prompted]
    store.save(*dict.fromkeys(prompts))
    with progress_bar(phase_title("generate", iteration, purpose), len(missing)) as advance:

        def save(index: int, completion: Completion) -> None:
            text = completion.text or ""
            sample = Sample(
                purpose=purpose,
                iteration=iteration,
                number=missing[index],
                prompt=prompts[index].hash,
                text=text,
                tokens=completion.tokens,
                stopped=completion.stopped,
                source=extract_source(text),
                parents=prompted[index].parents,
                operation=prompted[index].operation,
            )
            store.save(sample)
            advance()
            end_if(out_of_time)

        context.generator_decoder.generate(
            context.seed,
            [prompt.text for prompt in prompts],
            adapter=adapter,
            sampling=Sampling(temperature=temperature, top_p=context.config.generation.top_p),
            key=context.key(purpose, iteration),
            sample_ids=missing,
            on_completion=save,
        )


def judge(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    *,
    iteration: int,
    purpose: str = SEARCH,
) -> None:
    """Judge all distinct sources of an iteration that do not have a verdict yet.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        iteration: number of the iteration.
        purpose: "search", that of a control, or the name of a measurement.
    """
    samples = store.judged(iteration, purpose)
    sources = list(dict.fromkeys(s.source for s in samples if s.source and s.status == NOT_JUDGED))
    with progress_bar(phase_title("admit", iteration, purpose), len(sources)) as advance:
        for index, verdict, layers in judge_all(sandbox, sources):
            source = sources[index]
            stored = StoredVerdict.of(source, verdict, layers)
            program = judged_program(context, source, verdict)
            store.save(stored, *([program] if program is not None else []))
            advance()


def judged_program(context: RunContext, source: str, verdict: Verdict) -> Program | None:
    """Return the program of an admissible verdict, with its families; None otherwise."""
    if not is_admissible(verdict.verdict) or verdict.identity is None or verdict.ir is None:
        return None
    program = Program(
        identity=verdict.identity,
        source=source,
        ir=verdict.ir,
        fingerprint=verdict.fingerprint,
        in_training=context.was_trained_on(verdict.identity),
        notes=verdict.notes,
        cost=verdict.cost,
    )
    if verdict.program is not None:  # already verified by this process
        context.verified[verdict.identity] = verdict.program
    families = families_of(context.verified_program(program))
    return dataclasses.replace(
        program,
        families=tuple(sorted(families)),
        held_out=tuple(sorted(families & HELD_OUT)),
    )


def scored_samples(context: RunContext, store: Store, iteration: int) -> Iterator[ScoredSample]:
    """Yield the admissible samples of an iteration with their scores.

    A duplicate gets its original's score. If structures are scored, all samples of one count as the
    program with its best numbers.
    """
    scores = development_scores(store, context.config.task.metric)
    applications, scored = store.by_key(Application, setting=MAIN), scored_programs(store)
    for sample in store.judged(iteration):
        identity = scored.get(sample.identity or "")
        if sample.admissible and identity is not None and program_entry(identity) in scores:
            yield ScoredSample(
                identity=identity,
                prompt=sample.prompt,
                text=sample.text,
                score=scores[program_entry(identity)],
                change=applications[program_entry(identity)].change,
                iteration=iteration,
                number=sample.number,
            )


def choose_pairs(context: RunContext, store: Store, *, iteration: int) -> tuple[Pair, ...]:
    """Make preference pairs from the programs of an iteration and the elites of earlier ones.

    An iteration without scored programs has no pairs.

    Raises:
        UserError: neither this iteration nor an earlier one has scored programs.
    """
    current = list(scored_samples(context, store, iteration))
    earlier = [list(scored_samples(context, store, number)) for number in range(1, iteration)]
    if not current:
        failures = describe_failures(store.judged(iteration), store.by_key(StoredVerdict))
        nothing = f"no program of iteration {iteration} could be scored ({failures})"
        if not any(earlier):
            raise UserError(
                f"{store.folder}: {nothing}; start a run with more generation.samples, a lower "
                "generation.temperature, another prompt, or a generator that can write programs"
            )
        logger.warning("%s; the run goes on with the same generator", nothing)
        return ()
    config = context.config.selection
    key = int(jax.random.randint(context.key("pairs", iteration), (), 0, 2**31 - 1))
    pairs = make_pairs(select(current, earlier, config), config, key=key)
    if not store.select(StoredPair, iteration=iteration):
        store.save(
            *(
                StoredPair(
                    iteration=iteration, number=number, chosen=pair.chosen, rejected=pair.rejected
                )
                for number, pair in enumerate(pairs)
            )
        )
    return pairs


def refine(
    context: RunContext, store: Store, adapter: Adapter, pairs: Sequence[Pair], *, iteration: int
) -> Adapter:
    """Train the generator for one round of DPO; return the adapter for the next iteration."""
    examples = _examples(context, store)
    token_pairs = [
        TokenPair(
            chosen=examples[pair.chosen.iteration, pair.chosen.number],
            rejected=examples[pair.rejected.iteration, pair.rejected.number],
        )
        for pair in pairs
    ]
    factors, _ = train_dpo(
        lora_finetune(context.model, context.compute_seed, adapter),
        token_pairs,
        context.config.training,
        key=context.key("refine", iteration),
        title=f"iteration {iteration}: refine",
        jit_cache=context.training_jits,
    )
    return dataclasses.replace(adapter, factors=factors)


def _examples(context: RunContext, store: Store) -> dict[tuple[int, int], Example]:
    """Return prompt and target tokens of the search's samples by (iteration, number)."""
    prompts = {
        digest: tuple(context.tokenizer.encode_prompt(text))
        for digest, text in store.prompts().items()
    }
    end = context.tokenizer.eos_ids[:1]
    return {
        (sample.iteration, sample.number): Example(
            prompt=prompts[sample.prompt],
            target=sample.tokens + (end if sample.stopped else ()),
        )
        for sample in store.judged()
    }
