"""The loaded parts of a run: models, task, decoders, mergers, merge signature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.core.random_keys import fold_in_name
from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.prompts import PromptedProblem, build_prompts
from sdjax.evaluation.task import Task, read_problems
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import locate, model_folder
from sdjax.io.peft import read_adapter
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.io.training_programs import read_training_identities
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import MergedModel, Merger
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter, init_adapter, shard_adapter
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.models.types import Params
from sdjax.programs.signature import model_signature
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import VerifiedProgram, verify_ir
from sdjax.search.config import ExpertConfig, RunConfig, prompt_template
from sdjax.search.types import DEVELOPMENT, MAIN, TEST, Program
from sdjax.training.warmstart import signature_digest

TRANSFER = "transfer"


def run_key(rng_seed: int, purpose: str, *numbers: int) -> jax.Array:
    """Return the PRNG key of one purpose, independent of all others.

    Args:
        rng_seed: seed of the run.
        purpose: name of the purpose, such as "merge".
        numbers: numbers to fold in, such as the iteration.
    """
    key = fold_in_name(jax.random.key(rng_seed), purpose)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunContext:
    """The loaded parts of a run. Only `verified`, a cache, changes during the run.

    Attributes:
        config: the run's config.
        model: architecture of the seed and the experts.
        tokenizer: the seed's tokenizer.
        mesh: devices of the run; None on a single device.
        seed: parameters of the seed.
        experts: for each setting, the parameters in scope of each expert, in slot order.
        mergers: for each setting, the merger of the seed and the experts.
        task: the task that models are scored on.
        problems: for each split, the problems with their prompts.
        generator_decoder: decoder that samples programs.
        eval_decoder: decoder that solves problems.
        signature: merge signature that programs are verified against.
        prompt: the generator's prompt.
        initial_adapter: adapter of the first generator, if the config specifies one.
        training_identities: first 64 bits of the identities of the programs that the first
            generator was trained on, sorted; None if its folder does not list them.
        verified: verified programs by identity, for programs that this process has verified.
    """

    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh | None
    seed: Params
    experts: Mapping[str, Sequence[Params]]
    mergers: Mapping[str, Merger]
    task: Task
    problems: Mapping[str, Sequence[PromptedProblem]]
    generator_decoder: Decoder
    eval_decoder: Decoder
    signature: MergeSignature
    prompt: str
    initial_adapter: Adapter | None
    training_identities: np.ndarray | None
    verified: dict[str, VerifiedProgram] = dataclasses.field(default_factory=dict)

    def key(self, purpose: str, *numbers: int) -> jax.Array:
        """Return the PRNG key of one purpose; see `run_key`."""
        return run_key(self.config.rng_seed, purpose, *numbers)

    @cached_property
    def compute_seed(self) -> Params:
        """The seed's parameters in the compute dtype of training."""
        dtype = self.generator_decoder.compute_dtype
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self.seed)

    def new_adapter(self) -> Adapter:
        """Return the initial adapter of the first generator."""
        training = self.config.training
        adapter = self.initial_adapter or init_adapter(
            self.model, self.key("adapter"), rank=training.rank, alpha=training.alpha
        )
        return adapter if self.mesh is None else shard_adapter(adapter, self.model, self.mesh)

    def verified_program(self, program: Program) -> VerifiedProgram:
        """Return the verified form of a stored program, verifying it on first use."""
        if program.identity not in self.verified:
            self.verified[program.identity] = verify_ir(program.ir, self.signature)
        return self.verified[program.identity]

    def merge(
        self, algorithm: Algorithm, setting: str = MAIN, *, max_memory: int | None = None
    ) -> MergedModel:
        """Add the algorithm's merged task vector to the seed's tensors in scope.

        Args:
            algorithm: algorithm to merge with.
            setting: name of the setting whose experts are merged.
            max_memory: maximum memory of a compiled merge in bytes.

        Raises:
            MemoryLimitExceeded: a compiled merge requires more than `max_memory` bytes.
        """
        return self.mergers[setting](algorithm, key=self.key("merge"), max_memory=max_memory)

    def with_expert(self, index: int, setting: str = MAIN) -> Params:
        """Return the seed's parameters with the tensors in scope replaced by an expert's."""

        def merge_models(task_vectors: Mapping[str, jax.Array]) -> jax.Array:
            return list(task_vectors.values())[index]

        algorithm = Algorithm.from_function(merge_models, name=f"expert_{index + 1}")
        return self.merge(algorithm, setting).params

    def was_trained_on(self, identity: str) -> bool | None:
        """Return whether the first generator was trained on a program; None if unknown."""
        if self.training_identities is None:
            return None
        return bool(np.isin(np.uint64(int(identity[:16], 16)), self.training_identities))


