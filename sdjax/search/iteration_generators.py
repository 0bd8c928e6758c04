"""The generators of an iteration: which samples each one writes, and the texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from sdjax.core.random_keys import fold_in_name
from sdjax.decoding.sampling import Sampling
from sdjax.generators.config import EndpointConfig
from sdjax.generators.endpoint import Endpoint
from sdjax.generators.local import LocalGenerator
from sdjax.generators.program_folder import ProgramFolder
from sdjax.generators.recording import Recording
from sdjax.generators.shared import SharedGenerator
from sdjax.generators.shares import Record, assign_samples
from sdjax.generators.types import GeneratedText, GenerationRequest, Generator
from sdjax.models.lora import Adapter
from sdjax.search.config import RunConfig
from sdjax.search.context import RunContext
from sdjax.search.memory.prompts import PromptedSample
from sdjax.search.ranking import development_scores, rank_key
from sdjax.search.store import Store
from sdjax.search.structures import scored_programs
from sdjax.search.types import OWN_GENERATOR, SEARCH, JudgedSample, program_entry
from sdjax.sharding.multihost import is_main_process

ANSWERS_FOLDER = "answers"

OnGenerated = Callable[[str, int, GeneratedText], None]
"""Is called with the name of a generator, the number of a sample, and its text."""


def generator_names(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the generators of a run, its own first."""
    own = (OWN_GENERATOR,) if config.generation.seed_generator else ()
    return (*own, *config.generators)


def sample_texts(
    context: RunContext,
    store: Store,
    adapter: Adapter,
    prompted: Sequence[PromptedSample],
    *,
    iteration: int,
    count: int,
    temperature: float,
    purpose: str,
    on_text: OnGenerated,
) -> None:
    """Write the texts of samples of an iteration, each by the generator that it is assigned to.

    A sample that an endpoint does not write, since its budget is used up, is written by the first
    local model; without one, by a folder that has programs left. Else it is left out.

    Args:
        context: the loaded run.
        store: the run's store.
        adapter: the adapter of the run's own generator.
        prompted: the samples to write, with their prompts.
        iteration: number of the iteration.
        count: number of samples of the iteration, with those that are written already.
        temperature: sampling temperature.
        purpose: "search", for which all generators write; for any other purpose, only the run's own
            generator does.
        on_text: see `OnGenerated`.

    Raises:
        UserError: see `sdjax.generators.types.Generator`.
    """
    waiting = {sample.number: sample for sample in prompted}

    def write(name: str, assigned: Sequence[int]) -> None:
        samples = [waiting[number] for number in assigned if number in waiting]
        if not samples:
            return
        generator = _open(
            context,
            store,
            name,
            adapter=adapter,
            iteration=iteration,
            temperature=temperature,
            purpose=purpose,
        )

        def report(number: int, text: GeneratedText) -> None:
            on_text(name, number, text)
            del waiting[number]

        generator.sample([_request(context, name, sample) for sample in samples], on_text=report)

    if purpose != SEARCH or not context.config.generators:
        write(OWN_GENERATOR, range(count))
        return
    for name, assigned in assignment(context, store, iteration=iteration, count=count).items():
        write(name, assigned)
    local = [name for name in generator_names(context.config) if _is_local(context, name)]
    for name in local[:1] or context.generators.programs:
        write(name, sorted(waiting))


