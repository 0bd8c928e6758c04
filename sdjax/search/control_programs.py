"""Control programs: random ones of the grammar, and those of the untrained generator.

They show what the trained generator adds: at most as many samples, judged, scored and tuned in the
same way, without it. Neither control evaluates more development problems than the programs of the
search did, so it is sampled in batches: a batch has at most as many programs as fit into the rest
of the budget if each of them cost as much as one can. Refused programs and duplicates cost nothing,
and most programs stop early in a race, so later batches use what a batch leaves. What is left in
the end is less than one program may cost.

A control program that the search has found as well keeps the outcomes that it has, which count for
both. The samples of the first iteration are from the untrained generator, so they count for it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from sdjax.programs.grammar import sample_candidate
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.budget import most_problems, spent, spent_on_tuning
from sdjax.search.context import RunContext
from sdjax.search.controls import program_controls, samples_of_control
from sdjax.search.iteration_scores import score_programs
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.phases import generate, judge
from sdjax.search.promotion import promote
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, GRAMMAR, RANDOM, SEARCH, UNTRAINED, Sample, phase_name

# Saves the samples of a batch: (number of the batch, samples of earlier ones, samples of this one).
_Sampler = Callable[[int, int, int], None]


def try_control_programs(
    context: RunContext, store: Store, sandbox: Sandbox | None, clock: PhaseClock
) -> None:
    """Sample, judge and score the control programs, after the last iteration of the search.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        clock: measures the phases.
    """
    for purpose in program_controls(context.config):
        sample = _random_sampler if purpose == RANDOM else _untrained_sampler
        _try_batches(context, store, sandbox, clock, purpose, sample(context, store))


def problems_left(context: RunContext, store: Store, purpose: str) -> int:
    """Return how many more problems the programs of a control may evaluate before they are tuned.

    It is the budget of the search, minus what tuning the best of them may take.
    """
    tuning, reserved = context.config.tuning, 0
    if tuning is not None:
        reserved = tuning.programs * tuning.search.budget * len(context.problems[DEVELOPMENT])
    budget = spent(store, SEARCH).problems + spent_on_tuning(store, SEARCH).problems
    return budget - reserved - spent(store, purpose).problems


def _try_batches(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    clock: PhaseClock,
    purpose: str,
    sample: _Sampler,
) -> None:
    config = context.config
    batch, earlier = 1, 0
    while True:
        count = len(store.sample_numbers(batch, purpose))
        if (batch, phase_name("generate", purpose)) not in store.phases():
            # Nothing of the batch has been scored, so that a resumed run finds the same count.
            count = min(
                config.generation.samples,
                samples_of_control(config, purpose) - earlier,
                problems_left(context, store, purpose)
                // most_problems(config, len(context.problems[DEVELOPMENT])),
            )
        if count < 1:
            return
        with clock.timed(batch, "generate", purpose):
            sample(batch, earlier, count)
        with clock.timed(batch, "admit", purpose):
            judge(context, store, sandbox, iteration=batch, purpose=purpose)
        with clock.timed(batch, "score", purpose):
            score_programs(context, store, sandbox, iteration=batch, purpose=purpose)
        if config.coevolution is not None:
            with clock.timed(batch, "promote", purpose):
                promote(context, store, sandbox, iteration=batch, purpose=purpose)
        clock.log_estimate()
        batch, earlier = batch + 1, earlier + count


def _random_sampler(context: RunContext, store: Store) -> _Sampler:
    """Return a sampler of the grammar."""

    def sample(batch: int, earlier: int, count: int) -> None:
        save_random_programs(
            context, store, purpose=RANDOM, iteration=batch, earlier=earlier, count=count
        )

    return sample


def save_random_programs(
    context: RunContext, store: Store, *, purpose: str, iteration: int, earlier: int, count: int
) -> None:
    """Save the random programs of an iteration that are missing.

    Args:
        context: the loaded run.
        store: the run's store.
        purpose: "search", or that of a control.
        iteration: number of the iteration, or of the batch of a control.
        earlier: number of random programs in earlier iterations, on which the programs depend.
        count: number of random programs in this one.
    """
    prompt = store.save_prompt(GRAMMAR, "")
    texts = {
        number: random_program(context, earlier + number)
        for number in sorted(set(range(count)) - store.sample_numbers(iteration, purpose))
    }
    store.save(
        *(
            Sample(
                purpose=purpose,
                iteration=iteration,
                number=number,
                prompt=prompt,
                text=text,
                tokens=(),
                stopped=True,
                source=text,
                generator=GRAMMAR,
            )
            for number, text in texts.items()
        )
    )


def random_program(context: RunContext, number: int) -> str:
    """Return the source of a random program of the whole grammar, without deliberate faults."""
    bits = jax.random.key_data(context.key(RANDOM, number))
    rng = np.random.default_rng(np.asarray(bits))
    while True:
        candidate = sample_candidate(rng, slots=len(context.config.slots), allow_held_out=True)
        if not candidate.fails:
            return candidate.text


def _untrained_sampler(context: RunContext, store: Store) -> _Sampler:
    """Return a sampler of the first generator, at the temperatures of the search."""
    adapter, generation = context.new_adapter(), context.config.generation

    def sample(batch: int, earlier: int, count: int) -> None:
        generate(
            context,
            store,
            adapter,
            iteration=batch,
            count=count,
            temperature=generation.temperature_at(2 + earlier // generation.samples),
            purpose=UNTRAINED,
        )

    return sample
