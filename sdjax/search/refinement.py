"""Training of the generator after an iteration: what it is trained on, and the training.

Like the other phases, these are idempotent: what they return depends on the store alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax

from sdjax.core.errors import UserError
from sdjax.decoding.sampling import Sampling
from sdjax.models.lora import Adapter
from sdjax.search.base_identity import iterations_on_base
from sdjax.search.context import RunContext
from sdjax.search.pairs import make_pairs
from sdjax.search.ranking import development_scores
from sdjax.search.sample_status import describe_failures
from sdjax.search.score_types import Application, Promotion, ScoredSample, StoredPair
from sdjax.search.store import Store
from sdjax.search.structures import scored_programs
from sdjax.search.training_data import (
    REFUSED,
    TrainingData,
    fault_of,
    weighted_samples,
)
from sdjax.search.types import (
    MAIN,
    OWN_GENERATOR,
    JudgedSample,
    Sample,
    StoredVerdict,
    program_entry,
)
from sdjax.training.api import train_dpo, train_policy_gradient
from sdjax.training.dpo import TokenPair
from sdjax.training.packing import Example
from sdjax.training.policy_gradient import AdvantageExample
from sdjax.training.trainable import Trainable, lora_finetune

logger = logging.getLogger(__name__)


def scored_samples(context: RunContext, store: Store, iteration: int) -> Iterator[ScoredSample]:
    """Yield the admissible samples of an iteration with their scores.

    A duplicate gets its original's score. If structures are scored, all samples of one count as the
    program with its best numbers.
    """
    for _, scored in _with_scores(context, store, store.judged(iteration)):
        if scored is not None:
            yield scored


def choose_training_data(context: RunContext, store: Store, *, iteration: int) -> TrainingData:
    """Return what the generator is trained on after an iteration; the pairs are also stored.

    It is empty after an iteration without scored programs. Earlier iterations on another base do
    not count, since scores on different bases say nothing about which program is better.

    Raises:
        UserError: neither this iteration nor an earlier one has scored programs.
    """
    selection, judged = context.config.selection, store.judged()
    samples = _training_samples(context, store, [s for s in judged if s.iteration <= iteration])
    current = [one for one in samples if one.iteration == iteration]
    if not any(one.fault != REFUSED for one in current):
        own = [sample for sample in judged if sample.iteration == iteration]
        failures = describe_failures(own, store.by_key(StoredVerdict))
        nothing = f"no program of iteration {iteration} could be scored ({failures})"
        if not any(one.fault != REFUSED for one in samples):
            raise UserError(
                f"{store.folder}: {nothing}; start a run with more generation.samples, a lower "
                "generation.temperature, another prompt, or a generator that can write programs"
            )
        logger.warning("%s", nothing)
        return TrainingData()
    comparable = iterations_on_base(store.select(Promotion), iteration)
    samples = [one for one in samples if one.iteration in (*comparable, iteration)]
    if context.config.training.objective == "entropic":
        trained = {s.number for s in judged if s.iteration == iteration and is_own(s)}
        on_policy = [one for one in current if one.number in trained]
        weighted = weighted_samples(on_policy, within_prompt=selection.within_prompt)
        return TrainingData(samples=weighted)
    by_iteration = [[one for one in samples if one.iteration == number] for number in comparable]
    key = int(jax.random.randint(context.key("pairs", iteration), (), 0, 2**31 - 1))
    if selection.iterations == "all":
        pairs = make_pairs(samples, [], selection, key=key)
    else:
        pairs = make_pairs(current, by_iteration, selection, key=key)
    if not store.select(StoredPair, iteration=iteration):
        store.save(
            *(
                StoredPair(
                    iteration=iteration, number=number, chosen=pair.chosen, rejected=pair.rejected
                )
                for number, pair in enumerate(pairs)
            )
        )
    return TrainingData(pairs=pairs)


def refine(
    context: RunContext, store: Store, adapter: Adapter, data: TrainingData, *, iteration: int
) -> Adapter:
    """Train the generator for one round; return the adapter for the next iteration.

    Args:
        context: the loaded run.
        store: the run's store.
        adapter: adapter of the generator that wrote the iteration's samples. If there is nothing
            to train on, it is returned, and that is logged.
        data: what to train on. Texts that are too long for the model are left out.
        iteration: number of the iteration.
    """
    config = context.config.training
    start = adapter if config.start == "current" else context.new_adapter()
    trainable = lora_finetune(context.model, context.compute_seed, start)
    options: dict[str, Any] = {
        "key": context.key("refine", iteration),
        "title": f"iteration {iteration}: refine",
        "jit_cache": context.training_jits,
    }
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in data.summary().items())
    logger.info("iteration %d: training data: %s", iteration, counts)
    train = _train_on_samples if data.samples else _train_on_pairs
    factors = train(context, store, trainable, data, iteration, options)
    if factors is None:
        logger.info("iteration %d: nothing to train on; the generator is unchanged", iteration)
        return adapter
    return dataclasses.replace(start, factors=factors)


def is_own(sample: Sample) -> bool:
    """Return whether a sample was written by the generator that the run trains."""
    return sample.generator == OWN_GENERATOR


def _train_on_pairs(
    context: RunContext,
    store: Store,
    trainable: Trainable,
    data: TrainingData,
    iteration: int,
    options: dict[str, Any],
) -> Any:
    """Return the trained factors after a round of DPO; None without usable pairs."""
    examples = _examples(context, store)
    pairs = [
        TokenPair(
            chosen=examples[pair.chosen.iteration, pair.chosen.number],
            rejected=examples[pair.rejected.iteration, pair.rejected.number],
        )
        for pair in data.pairs
    ]
    pairs = [
        pair
        for pair in pairs
        if max(len(pair.chosen), len(pair.rejected)) <= context.model.max_seq_len
    ]
    if len(pairs) < len(data.pairs):
        logger.warning(
            "iteration %d: %d of %d pairs are longer than the model's maximum sequence length, %d, "
            "and are left out",
            *(iteration, len(data.pairs) - len(pairs), len(data.pairs)),
            context.model.max_seq_len,
        )
    if not pairs:
        return None
    return train_dpo(trainable, pairs, context.config.training, **options)[0]


def _train_on_samples(
    context: RunContext,
    store: Store,
    trainable: Trainable,
    data: TrainingData,
    iteration: int,
    options: dict[str, Any],
) -> Any:
    """Return the trained factors after a round of policy gradient."""
    examples = _examples(context, store)
    weighted = [
        AdvantageExample(
            example=examples[one.sample.iteration, one.sample.number], advantage=one.advantage
        )
        for one in data.samples
    ]
    generation = context.config.generation
    sampling = Sampling(temperature=generation.temperature_at(iteration), top_p=generation.top_p)
    config = context.config.training
    return train_policy_gradient(trainable, weighted, config, sampling=sampling, **options)[0]


def _training_samples(
    context: RunContext, store: Store, judged: list[JudgedSample]
) -> list[ScoredSample]:
    """Return the samples that may be trained on: those with a score, and those with a fault."""
    config, samples = context.config.selection, []
    for sample, scored in _with_scores(context, store, judged):
        fault = fault_of(sample, None if scored is None else scored.change, config)
        if scored is not None:
            samples.append(dataclasses.replace(scored, fault=fault))
        elif fault == REFUSED:
            samples.append(
                ScoredSample(
                    identity="",
                    prompt=sample.prompt,
                    text=sample.text,
                    score=0.0,
                    change=0.0,
                    iteration=sample.iteration,
                    number=sample.number,
                    fault=fault,
                )
            )
    return samples


def _with_scores(
    context: RunContext, store: Store, judged: list[JudgedSample]
) -> Iterator[tuple[JudgedSample, ScoredSample | None]]:
    """Yield samples with the scores of their programs; None if a program has none."""
    scores = development_scores(store, context.config.task.metric)
    applications, programs = store.by_key(Application, setting=MAIN), scored_programs(store)
    for sample in judged:
        identity = programs.get(sample.identity or "")
        if not sample.admissible or identity is None or program_entry(identity) not in scores:
            yield sample, None
            continue
        scored = ScoredSample(
            identity=identity,
            prompt=sample.prompt,
            text=sample.text,
            score=scores[program_entry(identity)],
            change=applications[program_entry(identity)].change,
            iteration=sample.iteration,
            number=sample.number,
        )
        yield sample, scored


def _examples(context: RunContext, store: Store) -> dict[tuple[int, int], Example]:
    """Return prompt and target tokens of the search's samples by (iteration, number).

    The text of another generator is tokenized by the seed's tokenizer.
    """
    tokenizer = context.tokenizer
    prompts = {
        digest: tuple(tokenizer.encode_prompt(text)) for digest, text in store.prompts().items()
    }
    end = tokenizer.eos_ids[:1]

    def target(sample: Sample) -> tuple[int, ...]:
        tokens = sample.tokens
        if not is_own(sample):
            tokens = tuple(tokenizer.encode(sample.text, add_special=False))
        return tokens + (end if sample.stopped else ())

    return {
        (sample.iteration, sample.number): Example(
            prompt=prompts[sample.prompt], target=target(sample)
        )
        for sample in store.judged()
    }
