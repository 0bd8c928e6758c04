"""The phases of an iteration. Each reads what the store has, and does and keeps what it lacks.

So a phase that was interrupted goes on where it stopped, and one that is whole does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.decoding.decoder import Completion
from sdjax.decoding.sampling import Sampling
from sdjax.evaluation.evaluate import evaluate
from sdjax.evaluation.task import Outcome
from sdjax.models.lora import Adapter
from sdjax.programs.extraction import extract_program
from sdjax.programs.families import HELD_OUT, families_of
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import apply_program
from sdjax.search.context import RunContext
from sdjax.search.multihost import judge_all
from sdjax.search.pairs import Pair, Scored, make_pairs, select
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    MAIN,
    SEARCH,
    Candidate,
    JudgedSample,
    Sample,
    program_candidate,
)
from sdjax.training.dpo import DPOSettings, TokenPair, train_dpo
from sdjax.training.packing import Example
from sdjax.training.trainable import lora_finetune

# Outcomes that are kept with one commit.
_OUTCOMES = 64


def generate(
    bench: RunContext,
    store: Store,
    adapter: Adapter,
    *,
    iteration: int,
    count: int,
    temperature: float,
    purpose: str = SEARCH,
) -> None:
    """Samples the programs of an iteration from the generator."""
    missing = sorted(set(range(count)) - store.sample_numbers(iteration, purpose))
    if not missing:
        return
    prompt = store.save_prompt(bench.config.generation.prompt, bench.prompt)
    tokens = bench.tokenizer.encode_prompt(bench.prompt)
    with progress_bar(f"iteration {iteration}: generate", len(missing)) as advance:

        def keep(index: int, completion: Completion) -> None:
            if completion.failure is not None:
                raise UserError(
                    f"generation.prompt: {completion.failure}; "
                    "add a larger bucket to generation.decoding.buckets"
                )
            text = bench.tokenizer.decode(completion.tokens)
            sample = Sample(
                purpose=purpose,
                iteration=iteration,
                number=missing[index],
                prompt=prompt,
                text=text,
                tokens=completion.tokens,
                stopped=completion.stopped,
                source=extract_program(text),
            )
            store.save_samples([sample])
            advance()

        bench.generator_decoder.decode(
            bench.seed,
            adapter,
            [tokens] * len(missing),
            sampling=Sampling(temperature=temperature, top_p=bench.config.generation.top_p),
            key=bench.fold(purpose, iteration),
            numbers=missing,
            on_finished=keep,
        )


def judge(
    bench: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    *,
    iteration: int,
    purpose: str = SEARCH,
) -> None:
    """Admits or refuses the distinct programs of an iteration that have no verdict yet.

    The sandbox is the main process's; None on the others.
    """
    known = store.verdicts()
    sources: dict[str, str] = {}
    for sample in store.judged(iteration, purpose):
        if sample.source_hash is not None and sample.source_hash not in known:
            source = extract_program(sample.text)
            assert source is not None
            sources[sample.source_hash] = source
    texts = list(sources.values())
    with progress_bar(f"iteration {iteration}: admit", len(texts)) as advance:
        for index, verdict, layers in judge_all(sandbox, texts):
            store.save_verdict(texts[index], verdict, layers)
            if verdict.admitted and verdict.identity is not None:
                families = families_of(texts[index])
                store.save_origin(
                    verdict.identity,
                    in_training=bench.was_trained_on(verdict.identity),
                    families=sorted(families),
                    held_out=sorted(families & HELD_OUT),
                )
            advance()


def score_programs(
    bench: RunContext, store: Store, *, iteration: int, purpose: str = SEARCH
) -> None:
    """Applies and scores every novel program of an iteration on the development problems."""
    identities = [sample.identity for sample in store.judged(iteration, purpose) if sample.novel]
    with progress_bar(f"iteration {iteration}: score", len(identities)) as advance:
        for identity in identities:
            assert identity is not None
            score_program(bench, store, identity, DEVELOPMENT)
            advance()


def score_program(
    bench: RunContext, store: Store, identity: str, split: str, setting: str = MAIN
) -> None:
    """Applies a verified program to the seed and scores the merged model."""
    name = program_candidate(identity)
    application = store.applications(setting).get(name)
    if application is not None and not application.admitted:
        return
    if is_scored(store, name, split, setting):
        return
    found, merged = apply_program(bench, identity, store.ir_of(identity), setting)
    store.save_candidate(Candidate(name=name, kind="program", identity=identity))
    if application is None:
        store.save_application(found)
    if merged is not None:
        score(bench, store, name, merged.params, split, setting)


def score(
    bench: RunContext, store: Store, candidate: str, params: dict, split: str, setting: str = MAIN
) -> None:
    """Decodes and grades the problems of a split that the candidate has no outcome for."""
    if is_scored(store, candidate, split, setting):
        return
    done = {outcome.problem_id for outcome in store.outcomes(candidate, split, setting)}
    problems = [one for one in bench.problems[split] if one.problem.id not in done]
    kept: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        kept.append(outcome)
        if len(kept) == _OUTCOMES:
            store.save_scores(candidate, split, kept, complete=False, setting=setting)
            kept.clear()

    evaluate(bench.eval_decoder, bench.tokenizer, params, bench.task, problems, on_outcome=keep)
    store.save_scores(candidate, split, kept, setting=setting)


def is_scored(store: Store, candidate: str, split: str, setting: str = MAIN) -> bool:
    return any(
        summary.candidate == candidate and summary.complete
        for summary in store.summaries(split, setting)
    )


def development_scores(bench: RunContext, store: Store, setting: str = MAIN) -> dict[str, float]:
    """Candidate to its accuracy on the development problems, by the metric of the run."""
    metric = bench.config.task.metric
    return {
        summary.candidate: getattr(summary, metric)
        for summary in store.summaries(DEVELOPMENT, setting)
        if summary.complete
    }


def scored_samples(bench: RunContext, store: Store, iteration: int) -> Iterator[Scored]:
    """The samples of an iteration whose program has a score."""
    scores = development_scores(bench, store)
    applications = store.applications()
    for sample in store.judged(iteration):
        name = program_candidate(sample.identity or "")
        if sample.admissible and name in scores:
            assert sample.identity is not None
            yield Scored(
                identity=sample.identity,
                prompt=sample.prompt,
                text=sample.text,
                score=scores[name],
                change=applications[name].change,
                iteration=iteration,
                number=sample.number,
            )


def choose_pairs(bench: RunContext, store: Store, *, iteration: int) -> tuple[Pair, ...]:
    """Ranks the programs of an iteration, elites of the earlier ones beside them, into pairs.

    Raises:
        UserError: the iteration has no admissible program.
    """
    current = list(scored_samples(bench, store, iteration))
    if not current:
        reasons = _reasons(store.judged(iteration))
        raise UserError(
            f"{store.folder}: iteration {iteration} has no program that could be scored "
            f"({reasons}); raise generation.samples, lower generation.temperature, or start from "
            "a seed that writes programs"
        )
    earlier = [list(scored_samples(bench, store, number)) for number in range(1, iteration)]
    settings = bench.config.selection.settings()
    key = int(jax.random.randint(bench.fold("pairs", iteration), (), 0, 2**31 - 1))
    pairs = make_pairs(select(current, earlier, settings), settings, key=key)
    if not store.pairs(iteration):
        store.save_pairs(iteration, pairs)
    return pairs


def refine(
    bench: RunContext, store: Store, adapter: Adapter, pairs: Sequence[Pair], *, iteration: int
) -> Adapter:
    """One round of DPO; the generator of the next iteration."""
    training = bench.config.training
    examples = _examples(bench, store)
    token_pairs = [
        TokenPair(
            winner=examples[pair.winner.iteration, pair.winner.number],
            loser=examples[pair.loser.iteration, pair.loser.number],
        )
        for pair in pairs
    ]
    settings = DPOSettings(
        beta=training.beta,
        learning_rate=training.learning_rate,
        nll_weight=training.nll_weight,
        batch=training.batch,
        steps=training.steps_for(len(pairs)),
        warmup=training.warmup,
        reference=training.reference,
    )
    with progress_bar(f"iteration {iteration}: refine", settings.steps) as advance:

        def show(step: int, metrics: dict[str, float]) -> None:
            advance(
                description=f"iteration {iteration}: refine, loss {metrics['loss']:.3f}, "
                f"accuracy {metrics['accuracy']:.2f}"
            )

        factors, _ = train_dpo(
            lora_finetune(bench.model, bench.compute_seed, adapter),
            token_pairs,
            settings,
            key=bench.fold("refine", iteration),
            on_step=show,
        )
    return dataclasses.replace(adapter, factors=factors)


def _examples(bench: RunContext, store: Store) -> dict[tuple[int, int], Example]:
    """The samples of the search as prompt and target tokens, by iteration and number."""
    prompts = {
        digest: tuple(bench.tokenizer.encode_prompt(text))
        for digest, text in store.prompts().items()
    }
    end = bench.tokenizer.eos_ids[:1]
    return {
        (sample.iteration, sample.number): Example(
            prompt=prompts[sample.prompt],
            target=sample.tokens + (end if sample.stopped else ()),
        )
        for sample in store.judged()
    }


def _reasons(samples: Sequence[JudgedSample]) -> str:
    statuses = [sample.status for sample in samples]
    names, counts = np.unique(statuses, return_counts=True)
    return ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
