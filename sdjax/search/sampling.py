"""Samples of a generator outside the loop, the same as those of a run: `sdjax generate`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.decoding.config import DecoderConfig, check_length, fit_slots
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.sampling import Sampling
from sdjax.generators.local import LocalGenerator
from sdjax.generators.types import GeneratedText, GenerationRequest
from sdjax.io.hf_checkpoint import load_generator, load_model
from sdjax.io.model_paths import locate, model_folder
from sdjax.io.peft import read_adapter
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter, init_adapter, shard_adapter
from sdjax.models.types import Params
from sdjax.programs.prompts import find_prompt
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import DuplicateIndex, Verdict
from sdjax.search.base_identity import generator_base
from sdjax.search.chain_model import chain_model, programs_of_chain
from sdjax.search.config import RunConfig
from sdjax.search.context import run_key
from sdjax.search.limits import limits_of_run
from sdjax.search.memory.prompts import iteration_prompts
from sdjax.search.plan import prompt_renderer
from sdjax.search.score_types import Promotion
from sdjax.search.store import Store
from sdjax.search.types import SEARCH, Checkpoint, Entry
from sdjax.sharding.config import MeshConfig

T = TypeVar("T")

ADAPTERS_FOLDER = "adapters"
# Description of an expert that no run describes.
DEFAULT_DESCRIPTION = "a fine-tune of the seed"
MAX_NEW_TOKENS = 512
_BUCKET_MULTIPLE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Settings of `sdjax generate`; None means that of the run, or the default without a run.

    Attributes:
        prompt: name of a shipped prompt, or path of a file.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus sampling threshold.
        max_new_tokens: maximum number of tokens per sample; by default without a run, 512 or as
            many as fit into the context of the model.
        rng_seed: seed of the run whose samples are drawn.
        iteration: iteration whose samples are drawn.
        slots: number of samples decoded at the same time.
        mesh: devices to decode on.
        allow_missing: layers of confinement that this machine may lack, if a run's generator is a
            merged model.
        trust_limits: use limits of the run that are above the defaults for that.
    """

    prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    rng_seed: int | None = None
    iteration: int | None = None
    slots: int | None = None
    mesh: MeshConfig | None = None
    allow_missing: tuple[str, ...] = ()
    trust_limits: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptedGenerator:
    """A loaded generator with everything that determines its samples.

    Attributes:
        generator: the model with its sampling parameters and its random key.
        prompts: the rendered prompt of each sample.
    """

    generator: LocalGenerator
    prompts: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedSample(GeneratedText):
    """One sample.

    Attributes:
        number: index of the sample.
        verdict: the sandbox's verdict on the program; None if there is no program or no sandbox.
    """

    number: int
    verdict: Verdict | None


def generator_of_model(
    model: str, options: SamplingOptions, *, slots: Sequence[str], count: int
) -> PromptedGenerator:
    """Load a model as a generator.

    Args:
        model: a name as in `sdjax.load_model`; the adapter of MODEL+ADAPTER is kept separate.
        options: settings.
        slots: names of the experts, for the prompt.
        count: number of samples.

    Raises:
        UserError: the model or the prompt does not exist or is invalid, or the prompt with
            its new tokens is too long.
    """
    sampling = Sampling(temperature=_or(options.temperature, 1.0), top_p=_or(options.top_p, 1.0))
    template = find_prompt("full" if options.prompt is None else options.prompt)
    mesh = _mesh(options.mesh or MeshConfig())
    config, params, adapter = load_generator(model, mesh=mesh)
    tokenizer = load_tokenizer(locate(model)[0])
    descriptions = dict.fromkeys(slots, DEFAULT_DESCRIPTION)
    prompt = template.render(slots=slots, descriptions=descriptions, chat=tokenizer.as_prompt)
    sizes = _fit_sizes(config, tokenizer, prompt, options, count)
    generator = LocalGenerator(
        decoder=Decoder(config, sizes, tokenizer=tokenizer, mesh=mesh),
        params=params,
        adapter=adapter,
        sampling=sampling,
        key=run_key(_or(options.rng_seed, 0), SEARCH, _or(options.iteration, 1)),
    )
    return PromptedGenerator(generator=generator, prompts=(prompt,) * count)


