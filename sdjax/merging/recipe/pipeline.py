"""`sdjax merge`: a recipe or a plan carried out into a complete Hugging Face folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import __version__
from sdjax.core.errors import TransientError, UserError
from sdjax.io.atomic_write import is_disk_full
from sdjax.io.resumable_writer import ResumableFolder
from sdjax.merging.method import Method
from sdjax.merging.recipe import output_files
from sdjax.merging.recipe.output_files import RECIPE, Provenance
from sdjax.merging.recipe.plan import MergePlan, MergeStep, plan_recipe
from sdjax.merging.recipe.schema import read_recipe
from sdjax.merging.recipe.source_models import open_source_model
from sdjax.merging.recipe.stream import OnTensor, merge_steps, output_specs
from sdjax.merging.recipe.tokenizer_plan import TokenizerPlan, plan_tokenizer

MAX_FILE_BYTES = 5_000_000_000  # as transformers splits


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result: its folder, how many tensors it has, how many no expert had changed, how many
    an interrupted attempt had left, its size, and what the user is to be told.
    """

    folder: Path
    tensors: int
    unchanged: int
    resumed: int
    bytes: int
    notes: tuple[str, ...]


def merge_recipe(
    recipe_path: Path | str,
    out: Path | str,
    methods: Mapping[str, Method],
    *,
    seed: int = 0,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> MergeResult:
    """Merge by a recipe (mergekit's YAML) into the folder ``out``.

    ``out`` appears under its name only when it is complete; an interrupted merge goes on where it
    stopped when it is called again. Paths in the recipe are relative to its folder, else to the
    working directory. methods: by name. seed: for methods that draw random numbers; a tensor's key
    comes from it and the tensor's path, as in ``sdjax.merging.engine``, so that streamed and in
    memory are the same. on_tensor: called with (done, total, name) after each tensor.

    Raises UserError for a bad recipe, a missing folder, tensors that do not match, a file cut
    short, a result that is not finite, and an ``out`` that exists already.
    """
    recipe = read_recipe(Path(recipe_path))
    opened = cache(lambda name: open_source_model(name, recipe.path.parent))
    plan = plan_recipe(recipe, methods, opened)
    return write_merged(
        plan,
        Path(out),
        origin=Provenance(method=recipe.merge_method, file=RECIPE, text=recipe.text),
        tokenizer=plan_tokenizer(plan.template, plan.models, recipe, opened),
        chat_template=output_files.resolve_chat_template(recipe, plan.models),
        key=jax.random.key(seed) if plan.draws else None,
        on_tensor=on_tensor,
        max_file_bytes=max_file_bytes,
    )


def write_merged(
    plan: MergePlan,
    out: Path,
    *,
    origin: Provenance,
    key: jax.Array | None,
    tokenizer: TokenizerPlan | None = None,
    chat_template: str | None = None,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> MergeResult:
    """Carry out a plan; see ``merge_recipe``. key: of a plan that draws random numbers."""
    if tokenizer is None:
        tokenizer = TokenizerPlan(folder=plan.template.folder, new={}, vocabulary=None)
    vocabulary = tokenizer.vocabulary
    specs = output_specs(plan, vocabulary)
    fingerprint = _fingerprint(plan, origin, key, chat_template, tokenizer.folder, specs)
    with _writing(out):
        writer = ResumableFolder(out, specs, fingerprint=fingerprint, max_file_bytes=max_file_bytes)
    resumed = len(writer.done)
    try:
        with _writing(out):
            # What is small comes first: its files may be damaged, and tensors take long.
            output_files.write_config(
                writer.folder,
                plan,
                specs,
                vocabulary=None if vocabulary is None else vocabulary.size,
            )
            output_files.write_tokenizer(
                writer.folder,
                tokenizer.folder,
                plan.template.folder,
                new=tokenizer.new,
                chat_template=chat_template,
            )
            output_files.write_model_card(
                writer.folder,
                out.name,
                origin=origin,
                models=[model.name for model in plan.models],
                notes=tokenizer.notes,
            )
            unchanged = merge_steps(plan, vocabulary, writer, key, on_tensor)
            size = writer.bytes
            writer.finish()
    except TransientError:
        raise
    except UserError:
        writer.discard()  # trying again would end the same way
        raise
    finally:
        writer.close()
    return MergeResult(
        folder=out,
        tensors=len(plan.steps),
        unchanged=unchanged,
        resumed=resumed,
        bytes=size,
        notes=tokenizer.notes,
    )


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "make room" if is_disk_full(error) else "mend that"
        raise TransientError(
            f"{out}: cannot be written ({error.strerror}); {remedy} and call again, "
            "it goes on where it stopped"
        ) from None


def _fingerprint(
    plan: MergePlan,
    origin: Provenance,
    key: jax.Array | None,
    chat_template: str | None,
    tokenizer: Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
) -> str:
    """What an interrupted merge must have in common with the one that goes on with it: all that a
    tensor follows from.
    """
    places = {id(model): place for place, model in enumerate(plan.models)}

    def told_of(step: MergeStep) -> dict[str, Any]:
        algorithm = step.algorithm
        return {
            "tensor": (step.name, step.path, specs[step.name].shape, step.dtype.name),
            "base": step.base is not None,
            # Of a model that is merged in memory already there is no place.
            "inputs": [(places.get(id(one.model)), one.name) for one in step.everything],
            "algorithm": algorithm and (algorithm.identity, dict(algorithm.hyperparameters)),
            "rows": (step.vocabulary, step.anchor),
        }

    told = {
        "version": __version__,
        "text": origin.text,
        "key": None if key is None else np.asarray(jax.random.key_data(key)).tolist(),
        "chat_template": chat_template,
        "models": [
            (model.name, [output_files.file_stats(folder) for folder in model.tensors.folders])
            for model in plan.models
        ],
        "slots": plan.slots,
        "tokenizer": output_files.file_stats(tokenizer),
        "steps": [told_of(step) for step in plan.steps],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
