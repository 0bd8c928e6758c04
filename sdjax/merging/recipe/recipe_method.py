"""The merge method of a recipe: a shipped one, or a program file (`merge_method: ./mine.py`).

This package executes no program file. The caller of `find_method` has it judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError, did_you_mean, truncated_repr
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import default_slots
from sdjax.merging.method import Hyperparameter, Method, RecipeSchema
from sdjax.merging.methods.registry import methods
from sdjax.merging.recipe.parameters import RECIPE_PARAMETERS, ParameterMap
from sdjax.merging.recipe.plan import is_floating
from sdjax.merging.recipe.recipe_document import TOP_LEVEL_KEYS
from sdjax.merging.recipe.schema import Recipe, Slice
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.merging.recipe.tokenizer_plan import plan_tokenizer
from sdjax.models.tensor_names import kind_of, parse_name

Tensors = Mapping[str, tuple[str, tuple[int, ...], str]]
LoadProgram = Callable[[Path, Sequence[str], Tensors, Mapping[str, Any]], tuple[Algorithm, str]]
"""Judges (file, experts, path to (kind, shape, dtype), hyperparameters); returns it with its text.

The hyperparameters are those of the recipe. None means values that differ between tensors or
models, which only traced hyperparameters may have.
"""


def find_method(
    recipe: Recipe,
    open_model: Callable[[str], SourceModel],
    load_program: LoadProgram | None = None,
) -> tuple[Method, str | None]:
    """Return the method of a recipe, and the text of its program file, if it is one.

    Args:
        recipe: the recipe.
        open_model: opens a model by name.
        load_program: has a program file judged.

    Raises:
        UserError: an unknown method, or a program that is refused.
    """
    name, available = recipe.merge_method, methods()
    if name.endswith(".py") or "/" in name:
        if load_program is None:
            message = f"{truncated_repr(name)} is a program file; use the command sdjax merge"
            raise recipe.fail("merge_method", message)
        return _program_method(recipe, open_model, load_program)
    if name not in available:
        hint = did_you_mean(name, available, f"available: {', '.join(available)}")
        message = f"no merge_method {truncated_repr(name)}; {hint}"
        raise recipe.fail("merge_method", message)
    return available[name], None


def is_shipped(method: Method) -> bool:
    """Return whether a method is one of the package, rather than a program file."""
    return methods().get(method.name) is method


@cache
def known_parameters() -> frozenset[str]:
    """Return the keys of the parameters of all methods, and the top-level keys."""
    keys = set(TOP_LEVEL_KEYS)
    for method in methods().values():
        keys |= {
            *method.schema.ignored,
            *(method.schema.recipe_key(p.name) for p in method.hyperparameters),
        }
    return frozenset(keys)


def _program_method(
    recipe: Recipe, open_model: Callable[[str], SourceModel], load_program: LoadProgram
) -> tuple[Method, str]:
    """Return the method in a program file, and the file's text.

    The task vectors are relative to `base_model`. The other models of a slice are expert_1 ...
    expert_k, in order. Hyperparameters have their own names in the recipe.
    """
    counts = {_num_experts(recipe, part) for part in recipe.slices}
    if len(counts) > 1:
        raise recipe.fail("merge_method", "a program needs the same number of models in all slices")
    file = recipe.path.parent / recipe.merge_method
    parameters = dict(_parameters(recipe))
    try:
        algorithm, text = load_program(
            file, default_slots(max(1, *counts)), _tensors(recipe, open_model), parameters
        )
    except UserError as error:
        raise recipe.fail("merge_method", str(error)) from None
    if algorithm.form == "tree":
        raise recipe.fail(
            "merge_method",
            f"{recipe.merge_method} merges all tensors at once, but a recipe merges tensor by "
            "tensor; use sdjax merge --algorithm",
        )
    method = Method(
        name=file.name,
        summary="",
        description="",
        formula="",
        hyperparameters=tuple(
            Hyperparameter(name=name, type=type_name, default=algorithm.hyperparameters[name])
            for name, type_name in algorithm.traced.items()
        ),
        algorithm=algorithm,
        # The others are static and have been set before the program was traced.
        schema=RecipeSchema(ignored=tuple(parameters.keys() - algorithm.traced.keys())),
    )
    return method, text


def _num_experts(recipe: Recipe, part: Slice) -> int:
    base = part.base_model or recipe.base_model
    return sum(source.model != base for source in part.sources)


def _parameters(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield each parameter with its value, or None if it has several or no single value."""
    shared: list[ParameterMap] = [level for part in recipe.slices for level in part.levels]
    own = [source.parameters for part in recipe.slices for source in part.sources]
    for key in dict.fromkeys(key for level in (*shared, *own) for key in level):
        if key in RECIPE_PARAMETERS:
            continue
        values = [level[key].value for level in (*shared, *own) if key in level]
        single = isinstance(values[0], bool | int | float | str) and all(
            type(value) is type(values[0]) and value == values[0] for value in values
        )
        yield key, values[0] if single and not any(key in level for level in own) else None


def _tensors(recipe: Recipe, open_model: Callable[[str], SourceModel]) -> Tensors:
    """Return kind, shape and dtype of every tensor that the result may have, the base's first."""
    models = [open_model(name) for name in recipe.models()]
    vocabulary = plan_tokenizer(models[0], models, recipe, open_model).vocabulary
    tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for model in models:
        for name, info in model.info.items():
            shape = info.shape
            if not is_floating(info) or not math.prod(shape):
                continue
            if vocabulary is not None and name in model.vocabulary_tensors:
                shape = (vocabulary.size, *shape[1:])
            path = parse_name(name).path
            tensors.setdefault(path, (kind_of(path), shape, info.dtype.name))
    return tensors