def generator_of_run(
    folder: Path, options: SamplingOptions, *, count: int, model: str | None = None
) -> PromptedGenerator:
    """Load the generator of a run's iteration, whose samples equal those of the run.

    The iteration is by default that of the newest generator. With memory, its prompts show what
    the iterations before it have found.

    Args:
        folder: the run folder.
        options: settings in place of those of the run.
        count: number of samples.
        model: another generator, as in `generator_of_model`.

    Raises:
        UserError: the run, one of its models or its prompt does not exist, or the prompt with its
            new tokens is too long.
    """
    with Store.open(folder) as store:
        config = store.config()
        trained = {checkpoint.iteration for checkpoint in store.select(Checkpoint)}
    iteration = _or(options.iteration, max(trained, default=0) + 1)
    mesh = _mesh(options.mesh or config.mesh)
    name = model or config.seed
    adapter: Adapter | None
    if model is None:
        model_config, params = load_model(config.seed, mesh=mesh)
        adapter = _run_adapter(config, folder, trained, iteration, model_config, mesh)
        params = _run_model(config, folder, iteration, model_config, params, options, mesh)
    else:
        model_config, params, adapter = load_generator(model, mesh=mesh)
    tokenizer = load_tokenizer(locate(name)[0])
    generation = config.generation
    sizes = generation.decoding
    if options.max_new_tokens is not None:
        sizes = dataclasses.replace(sizes, max_new_tokens=options.max_new_tokens)
    if options.slots is not None:
        prefill_batch = min(sizes.prefill_batch, options.slots)
        sizes = dataclasses.replace(sizes, slots=options.slots, prefill_batch=prefill_batch)
    renderer = prompt_renderer(config, tokenizer, sizes)
    if options.prompt is not None:
        renderer = renderer.with_template(
            find_prompt(options.prompt), model_config.max_seq_len - sizes.max_new_tokens
        )
    with Store.open(folder) as store:
        prompts = iteration_prompts(
            renderer, store, purpose=SEARCH, iteration=iteration, numbers=range(count)
        )
    length = max(len(tokenizer.encode_prompt(one)) for one in {one.prompt for one in prompts})
    check_length(model_config, length, sizes.max_new_tokens)
    if options.prompt is not None and length > sizes.buckets[-1]:
        sizes = dataclasses.replace(sizes, buckets=(*sizes.buckets, _bucket(length)))
    generator = LocalGenerator(
        decoder=Decoder(model_config, sizes, tokenizer=tokenizer, mesh=mesh),
        params=params,
        adapter=adapter,
        sampling=Sampling(
            temperature=_or(options.temperature, generation.temperature_at(iteration)),
            top_p=_or(options.top_p, generation.top_p),
        ),
        key=run_key(_or(options.rng_seed, config.rng_seed), SEARCH, iteration),
    )
    return PromptedGenerator(generator=generator, prompts=tuple(one.prompt for one in prompts))


def _run_model(
    config: RunConfig,
    folder: Path,
    iteration: int,
    model: ModelConfig,
    seed: Params,
    options: SamplingOptions,
    mesh: Mesh | None,
) -> Params:
    """Return the model of an iteration's generator: the seed, or a merged model of the run."""
    with Store.open(folder) as store:
        base = generator_base(store.select(Promotion), iteration)
        if base is None:
            return seed
        (entry,) = store.select(Entry, name=base)
        programs = programs_of_chain(store, entry)
    limits = limits_of_run(config, folder, trusted=options.trust_limits)
    limits = dataclasses.replace(limits, allow_missing=options.allow_missing)
    return chain_model(config, programs, model=model, seed=seed, limits=limits, mesh=mesh)