def build_context(config: RunConfig) -> RunContext:
    """Load everything that the config refers to and check that it is consistent.

    What needs no weights comes first, so that most mistakes are errors at once.

    Raises:
        UserError: a folder is missing, a file is damaged, the tensors of an expert do not match the
            seed's, the generator is for another model or has another rank, or the mesh does not
            match the devices.
    """
    task = _load_task(config)
    mesh = config.mesh.make(default_axis="tensor")
    folder = locate(config.seed)[0]
    model, tokenizer = load_config(config.seed), load_tokenizer(folder)
    problems = {
        split: _load_problems(task, split, config, tokenizer) for split in (DEVELOPMENT, TEST)
    }
    prompt = _generator_prompt(config, tokenizer)
    generator_decoder = _build_decoder(model, tokenizer, config.generation.decoding, mesh)
    eval_decoder = _build_decoder(model, tokenizer, config.evaluation, mesh)
    paths = select_paths(param_specs(model), config.scope)
    seed = load_model(config.seed, mesh=mesh)[1]
    settings = {MAIN: config.experts} | ({TRANSFER: config.transfer} if config.transfer else {})
    experts = {
        setting: [_read_expert(named[slot], model, paths, mesh) for slot in config.slots]
        for setting, named in settings.items()
    }
    # Each program runs only a few times, so compilation time matters more than execution time.
    compile_cache = CompileCache(quick=True)
    mergers = {
        setting: Merger(
            seed,
            trees,
            slots=config.slots,
            scope=paths,
            num_layers=model.num_layers,
            compile_cache=compile_cache,
        )
        for setting, trees in experts.items()
    }
    signature = model_signature(model, config.slots, config.scope, config.sandbox)
    generator = None if config.generator is None else model_folder(config.generator)
    return RunContext(
        config=config,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        seed=seed,
        experts=experts,
        mergers=mergers,
        task=task,
        problems=problems,
        generator_decoder=generator_decoder,
        eval_decoder=eval_decoder,
        signature=signature,
        prompt=prompt,
        initial_adapter=None
        if generator is None
        else _read_generator(config, generator, model, folder),
        training_identities=read_training_identities(
            generator or folder, signature_digest(signature)
        ),
    )


def _generator_prompt(config: RunConfig, tokenizer: Tokenizer) -> str:
    """Return the generator's prompt, which must fit into its decoder."""
    prompt = prompt_template(config).render(
        slots=config.slots,
        descriptions={slot: expert.description for slot, expert in config.experts.items()},
        chat=tokenizer.as_prompt,
    )
    length = len(tokenizer.encode_prompt(prompt))
    largest = config.generation.decoding.buckets[-1]
    if length > largest:
        raise UserError(
            f"generation.decoding.buckets: the prompt {config.generation.prompt!r} has {length} "
            f"tokens, but the largest bucket is {largest}; add a bucket of at least {length}"
        )
    return prompt


def _load_task(config: RunConfig) -> Task:
    return find_task(
        config.task.name,
        data=config.task.data,
        shots=config.task.shots,
        development=config.task.development,
        test=config.task.test,
        allow_missing=config.sandbox.allow_missing,
    )


def _load_problems(
    task: Task, split: str, config: RunConfig, tokenizer: Tokenizer
) -> Sequence[PromptedProblem]:
    """Return the problems of a split with their prompts, which are the same for every model."""
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


def _read_expert(
    expert: ExpertConfig, seed: ModelConfig, paths: Sequence[str], mesh: Mesh | None
) -> Params:
    expert_specs, seed_specs = param_specs(load_config(expert.model)), param_specs(seed)
    for path in paths:
        if path not in expert_specs:
            raise UserError(
                f"{expert.model}: tensor {path} of the seed is missing; experts must be "
                "fine-tunes of the seed"
            )
        if expert_specs[path].shape != seed_specs[path].shape:
            raise UserError(
                f"{expert.model}: tensor {path} has shape {expert_specs[path].shape}, not "
                f"{seed_specs[path].shape} as in the seed; experts must be fine-tunes of the seed"
            )
    return load_model(expert.model, paths=paths, mesh=mesh)[1]


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
    length = config.buckets[-1] + config.max_new_tokens
    if length > model.max_seq_len:
        raise UserError(
            f"decoding: the largest bucket plus max_new_tokens is {length} tokens, but the model's "
            f"maximum sequence length is {model.max_seq_len}; lower one of them"
        )
    return Decoder(model, config, tokenizer=tokenizer, mesh=mesh)
