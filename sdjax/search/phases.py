"""The phases of an iteration that make programs: generate and judge.

Phases are idempotent: each computes and saves only what the store is missing, so an interrupted
phase resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sdjax.core.progress import progress_bar
from sdjax.generators.types import GeneratedText
from sdjax.models.lora import Adapter
from sdjax.programs.families import HELD_OUT, families_of
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import Verdict, is_admissible
from sdjax.search.base_identity import base_of_iteration, on_base
from sdjax.search.context import RunContext
from sdjax.search.iteration_generators import sample_texts
from sdjax.search.memory.prompts import iteration_prompts
from sdjax.search.multihost import judge_all
from sdjax.search.run_limits import end_if, never
from sdjax.search.score_types import Promotion
from sdjax.search.store import Store
from sdjax.search.types import (
    NOT_JUDGED,
    OWN_GENERATOR,
    SEARCH,
    Program,
    Prompt,
    Sample,
    StoredVerdict,
    phase_title,
)


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
    """Sample the programs of an iteration from the generators.

    Args:
        context: the loaded run.
        store: the run's store.
        adapter: the adapter of the run's own generator.
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
    name = context.config.generation.prompt
    prompts = {one.number: Prompt.of(name, one.prompt) for one in prompted}
    store.save(*dict.fromkeys(prompts.values()))
    memory = {one.number: one for one in prompted}
    with progress_bar(phase_title("generate", iteration, purpose), len(missing)) as advance:

        def save(generator: str, number: int, text: GeneratedText) -> None:
            sample = Sample(
                purpose=purpose,
                iteration=iteration,
                number=number,
                prompt=prompts[number].hash,
                text=text.text,
                tokens=text.tokens if generator == OWN_GENERATOR else (),
                stopped=text.stopped,
                source=text.source,
                generator=generator,
                parents=memory[number].parents,
                operation=memory[number].operation,
            )
            store.save(sample)
            advance()
            end_if(out_of_time)

        sample_texts(
            context,
            store,
            adapter,
            prompted,
            iteration=iteration,
            count=count,
            temperature=temperature,
            purpose=purpose,
            on_text=save,
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
    save_on_base(store, iteration=iteration, purpose=purpose)


def save_on_base(store: Store, *, iteration: int, purpose: str = SEARCH) -> None:
    """Save the programs of an iteration as programs on its base, unless that is the seed.

    Args:
        store: the run's store.
        iteration: number of the iteration, whose sources have been judged.
        purpose: as in `judge`.
    """
    base = base_of_iteration(store.select(Promotion), purpose, iteration)
    if base is None:
        return
    verdicts, known = store.by_key(StoredVerdict), store.by_key(Program)
    for sample in store.select(Sample, purpose=purpose, iteration=iteration):
        verdict = verdicts.get(sample.source or "")
        if verdict is None or verdict.identity not in known:
            continue
        program = on_base(known[verdict.identity], base)
        if program.identity not in known:
            known[program.identity] = program
            store.save(program)


def judged_program(context: RunContext, source: str, verdict: Verdict) -> Program | None:
    """Return the program of an admissible verdict on the context's base, with its families.

    Args:
        context: the loaded run.
        source: source code of the program.
        verdict: the sandbox's verdict; None is returned unless it is admissible.
    """
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
    program = dataclasses.replace(
        program,
        families=tuple(sorted(families)),
        held_out=tuple(sorted(families & HELD_OUT)),
    )
    return on_base(program, context.base)
