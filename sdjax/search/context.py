"""All that a run works with, loaded once: models, task, decoders, merger, sandbox contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.prompts import PromptedProblem, build_prompts
from sdjax.evaluation.task import Task, problems_of
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.hf_checkpoint import read_config as read_model_config
from sdjax.io.model_paths import model_folder
from sdjax.io.peft import read_adapter
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.io.training_programs import read_training_identities
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import MergedModel, Merger
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter, init_adapter, shard_adapter
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tree import flatten
from sdjax.programs.prompts import render
from sdjax.sandbox.signature import MergeSignature
from sdjax.search.config import DecodingConfig, ExpertConfig, RunConfig
from sdjax.search.types import DEVELOPMENT, MAIN, TEST
from sdjax.training.warmstart import name_of

TRANSFER = "transfer"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunContext:
    """The loaded parts of a run; nothing here changes while it runs.

    Attributes:
        seed: nested dict of the seed's arrays.
        experts: by setting, the trees of the experts in slot order, tensors in scope alone.
        mergers: by setting.
        warm: the adapter that the first generator begins with, where the configuration has one.
        training_identities: of the programs that the first generator was trained on, as the first
            64 bits of each identity, sorted; None where its folder does not tell.
    """

    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh | None
    seed: dict
    experts: Mapping[str, Sequence[dict]]
    mergers: Mapping[str, Merger]
    task: Task
    problems: Mapping[str, Sequence[PromptedProblem]]
    generator_decoder: Decoder
    eval_decoder: Decoder
    signature: MergeSignature
    prompt: str
    initial_adapter: Adapter | None
    training_identities: np.ndarray | None

    @cached_property
    def key(self) -> jax.Array:
        return jax.random.key(self.config.random)

    def fold(self, purpose: str, *numbers: int) -> jax.Array:
        """The random key of one use, whatever else was drawn before it."""
        key = jax.random.fold_in(self.key, int.from_bytes(purpose.encode()[:4].ljust(4), "big"))
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    @cached_property
    def compute_seed(self) -> dict:
        """The seed in the dtype that training computes in."""
        return jax.tree.map(
            lambda leaf: leaf.astype(self.generator_decoder.compute_dtype), self.seed
        )

    def fresh_adapter(self) -> Adapter:
        """The adapter of the first generator."""
        training = self.config.training
        adapter = self.initial_adapter or init_adapter(
            self.model, self.fold("adapter"), rank=training.rank, alpha=training.alpha
        )
        return adapter if self.mesh is None else shard_adapter(adapter, self.model, self.mesh)

    def merge(
        self, algorithm: Algorithm, setting: str = MAIN, *, max_memory: int | None = None
    ) -> MergedModel:
        """The seed with the algorithm's merged task vector added to the tensors in scope.

        Raises MemoryLimitExceeded where a compiled program takes more than ``max_memory`` bytes.
        """
        merger = self.mergers[setting]
        return merger(algorithm, key=self.fold("merge"), max_memory=max_memory)

    def with_expert(self, index: int, setting: str = MAIN) -> dict:
        """The seed with the tensors in scope of one expert."""

        def take(task_vectors):
            return list(task_vectors.values())[index]

        return self.merge(Algorithm.from_function(take, name=f"expert_{index + 1}"), setting).params

    def was_trained_on(self, identity: str) -> bool | None:
        """Whether the first generator was trained on this program; None where nobody knows."""
        if self.training_identities is None:
            return None
        return bool(np.isin(np.uint64(int(identity[:16], 16)), self.training_identities))


def build_context(config: RunConfig) -> RunContext:
    """Loads everything that the configuration names, and checks that it fits together.

    Raises:
        UserError: a missing folder, a damaged file, an expert whose tensors do not match the
            seed's, a generator for another model or of another rank, a mesh that the devices do
            not make up.
    """
    task = _task(config)
    mesh = config.mesh.make(default_axis="tensor")
    folder = model_folder(config.seed)
    model, seed = load_model(folder, mesh=mesh)
    tokenizer = load_tokenizer(folder)
    specs = param_specs(model)
    paths = select_paths(specs, config.scope)
    settings = {MAIN: config.experts} | ({TRANSFER: config.transfer} if config.transfer else {})
    experts = {
        setting: [_read_expert(named[slot], model, paths, mesh) for slot in config.slots]
        for setting, named in settings.items()
    }
    # Throw-away programs run a few times each: compiling them fast matters more than running.
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
    shapes = {path: (kind_of(path), specs[path].shape) for path in paths}
    signature = MergeSignature.of(config.slots, shapes, config.sandbox)
    descriptions = {slot: expert.description for slot, expert in config.experts.items()}
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
        problems={
            split: _problems(task, split, config, tokenizer) for split in (DEVELOPMENT, TEST)
        },
        generator_decoder=_decoder(model, tokenizer, config.generation.decoding, mesh),
        eval_decoder=_decoder(model, tokenizer, config.evaluation, mesh),
        signature=signature,
        prompt=_prompt(config, descriptions, tokenizer),
        initial_adapter=None
        if generator is None
        else _read_generator(config, generator, model, folder),
        training_identities=read_training_identities(generator or folder, name_of(signature)),
    )


def _prompt(config: RunConfig, descriptions: Mapping[str, str], tokenizer: Tokenizer) -> str:
    """What the generator is asked, which has to fit its decoder before anything is computed."""
    wanted = config.generation
    prompt = render(
        wanted.prompt,
        slots=config.slots,
        descriptions=descriptions,
        chat=tokenizer.as_prompt,
    )
    length, longest = len(tokenizer.encode_prompt(prompt)), wanted.decoding.buckets[-1]
    if length > longest:
        raise UserError(
            f"generation.decoding.buckets: the prompt {wanted.prompt!r} has {length} tokens, more "
            f"than the largest bucket ({longest}); add one of {length} or more"
        )
    return prompt


def _task(config: RunConfig) -> Task:
    wanted = config.task
    return find_task(
        wanted.name,
        data=wanted.data,
        shots=wanted.shots,
        development=wanted.development,
        test=wanted.test,
        allow_missing=config.sandbox.allow_missing,
    )


def _problems(
    task: Task, split: str, config: RunConfig, tokenizer: Tokenizer
) -> Sequence[PromptedProblem]:
    """The problems of a split as they are put to every model of the run."""
    problems = build_prompts(
        task, problems_of(task, split), tokenizer, chat=config.task.prompt == "chat"
    )
    if not problems:
        raise UserError(f"task {task.name}: has no {split} problem; see task.development and .test")
    longest = config.evaluation.buckets[-1]
    if all(len(one.tokens) > longest for one in problems):
        raise UserError(
            f"task {task.name}: every {split} prompt is longer than the largest of "
            f"evaluation.buckets ({longest}); add a larger one"
        )
    return problems


def _read_expert(
    expert: ExpertConfig, seed: ModelConfig, paths: Sequence[str], mesh: Mesh | None
) -> dict:
    folder = model_folder(expert.model)
    found = read_model_config(folder)
    theirs, ours = param_specs(found), param_specs(seed)
    for path in paths:
        if path not in theirs:
            raise UserError(
                f"{folder}: has no tensor {path}, which the seed has; use its fine-tunes"
            )
        if theirs[path].shape != ours[path].shape:
            raise UserError(
                f"{folder}: tensor {path} has shape {theirs[path].shape}, the seed's is "
                f"{ours[path].shape}; experts must be fine-tunes of the seed"
            )
    return load_model(folder, paths=paths, mesh=mesh)[1]


def _read_generator(config: RunConfig, folder: Path, model: ModelConfig, seed: Path) -> Adapter:
    adapter, training = read_adapter(folder, model, model=seed), config.training
    (rank, *others) = {
        leaf.shape[0] for path, leaf in flatten(adapter.factors).items() if path.endswith("/a")
    }
    if others or (rank, adapter.scale * rank) != (training.rank, training.alpha):
        raise UserError(
            f"{folder}: its rank is {rank} and its alpha {adapter.scale * rank:g}, training.rank "
            f"is {training.rank} and training.alpha {training.alpha:g}; make them equal"
        )
    return adapter


def _decoder(
    model: ModelConfig, tokenizer: Tokenizer, sizes: DecodingConfig, mesh: Mesh | None
) -> Decoder:
    settings = DecoderConfig(
        slots=sizes.slots,
        prefill_batch=sizes.rows,
        buckets=sizes.buckets,
        max_new_tokens=sizes.max_new_tokens,
    )
    longest = settings.buckets[-1] + settings.max_new_tokens
    if longest > model.max_seq_len:
        raise UserError(
            f"decoding: the largest bucket and max_new_tokens make {longest} tokens, more than "
            f"the model's context of {model.max_seq_len}; lower one of them"
        )
    # On the CPU bfloat16 is slower than float32; accelerators compute in what is stored.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return Decoder(model, settings, stop_token_ids=tokenizer.eos_ids, compute_dtype=dtype, mesh=mesh)

