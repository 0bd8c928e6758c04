"""Setup of a search before weights are loaded: models, problems, and the tunable merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sdjax.core.errors import UserError
from sdjax.decoding.config import fit_decoder_config
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.api import files_fingerprint, limit_answers, select_problems
from sdjax.evaluation.prompts import PromptedProblem, build_prompts
from sdjax.evaluation.task import Task, call_checked, read_problems, read_training
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger, default_slots
from sdjax.merging.recipe.from_algorithm import MergeModels, open_models
from sdjax.merging.recipe.plan import is_floating
from sdjax.merging.recipe.recipe_reader import parse_recipe
from sdjax.merging.recipe.schema import Recipe
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.merging.scope import Scope
from sdjax.models.config import ModelConfig
from sdjax.models.fingerprint import text_fingerprint
from sdjax.models.params import param_specs
from sdjax.models.tensor_names import parse_name
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.programs.program_file import read_program
from sdjax.programs.signature import merge_signature, merge_trial
from sdjax.sandbox.sandbox import Sandbox
from sdjax.training.packing import Example
from sdjax.tuning.candidates import CandidateScorer, split_development
from sdjax.tuning.effect import without_idle_numbers
from sdjax.tuning.loss import training_examples
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.open_tunable import open_tunable, read_named_merge
from sdjax.tuning.programs import program_tunable
from sdjax.tuning.search import override_parameters
from sdjax.tuning.types import Tunable

DEFAULT_TASK = "arithmetic"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TuningWeights:
    """The loaded weights of a search.

    Attributes:
        base: parameters of the base, or of the first expert if there is no base. Parameters outside
            the scope have the compute dtype.
        merger: merger of the base and the experts.
        tunable: what is tuned, without numbers that have no effect on these weights.
        notes: remarks about such numbers.
        scorer: decodes the answers of a candidate.
    """

    base: Params
    merger: Merger
    tunable: Tunable
    notes: tuple[str, ...]
    scorer: CandidateScorer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TuningSetup:
    """A search whose weights are not loaded yet.

    Attributes:
        tunable: what is tuned.
        model_set: names of the models and of their tensors.
        sources: the models' files.
        config: architecture of the base.
        tokenizer: the base's tokenizer.
        task: the task.
        development: problems that choose between candidates.
        confirmation: problems that confirm the gain.
        training: training problems as tokens; empty if the task has none, or for CMA-ES alone.
        decoder: decoder for all these problems.
        mesh: devices that the models are sharded over.
        notes: remarks about the problems.
        recipe: file of the recipe or configuration that names the models, if one does.
        merged_dtypes: path to the dtype of the merged tensor, where it is not the base's.
    """

    tunable: Tunable
    model_set: ModelSet
    sources: MergeModels
    config: ModelConfig
    tokenizer: Tokenizer
    task: Task
    development: list[PromptedProblem]
    confirmation: list[PromptedProblem]
    training: list[Example]
    decoder: Decoder
    mesh: Mesh | None
    notes: tuple[str, ...]
    recipe: Path | None = None
    merged_dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the events of a search depend on, JSON-compatible."""
        models = {"base": self.sources.base, **self.sources.experts}
        prompts = [[item.sha256 for item in half] for half in (self.development, self.confirmation)]
        parameters = [tuple(vars(parameter).values()) for parameter in self.tunable.parameters]
        return {
            "tuned": self.tunable.name,
            "program": text_fingerprint(self.tunable.write(self.tunable.start)),
            "numbers": text_fingerprint(parameters),
            "models": {name: str(model.folder.resolve()) for name, model in models.items()},
            "weights": {
                name: files_fingerprint(*model.reader.folders)[:16]
                for name, model in models.items()
            },
            "scope": self.model_set.scope,
            "task": self.task.name,
            "problems": text_fingerprint(prompts),
            "training": text_fingerprint(self.training),
            "max_new_tokens": self.decoder.config.max_new_tokens,
            "dtype": jnp.dtype(self.decoder.compute_dtype).name,
        }

    def load(self, key: jax.Array, metric: str) -> TuningWeights:
        """Load the weights, the experts' in scope only.

        Args:
            key: typed PRNG key of the merges, for random methods.
            metric: "strict" or "flexible" accuracy is the score.

        Raises:
            UserError: a model cannot be loaded, or no number has an effect.
        """
        scope = set(self.model_set.in_scope)
        loaded = self._load_model(self.sources.base)
        # Tensors outside the scope are only read by forward passes, so they are cast once.
        outside = self.decoder.compute_dtype
        leaves = {
            p: x.astype(self.merged_dtypes.get(p, x.dtype) if p in scope else outside)
            for p, x in flatten(loaded).items()
        }
        base = unflatten(leaves)
        # Without a base, the first expert takes its place.
        experts = [] if self.model_set.base else [base]
        for model in list(self.sources.experts.values())[len(experts) :]:
            experts.append(self._load_model(model, paths=sorted(scope)))
        merger = Merger(
            base if self.model_set.base else None,
            experts,
            slots=self.tunable.slots,
            scope=tuple(sorted(scope)),
            num_layers=self.config.num_layers,
            compile_cache=CompileCache(),
        )
        tunable, notes = without_idle_numbers(self.tunable, merger, key)
        scorer = CandidateScorer(
            merger,
            tunable.bind,
            decoder=self.decoder,
            tokenizer=self.tokenizer,
            task=self.task,
            metric=metric,
            key=key,
        )
        return TuningWeights(base=base, merger=merger, tunable=tunable, notes=notes, scorer=scorer)

    def _load_model(self, model: SourceModel, *, paths: Sequence[str] | None = None) -> Params:
        folder, *adapters = model.reader.folders
        adapter = adapters[0] if adapters else None
        return load_model(folder, adapter=adapter, paths=paths, mesh=self.mesh)[1]


