"""Merge plans for recipes, with mergekit's semantics.

`RecipeSchema` describes how a method uses `base_model` and its parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.merging.method import Method
from sdjax.merging.recipe.compatibility import compare_in_recipe
from sdjax.merging.recipe.model_parts import open_parts, part_of
from sdjax.merging.recipe.plan import (
    MergePlan,
    MergeStep,
    Stack,
    TensorRef,
    count_names,
    different_buffers,
    is_floating,
)
from sdjax.merging.recipe.schema import DEFAULT, Module, Recipe
from sdjax.merging.recipe.slice_planner import SlicePlanner
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.merging.recipe.tensor_roles import precedes_layers
from sdjax.merging.recipe.tokenizer_plan import VocabularyMap, plan_tokenizer
from sdjax.models.tensor_names import parse_name


def plan_recipe(
    recipe: Recipe,
    method: Method,
    open_model: Callable[[str], SourceModel],
    seed: int = 0,
    *,
    allow_crimes: bool = False,
) -> MergePlan:
    """Plan the merge of a recipe.

    Args:
        recipe: the recipe.
        method: its method, from `find_method`.
        open_model: opens a model by name.
        seed: seed of random methods.
        allow_crimes: accept models of different architectures.

    Raises:
        UserError: unknown or missing parameters, or models that do not match.
    """
    # Only if needed, since creating a key compiles an executable.
    key = jax.random.key(seed) if "key" in method.bind().requests else None
    planners = [
        (module, [SlicePlanner(recipe, method, part, opener, key) for part in module.slices])
        for module, opener in open_parts(recipe, open_model)
    ]
    models = tuple(open_model(name) for name in recipe.models())
    notes = compare_in_recipe(recipe, models, allow_crimes=allow_crimes)
    tokenizer = plan_tokenizer(models[0], models, recipe, open_model)
    steps: list[MergeStep] = []
    stacks: list[Stack] = []
    for module, parts in planners:
        new, stack = _plan_module(recipe, module, parts, tokenizer.vocabulary)
        steps += new
        stacks += [stack] if stack else []
    if copies := _copy_others(recipe, models[0]):
        names = [step.name for step in copies]
        notes.append(
            f"{count_names(names, 'tensor')} of parts that modules does not name: copied from "
            f"{models[0].name}"
        )
        steps += copies
    parts = [part for _, planned in planners for part in planned]
    return MergePlan(
        steps=tuple(steps),
        template=models[0],
        stacks=tuple(stacks),
        last=parts[-1].reference,
        models=models,
        tokenizer=tokenizer,
        key=key,
        notes=(
            *((f"{method.name}: {method.caution}",) if method.caution else ()),
            *notes,
            *(note for model in models for note in model.notes),
            *recipe.notes,
            *dict.fromkeys(note for part in parts for note in part.notes),
            *tokenizer.notes,
            *different_buffers(buffers for part in parts for buffers in part.buffers),
        ),
    )


def _plan_module(
    recipe: Recipe,
    module: Module,
    parts: list[SlicePlanner],
    vocabulary: VocabularyMap | None,
) -> tuple[list[MergeStep], Stack]:
    """Return the steps of a part of the models, and the templates of its layers."""
    num_layers = sum(part.num_layers for part in parts)
    if not num_layers and not module.slices[0].whole_models:
        raise recipe.fail(module.slices[0].line, "the result would have no layers")
    steps: list[MergeStep] = []
    layers: list[tuple[SourceModel, int]] = []
    for tensor in parts[0].outside_tensors():
        if precedes_layers(tensor[0]):
            depth = parts[0].reference.depth(tensor[0])
            steps.append(parts[0].step(tensor, depth, depth, vocabulary))
    for part in parts:
        for index in range(part.num_layers):
            position = index / (part.num_layers - 1) if part.num_layers > 1 else 1.0
            depth = len(layers) / max(num_layers - 1, 1)
            for tensor in part.layer_tensors(index, len(layers)):
                steps.append(part.step(tensor, position, depth, vocabulary))
            layers.append((part.reference, part.start + index))
    for tensor in parts[-1].outside_tensors():
        if not precedes_layers(tensor[0]):
            depth = parts[-1].reference.depth(tensor[0])
            steps.append(parts[-1].step(tensor, depth, depth, vocabulary))
    return steps, tuple(layers)


def _copy_others(recipe: Recipe, template: SourceModel) -> list[MergeStep]:
    """Return steps that copy the tensors of parts that the recipe does not name."""
    modules = [module.name for module in recipe.modules]
    if DEFAULT in modules:
        return []
    dtype = recipe.out_dtype or recipe.dtype
    copies = []
    for name in template.tensor_names():
        if part_of(name, modules) is None:
            info = template.info[name]
            own = np.dtype(jnp.dtype(dtype)) if dtype and is_floating(info) else info.dtype
            copies.append(
                MergeStep(
                    name=name,
                    path=parse_name(name).path,
                    spec=jax.ShapeDtypeStruct(info.shape, own),
                    sources=(TensorRef(model=template, name=name),),
                )
            )
    return copies
