"""The plan of a run: everything that its config refers to, checked and loaded, but no weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sdjax.core.config import errors_at
from sdjax.core.errors import UserError
from sdjax.decoding.config import DecoderConfig, check_length
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.prompts import PromptedProblem, build_prompts
from sdjax.evaluation.task import Task, read_problems
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hf_checkpoint import ModelReader, load_config
from sdjax.io.model_paths import locate, model_folder
from sdjax.io.peft import read_adapter
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.io.training_programs import read_training_identities
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter, init_adapter
from sdjax.models.params import ParamSpec, param_specs
from sdjax.models.tree import flatten
from sdjax.programs.prompts import PromptTemplate
from sdjax.programs.signature import model_signature
from sdjax.sandbox.signature import MergeSignature
from sdjax.search.config import ExpertConfig, RunConfig, prompt_template
from sdjax.search.generator_plan import GeneratorsPlan, plan_generators
from sdjax.search.grids import check_methods
from sdjax.search.memory.renderer import PromptRenderer, longest_prompt
from sdjax.search.memory_config import MemoryConfig
from sdjax.search.types import CONFIRMATION, DEVELOPMENT, MAIN, TEST, TRANSFER
from sdjax.training.warmstart import signature_digest
from sdjax.tuning.candidates import split_development


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoringPlan:
    """Everything except weights that is needed to apply algorithms to models and score the results.

    Attributes:
        config: the run's config.
        model: architecture of the seed and the experts.
        tokenizer: the seed's tokenizer.
        mesh: devices of the run; None on a single device.
        paths: paths of the tensors in scope.
        task: the task that models are scored on.
        problems: for each split, the problems with their prompts. Those of the splits
            "development" and "confirmation" are disjoint parts of the task's development problems.
        eval_decoder: decoder that solves problems.
        signature: merge signature that programs are verified against.
    """

    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh | None
    paths: tuple[str, ...]
    task: Task
    problems: Mapping[str, Sequence[PromptedProblem]]
    eval_decoder: Decoder
    signature: MergeSignature

    @property
    def settings(self) -> dict[str, Mapping[str, ExpertConfig]]:
        """The experts of each setting: those of the search, and those of the transfer if any."""
        experts: dict[str, Mapping[str, ExpertConfig]] = {MAIN: self.config.experts}
        return experts | ({TRANSFER: self.config.transfer} if self.config.transfer else {})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan(ScoringPlan):
    """The parts of a run that need no weights.

    Attributes:
        generator_decoder: decoder that samples programs.
        generators: the generators in addition to the seed with its adapter.
        renderer: the generator's prompt, before rendering.
        prompt: the generator's prompt without earlier programs.
        initial_adapter: adapter of the first generator, if the config specifies one.
        training_identities: first 64 bits of the identities of the programs that the first
            generator was trained on, sorted; None if its folder does not list them.
    """

    generator_decoder: Decoder
    generators: GeneratorsPlan
    renderer: PromptRenderer
    prompt: str
    initial_adapter: Adapter | None
    training_identities: np.ndarray | None


def plan_run(config: RunConfig, *, trust_code: bool = False) -> RunPlan:
    """Check everything that a config refers to, without loading weights or computing.

    Args:
        config: config of the run.
        trust_code: whether the config may name a class as its task, whose code runs unconfined in
            this process.

    Raises:
        UserError: see `plan_scoring`; a generator for another model or of another rank, a rank
            above that of every projection, or an unusable prompt. The message starts with the place
            of the config's key.
    """
    plan = plan_scoring(config, trust_code=trust_code)
    model, folder = plan.model, locate(config.seed)[0]
    with errors_at(config, "generator"):
        generator = None if config.generator is None else model_folder(config.generator)
        initial_adapter = (
            None if generator is None else _read_generator(config, generator, model, folder)
        )
    if initial_adapter is None:
        training = config.training
        with errors_at(config, "training.rank"):
            jax.eval_shape(
                lambda key: (
                    init_adapter(model, key, rank=training.rank, alpha=training.alpha).factors
                ),
                jax.eval_shape(jax.random.key, 0),
            )
    decoding = config.generation.decoding
    with errors_at(config, "generation.decoding"):
        generator_decoder = _build_decoder(model, plan.tokenizer, decoding, plan.mesh)
    renderer = prompt_renderer(config, plan.tokenizer, decoding)
    check_prompt(renderer, model.max_seq_len)
    return RunPlan(
        **vars(plan),
        generator_decoder=generator_decoder,
        generators=plan_generators(config, renderer, plan.mesh),
        renderer=renderer,
        prompt=plan.tokenizer.as_prompt(renderer.message()),
        initial_adapter=initial_adapter,
        training_identities=read_training_identities(
            generator or folder, signature_digest(plan.signature)
        ),
    )


def _check_rank(model: ModelConfig, rank: int) -> None:
    """Raise UserError if no projection of the model has this rank."""
    key = jax.eval_shape(jax.random.key, 0)
    jax.eval_shape(lambda key: init_adapter(model, key, rank=rank, alpha=1.0).factors, key)


def plan_scoring(config: RunConfig, *, trust_code: bool = False) -> ScoringPlan:
    """Check what a config refers to, except for its generator.

    Args:
        config: config of the run.
        trust_code: as in `plan_run`.

    Raises:
        UserError: an unknown method or hyperparameter, a missing model, a damaged file, tensors of
            an expert that do not match the seed's, unusable problems, or a mesh that does not match
            the devices. The message starts with the place of the config's key.
    """
    check_methods(config)
    task = load_task(config, trust_code=trust_code)
    with errors_at(config, "mesh"):
        mesh = config.mesh.make(default_axis="tensor")
    with errors_at(config, "seed"):
        folder = locate(config.seed)[0]
        model = load_config(folder)
        tokenizer = load_tokenizer(folder)
    specs = param_specs(model)
    with errors_at(config, "scope"):
        paths = select_paths(specs, config.scope)
    _check_models(config, specs, paths)
    with errors_at(config, "evaluation"):
        eval_decoder = _build_decoder(model, tokenizer, config.evaluation, mesh)
    return ScoringPlan(
        config=config,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        paths=tuple(paths),
        task=task,
        problems=_load_splits(task, config, tokenizer),
        eval_decoder=eval_decoder,
        signature=model_signature(model, config.slots, config.scope, config.sandbox),
    )


def _check_models(
    config: RunConfig, seed_specs: Mapping[str, ParamSpec], paths: Sequence[str]
) -> None:
    """Check the headers of all files of weights before any of them is read."""
    with errors_at(config, "seed"):
        _open_model(config.seed).check_shapes()
    sections = {"experts": config.experts, "transfer": config.transfer}
    for section, experts in sections.items():
        for slot, expert in experts.items():
            with errors_at(config, f"{section}.{slot}.model"):
                reader = _open_model(expert.model)
                _check_expert(expert.model, reader.specs, seed_specs, paths)
                reader.check_shapes(paths)


def _open_model(name: str) -> ModelReader:
    folder, adapter = locate(name)
    return ModelReader(folder, adapter=adapter)


def _check_expert(
    name: str,
    specs: Mapping[str, ParamSpec],
    seed_specs: Mapping[str, ParamSpec],
    paths: Sequence[str],
) -> None:
    for path in paths:
        if path not in specs:
            raise UserError(
                f"{name}: tensor {path} of the seed is missing; experts must be fine-tunes of the "
                "seed"
            )
        if specs[path].shape != seed_specs[path].shape:
            raise UserError(
                f"{name}: tensor {path} has shape {specs[path].shape}, not "
                f"{seed_specs[path].shape} as in the seed; experts must be fine-tunes of the seed"
            )


def prompt_renderer(
    config: RunConfig, tokenizer: Tokenizer, decoding: DecoderConfig
) -> PromptRenderer:
    """Return the prompt of a run, before rendering.

    Args:
        config: config of the run.
        tokenizer: the generator's tokenizer.
        decoding: config of the generator's decoder.

    Raises:
        UserError: the prompt does not exist or is invalid, or it does not show what the config
            wants it to show.
    """
    template = prompt_template(config)
    _check_shown(config, template)
    return PromptRenderer(
        config=config,
        template=template,
        tokenizer=tokenizer,
        max_tokens=(
            len(decoding.prefix) + decoding.buckets[-1]
            if config.generation.seed_generator
            else sys.maxsize
        ),
    )


def _check_shown(config: RunConfig, template: PromptTemplate) -> None:
    """Check that a prompt reads all that `generation.memory` sets."""
    memory, prompt = config.generation.memory, f"the prompt {config.generation.prompt!r}"
    if memory is None:
        return
    if "programs" not in template.variables:
        with errors_at(config, "generation.memory"):
            raise UserError(
                f"{prompt} has no place for earlier programs; set generation.prompt to "
                "short-memory, full-memory or a file that ends in .jinja and shows `programs`, or "
                "set generation.memory to null"
            )
    if memory.refused and "refused" not in template.variables:
        with errors_at(config, "generation.memory.refused"):
            raise UserError(
                f"{prompt} has no place for refused programs; show `refused` in it, or set "
                "generation.memory.refused to 0"
            )
    if memory.operations != MemoryConfig().operations and "operation" not in template.variables:
        with errors_at(config, "generation.memory.operations"):
            raise UserError(
                f"{prompt} asks for no operation; show `operation` in it, or leave "
                "generation.memory.operations as it is by default"
            )


def check_prompt(renderer: PromptRenderer, max_seq_len: int) -> None:
    """Check that a prompt, with the longest programs, fits into the decoder and the context.

    Args:
        renderer: the prompt of the run.
        max_seq_len: maximum sequence length of the model.

    Raises:
        UserError: the prompt is too long; the message names the key to change.
    """
    config, largest = renderer.config, renderer.max_tokens
    generation = config.generation
    length = renderer.length(renderer.message())
    with errors_at(config, "generation.decoding.buckets"):
        if length > largest:
            raise UserError(
                f"the prompt {generation.prompt!r} has {length} tokens, but the largest bucket is "
                f"{largest}; add a bucket of at least {length}"
            )
    new_tokens = generation.decoding.max_new_tokens
    with errors_at(config, "generation.prompt"):
        longest = longest_prompt(renderer, new_tokens)
    if generation.memory is None or longest <= largest:
        return
    prompt = f"the prompt {generation.prompt!r} may have {longest} tokens with memory"
    shorter = "lower generation.memory.programs or generation.decoding.max_new_tokens"
    if generation.memory.refused:
        shorter += ", or set generation.memory.refused to 0"
    if longest + new_tokens > max_seq_len:
        with errors_at(config, "generation.memory.programs"):
            raise UserError(
                f"{prompt}, which with {new_tokens} new ones exceeds the model's maximum sequence "
                f"length of {max_seq_len}; {shorter}"
            )
    with errors_at(config, "generation.decoding.buckets"):
        raise UserError(
            f"{prompt}, but the largest bucket is {largest}; add a bucket of at least {longest}, "
            f"or {shorter}"
        )


def load_task(config: RunConfig, *, trust_code: bool) -> Task:
    """Return the task of a run."""
    with errors_at(config, "task.name"):
        return find_task(
            config.task.name,
            data=config.task.data,
            shots=config.task.shots,
            development=config.task.development,
            test=config.task.test,
            trust_code=trust_code,
            allow_missing=config.sandbox.allow_missing,
        )


def _load_splits(
    task: Task, config: RunConfig, tokenizer: Tokenizer
) -> dict[str, Sequence[PromptedProblem]]:
    """Return the problems of each split; without confirmation problems there is no such split."""
    splits = {
        split: _load_problems(task, split, config, tokenizer) for split in (DEVELOPMENT, TEST)
    }
    development = splits[DEVELOPMENT]
    count = config.task.confirmation
    if count == 0 or (count is None and len(development) < 2):
        return splits
    with errors_at(config, "task.confirmation"):
        search, _ = split_development([item.problem for item in development], count)
    seen = set(map(id, search))
    return splits | {
        DEVELOPMENT: [item for item in development if id(item.problem) in seen],
        CONFIRMATION: [item for item in development if id(item.problem) not in seen],
    }


def _load_problems(
    task: Task, split: str, config: RunConfig, tokenizer: Tokenizer
) -> Sequence[PromptedProblem]:
    """Return the problems of a split with their prompts, which are the same for every model."""
    with errors_at(config, "task"):
        problems = build_prompts(
            task, read_problems(task, split), tokenizer, chat=config.task.prompt == "chat"
        )
        if not problems:
            raise UserError(
                f"task {task.name}: no {split} problems; check task.development and task.test"
            )
        largest = config.evaluation.buckets[-1]
        if all(len(problem.tokens) > largest for problem in problems):
            raise UserError(
                f"task {task.name}: every {split} prompt exceeds the largest bucket in "
                f"evaluation.buckets, {largest}; add a larger bucket"
            )
    return problems


def _read_generator(config: RunConfig, folder: Path, model: ModelConfig, seed: Path) -> Adapter:
    adapter, training = read_adapter(folder, model, model=seed), config.training
    ranks = {leaf.shape[0] for path, leaf in flatten(adapter.factors).items() if path[-2:] == "/a"}
    rank = min(ranks)
    alpha = adapter.scale * rank
    if len(ranks) > 1 or (rank, alpha) != (training.rank, training.alpha):
        raise UserError(
            f"{folder}: has rank {rank} and alpha {alpha:g}, but training.rank is {training.rank} "
            f"and training.alpha is {training.alpha:g}; make them equal"
        )
    return adapter


def _build_decoder(
    model: ModelConfig, tokenizer: Tokenizer, config: DecoderConfig, mesh: Mesh | None
) -> Decoder:
    check_length(model, config.buckets[-1], config.max_new_tokens)
    return Decoder(model, config, tokenizer=tokenizer, mesh=mesh)