def build_setup(
    what: str | Tunable,
    task: str | None,
    *,
    base: str | None,
    experts: Mapping[str, str] | Sequence[str],
    scope: Scope | None,
    data: str | Path | None,
    shots: int | None,
    limit: int | None,
    chat: bool,
    max_new_tokens: int | None,
    mesh: Mesh | None,
    dtype: DTypeLike | None,
    allow_missing: Collection[str],
    trust_code: bool,
    overrides: Mapping[str, tuple[float, ...]],
    with_training: bool,
) -> TuningSetup:
    """Open the models and read the problems.

    See `sdjax.tune` for the arguments, except `with_training`: whether the search may use the
    gradient, so that training problems are read and the gradient of a program is tried.
    """
    named = read_named_merge(what) if isinstance(what, str) else None
    named_task = None
    if named is not None:
        if base is not None or experts or scope is not None:
            raise UserError(
                f"{what} names its models and tensors; remove --base, --expert, --scope"
            )
        base, experts = named.base, named.experts
        named_task = None if task else _only_task(str(what), named.tasks)
    else:
        if base is None:
            raise UserError("tune requires a base model; pass --base MODEL")
        if not isinstance(experts, Mapping):
            experts = dict(zip(default_slots(len(experts)), experts, strict=True))
    if not experts:
        raise UserError("tune requires at least one expert; pass --expert NAME=MODEL")
    reference = next(iter(experts.values())) if base is None else base
    sources = open_models(reference, experts, Path.cwd() if named is None else named.folder)
    folder = sources.base.reader.folders[0]
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    dtypes = {info.dtype.name for info in sources.base.info.values()}
    model_set = ModelSet(
        base=base,
        experts=dict(experts),
        paths=tuple(param_specs(config)),
        scope=scope or "all",
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
    )
    tunable = what
    if isinstance(tunable, str):
        open_program = partial(
            _open_program,
            sources=sources,
            scope=model_set.scope,
            allow_missing=allow_missing,
            with_gradient=with_training,
        )
        tunable = open_tunable(tunable, model_set, open_program=open_program)
    if tunable.slots != tuple(experts):
        raise UserError(
            f"{tunable.name} merges {', '.join(tunable.slots)}, but the experts are named "
            f"{', '.join(experts)}; name them with --expert NAME=MODEL, in this order"
        )
    tunable = override_parameters(tunable, overrides)
    recipe = Path(what) if isinstance(what, str) and named is not None else None
    result_dtypes: Mapping[str, np.dtype] = {}
    if recipe is not None:
        text = tunable.write(tunable.start)
        result_dtypes = merged_dtypes(parse_recipe(text, recipe), sources)
    try:
        loaded_task = find_task(
            task or named_task or DEFAULT_TASK,
            data=data,
            shots=shots,
            trust_code=trust_code,
            allow_missing=tuple(allow_missing),
        )
    except UserError as error:
        if task or not named_task:
            raise
        raise UserError(f"{what}: {error}; --task NAME chooses another task") from None
    problems = select_problems(loaded_task, "development")
    halves = [
        build_prompts(loaded_task, half[:limit], tokenizer, chat=chat)
        for half in split_development(problems)
    ]
    training = []
    if with_training:
        held_out = [*problems, *read_problems(loaded_task, "test")]
        training = read_training(loaded_task, held_out)
    new_tokens, remarks = limit_answers(loaded_task, config, max_new_tokens)
    prompts = [item.tokens for half in halves for item in half]
    return TuningSetup(
        tunable=tunable,
        model_set=model_set,
        sources=sources,
        config=config,
        tokenizer=tokenizer,
        task=loaded_task,
        development=halves[0],
        confirmation=halves[1],
        training=training_examples(
            loaded_task, training, tokenizer, max_length=config.max_seq_len, chat=chat
        )
        if training
        else [],
        decoder=Decoder(
            config,
            fit_decoder_config(config, prompts, new_tokens),
            tokenizer=tokenizer,
            compute_dtype=dtype,
            mesh=mesh,
        ),
        mesh=mesh,
        notes=(
            *(named.notes if named is not None else ()),
            *map(str, call_checked(loaded_task, "notes", (list, tuple))),
            *remarks,
        ),
        recipe=recipe,
        merged_dtypes=result_dtypes,
    )