def sample_programs(
    generator: PromptedGenerator,
    *,
    sandbox: Sandbox | None = None,
    on_sample: Callable[[GeneratedSample], None],
) -> None:
    """Sample texts and judge the program of each.

    Args:
        generator: the generator.
        sandbox: an entered sandbox that judges the programs; None judges nothing.
        on_sample: called with each sample in the order of their numbers, as soon as it and all
            samples before it are finished. A repeated program is a duplicate of the first, as in a
            run.

    Raises:
        UserError: the prompt is too long for the decoder.
    """
    waiting: dict[int, GeneratedText] = {}
    seen, reported = DuplicateIndex(), 0

    def report(number: int, text: GeneratedText) -> None:
        nonlocal reported
        waiting[number] = text
        while reported in waiting:
            finished = waiting.pop(reported)
            verdict = None
            if sandbox is not None and finished.source is not None:
                verdict = sandbox.judge(finished.source, seen, name=f"sample {reported}")
            on_sample(GeneratedSample(**vars(finished), number=reported, verdict=verdict))
            reported += 1

    requests = [
        GenerationRequest(number=number, prompt=prompt)
        for number, prompt in enumerate(generator.prompts)
    ]
    generator.generator.sample(requests, on_text=report)


def adapter_folder(folder: Path, iteration: int) -> Path:
    """Return the folder of the PEFT adapter that was trained in an iteration of a run."""
    return folder / ADAPTERS_FOLDER / f"iteration-{iteration}"


def _run_adapter(
    config: RunConfig,
    folder: Path,
    trained: set[int],
    iteration: int,
    model: ModelConfig,
    mesh: Mesh | None,
) -> Adapter:
    """Return the adapter that the iteration of a run samples from, newest before it."""
    parent = max((number for number in trained if number < iteration), default=None)
    if iteration > max(trained, default=0) + 1 and config.training.enabled:
        raise UserError(
            f"{folder}: iteration {iteration} has no generator yet: the run has trained "
            f"{len(trained)}; lower --iteration, or train one after the last iteration: "
            f"sdjax run --resume {shlex.quote(str(folder))} --set training.after_last=true"
        )
    path = None
    if parent is not None:
        path = adapter_folder(folder, parent)  # for the model of its iteration
        if not path.is_dir():
            command = f"sdjax run --resume {shlex.quote(str(folder))}"
            raise UserError(
                f"{path}: not found; `{command}` writes it again if its checkpoint exists"
            )
    elif config.generator is not None:
        path = model_folder(config.generator)
    if path is None:
        key = run_key(config.rng_seed, "adapter")
        training = config.training
        adapter = init_adapter(model, key, rank=training.rank, alpha=training.alpha)
    else:
        is_base = parent is not None
        adapter = read_adapter(path, model, model=locate(config.seed)[0], is_base=is_base)
    return adapter if mesh is None else shard_adapter(adapter, model, mesh)


def _fit_sizes(
    config: ModelConfig, tokenizer: Tokenizer, prompt: str, options: SamplingOptions, count: int
) -> DecoderConfig:
    length = len(tokenizer.encode_prompt(prompt))
    if length >= config.max_seq_len:
        raise UserError(
            f"the prompt has {length} tokens, but the model's maximum sequence length is "
            f"{config.max_seq_len}; use a shorter prompt, such as `short`"
        )
    bucket = min(_bucket(length), config.max_seq_len)
    new_tokens = _or(options.max_new_tokens, min(MAX_NEW_TOKENS, config.max_seq_len - length))
    check_length(config, length, new_tokens)
    slots = options.slots
    if slots is None:
        slots = fit_slots(config, bucket + new_tokens, count)
    return DecoderConfig(slots=slots, prefill_batch=1, buckets=(bucket,), max_new_tokens=new_tokens)


def _bucket(length: int) -> int:
    return -(-length // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE


def _mesh(config: MeshConfig) -> Mesh | None:
    return config.make(default_axis="tensor")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