def assignment(
    context: RunContext, store: Store, *, iteration: int, count: int
) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the samples that each generator writes in an iteration.

    They depend only on the run's random key and on the iterations before, so that a resumed run
    assigns the same; see `sdjax.generators.shares`.
    """
    shares = context.config.generation.shares
    words = np.asarray(jax.random.key_data(context.key("shares", iteration))).ravel()
    names = assign_samples(
        generator_records(context, store, before=iteration),
        count,
        minimum=shares.minimum_percent / 100,
        rng=np.random.default_rng(words.tolist()),
    )
    return {
        name: tuple(number for number, other in enumerate(names) if other == name)
        for name in generator_names(context.config)
    }


def generator_records(context: RunContext, store: Store, *, before: int) -> dict[str, Record]:
    """Return what each generator has found in the iterations before one.

    A success is the first sample of one of the best `top_percent` % of the distinct scored
    programs, at least of the best one.
    """
    config = context.config
    samples = [sample for sample in store.judged() if sample.iteration < before]
    scores, scored = development_scores(store, config.task.metric), scored_programs(store)
    writers: dict[str, str] = {}  # identity -> generator
    for sample in samples:
        identity = scored.get(sample.identity or "") if sample.admissible else None
        if identity is not None and program_entry(identity) in scores:
            writers.setdefault(identity, sample.generator)
    best = sorted(writers, key=lambda identity: rank_key(scores[program_entry(identity)], identity))
    top = max(1, round(config.generation.shares.top_percent / 100 * len(best)))
    written = Counter(sample.generator for sample in samples)
    successes = Counter(writers[identity] for identity in best[:top])
    return {
        name: Record(
            samples=written[name],
            successes=successes[name],
            remaining=_remaining(context, samples, name),
        )
        for name in generator_names(config)
    }


def _remaining(context: RunContext, samples: Iterable[JudgedSample], name: str) -> int | None:
    return (
        len(_unused_programs(context, samples, name))
        if name in context.generators.programs
        else None
    )


def _unused_programs(
    context: RunContext, samples: Iterable[JudgedSample], name: str
) -> tuple[str, ...]:
    """Return the programs of a folder that no sample has taken.

    They are compared by their text, since files may have been added to the folder, or renamed.
    """
    taken = Counter(sample.text for sample in samples if sample.generator == name)
    unused = []
    for program in context.generators.programs[name]:
        if taken[program]:
            taken[program] -= 1
        else:
            unused.append(program)
    return tuple(unused)


def _is_local(context: RunContext, name: str) -> bool:
    return name == OWN_GENERATOR or name in context.generators.local


def _request(context: RunContext, name: str, sample: PromptedSample) -> GenerationRequest:
    """Return the request for a sample, in the chat template of a local model."""
    prompt, local = sample.message, context.generators.local.get(name)
    if name == OWN_GENERATOR:
        prompt = sample.prompt
    elif local is not None:
        tokenizer = local.tokenizer
        prompt = tokenizer.as_prompt(sample.message)
        if len(tokenizer.encode_prompt(prompt)) > local.max_prompt_tokens:
            # Earlier programs of another tokenizer's length; the plan has checked the rest.
            prompt = tokenizer.as_prompt(context.renderer.message())
    return GenerationRequest(number=sample.number, prompt=prompt)


def _open(
    context: RunContext,
    store: Store,
    name: str,
    *,
    adapter: Adapter,
    iteration: int,
    temperature: float,
    purpose: str,
) -> Generator:
    """Return a generator of an iteration."""
    sampling = Sampling(temperature=temperature, top_p=context.config.generation.top_p)
    key = context.key(purpose, iteration)
    if name == OWN_GENERATOR:
        return LocalGenerator(
            decoder=context.generator_decoder,
            params=context.seed,
            adapter=adapter,
            sampling=sampling,
            key=key,
        )
    if name in context.generators.local:
        params, own_adapter = context.generator_models[name]
        return LocalGenerator(
            decoder=context.generators.local[name].decoder,
            params=params,
            adapter=own_adapter,
            sampling=sampling,
            key=fold_in_name(key, name),
        )
    if name in context.generators.programs:
        return ProgramFolder(programs=_unused_programs(context, store.judged(), name))
    endpoint = context.config.generators[name].endpoint
    assert endpoint is not None
    if not is_main_process():
        return SharedGenerator(None)
    return SharedGenerator(
        Endpoint(
            name=name,
            config=endpoint,
            key=context.generators.keys[name],
            recording=open_recording(store.folder, name, endpoint),
            temperature=temperature,
            top_p=context.config.generation.top_p,
            rng_seed=context.config.rng_seed,
            iteration=iteration,
        )
    )


def open_recording(folder: Path, name: str, endpoint: EndpointConfig) -> Recording:
    """Return the recording of an endpoint in a run folder, or the one that is replayed."""
    if endpoint.replay is not None:
        return Recording(Path(endpoint.replay), write=False)
    return Recording(folder / ANSWERS_FOLDER / f"{name}.jsonl", write=True)