def merged_dtypes(recipe: Recipe, sources: MergeModels) -> dict[str, np.dtype]:
    """Return the dtypes of the tensors that `sdjax merge` writes, by path.

    A merge in memory has the dtypes of its base, so the base is loaded in these.

    Args:
        recipe: the recipe of the merge.
        sources: its models.

    Raises:
        UserError: the recipe's dtype cannot represent the base's tensors.
    """
    written = recipe.out_dtype or recipe.dtype
    experts = [_stored_dtypes(model) for model in sources.experts.values()]
    dtypes = {}
    for path, stored in _stored_dtypes(sources.base).items():
        others = [dtype[path] for dtype in experts if path in dtype]
        dtype = jnp.dtype(written) if written else jnp.result_type(stored, *others)
        if jnp.promote_types(stored, dtype) != dtype:
            raise recipe.fail(
                "out_dtype" if recipe.out_dtype else "dtype",
                f"the base is stored in {stored.name}, and tuning does not round merges to "
                f"{written}; remove the key until the final merge",
            )
        dtypes[path] = dtype
    return dtypes


def _stored_dtypes(model: SourceModel) -> dict[str, np.dtype]:
    return {
        parse_name(name).path: info.dtype for name, info in model.info.items() if is_floating(info)
    }


def _only_task(what: str, tasks: Sequence[str]) -> str | None:
    """Return the task that a file names, if any."""
    if len(tasks) > 1:
        raise UserError(f"{what}: one task at a time; choose with --task {' or '.join(tasks)}")
    return tasks[0] if tasks else None


def _open_program(
    file: Path,
    *,
    sources: MergeModels,
    scope: Scope,
    allow_missing: Collection[str],
    with_gradient: bool,
) -> Tunable:
    """Return a program file whose constants are tuned; the sandbox judges it."""
    signature = merge_signature(sources, scope)
    source = read_program(file, signature.limits.source_bytes)
    with Sandbox(signature, workers=1, allow_missing=allow_missing) as sandbox:
        trial = merge_trial(sources, scope, compiler="full")
        return program_tunable(
            source, sandbox, name=file.name, trial=trial, with_gradient=with_gradient
        )
