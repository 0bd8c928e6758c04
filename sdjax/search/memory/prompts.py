"""The prompts of the samples of an iteration, with what earlier iterations have found.

A prompt depends on the run's random key and on the iterations before its own, so that a resumed run
asks the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from sdjax.programs.memory_prompts import (
    COMBINE,
    EarlierProgram,
    Operation,
    PromptMemory,
    RefusedProgram,
)
from sdjax.search.context import run_key
from sdjax.search.memory.parents import draw_parents
from sdjax.search.memory.population import Member
from sdjax.search.memory.reading import Findings, read_findings
from sdjax.search.memory.renderer import PromptRenderer
from sdjax.search.memory_config import MemoryConfig
from sdjax.search.store import Store

_SHOWN = "prompts"  # purpose of the random key, with that of the samples
_DRAWS = 1  # separates the draws of a prompt from those of its parents


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedSample:
    """The prompt of a sample.

    Attributes:
        number: number of the sample within its iteration.
        prompt: the text that the run's own generator reads, in its chat template if it has one.
        message: the same without chat template, for generators with one of their own.
        parents: identities of the programs in the prompt, the best one last.
        operation: what the prompt asks to do with them; None without programs.
    """

    number: int
    prompt: str
    message: str
    parents: tuple[str, ...] = ()
    operation: str | None = None


def iteration_prompts(
    renderer: PromptRenderer,
    store: Store,
    *,
    purpose: str,
    iteration: int,
    numbers: Sequence[int],
) -> list[PromptedSample]:
    """Return the prompts of samples of an iteration.

    A prompt that is too long for the decoder loses its refused program, then its worst programs.

    Args:
        renderer: the prompt of the run; see `RunPlan.renderer`.
        store: the run's store.
        purpose: "search", that of a control, or the name of a measurement.
        iteration: number of the iteration, or of the batch of a control.
        numbers: numbers of the samples.
    """
    plain = _prompted(renderer, renderer.message())
    memory = renderer.config.generation.memory
    if memory is None or not numbers:
        return [dataclasses.replace(plain, number=number) for number in numbers]
    findings = read_findings(renderer.config, store, purpose=purpose, iteration=iteration)
    findings = _readable(renderer, findings)
    groups = max(numbers) // memory.samples_per_prompt + 1
    key = run_key(renderer.config.rng_seed, f"{_SHOWN} {purpose}", iteration)
    key_data = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    parents = draw_parents(memory, findings.population, groups, key_data)
    wanted = {number // memory.samples_per_prompt for number in numbers}
    prompts = {
        group: _group_prompt(
            renderer,
            memory,
            parents[group],
            findings.refused,
            np.random.default_rng([*key_data, group, _DRAWS]),
        )
        for group in sorted(wanted)
    }
    return [
        dataclasses.replace(prompts[number // memory.samples_per_prompt], number=number)
        for number in numbers
    ]


def _readable(renderer: PromptRenderer, findings: Findings) -> Findings:
    """Return the findings without sources that contain special tokens of the tokenizer."""
    population = findings.population
    members = tuple(one for one in population.members if renderer.is_text(one.source))
    return Findings(
        population=dataclasses.replace(population, members=members),
        refused=tuple(one for one in findings.refused if renderer.is_text(one.source)),
    )


def _group_prompt(
    renderer: PromptRenderer,
    config: MemoryConfig,
    parents: Sequence[Member],
    refused: Sequence[RefusedProgram],
    rng: np.random.Generator,
) -> PromptedSample:
    """Return the prompt with these parents, or with the best of them that fit."""
    operation = _draw_operation(config.operations, rng)
    simpler = _draw_operation(
        {name: share for name, share in config.operations.items() if name != COMBINE}, rng
    )
    asks = "operation" in renderer.template.variables
    shown = [refused[int(rng.integers(len(refused)))]] if config.refused and refused else []
    while parents or shown:
        if len(parents) < 2 and operation == COMBINE:
            operation = simpler
        memory = PromptMemory(
            programs=tuple(_shown(member) for member in parents),
            refused=tuple(shown),
            operation=operation if parents else None,
        )
        message = renderer.message(memory)
        if renderer.length(message) <= renderer.max_tokens:
            return dataclasses.replace(
                _prompted(renderer, message),
                parents=tuple(member.identity for member in parents),
                operation=memory.operation if asks else None,
            )
        if shown:
            shown = []
        else:
            parents = parents[1:]  # the best one is last
    return _prompted(renderer, renderer.message())


def _draw_operation(
    shares: Mapping[Operation, float], rng: np.random.Generator
) -> Operation | None:
    """Draw an operation by the relative frequencies; None if no frequency is positive."""
    total = sum(shares.values())
    if not total:
        return None
    names = sorted(shares)
    return names[rng.choice(len(names), p=[shares[name] / total for name in names])]


def _prompted(renderer: PromptRenderer, message: str) -> PromptedSample:
    return PromptedSample(number=0, prompt=renderer.tokenizer.as_prompt(message), message=message)


def _shown(member: Member) -> EarlierProgram:
    return EarlierProgram(
        source=member.source,
        score=100 * member.score,
        change=member.change,
        families=tuple(_in_words(member.families)),
    )


def _in_words(families: Iterable[str]) -> Iterable[str]:
    return (family.replace("_", " ") for family in families)
