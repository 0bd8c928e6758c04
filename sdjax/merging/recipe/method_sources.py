"""The models and parameters of a slice as the recipe's method uses them."""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.core.errors import closest_name, did_you_mean, truncated_repr
from sdjax.merging.method import Method
from sdjax.merging.recipe.parameters import RECIPE_PARAMETERS, ParameterMap
from sdjax.merging.recipe.recipe_method import is_shipped, known_parameters
from sdjax.merging.recipe.schema import Recipe, Slice, Source


def split_base(recipe: Recipe, method: Method, part: Slice) -> tuple[Source | None, list[Source]]:
    """Return the source that is subtracted, or None, and the others in the method's order.

    Args:
        recipe: the recipe.
        method: its method.
        part: one of its slices.

    Raises:
        UserError: a model is listed twice, the base is missing, or the method takes another number
            of models.
    """
    schema, base_name = method.schema, part.base_model or recipe.base_model
    sources = list(part.sources)
    seen: set[tuple] = set()
    for source in sources:
        if (source.model, source.layers) in seen:
            raise recipe.fail(source.line, f"{source.model} is listed twice")
        seen.add((source.model, source.layers))
    if base_name is None and schema.base in ("required", "first"):
        raise recipe.fail("merge_method", f"{method.name} needs base_model")
    bases = [source for source in sources if source.model == base_name]
    if base_name is not None and not bases and part.whole_models:
        line = recipe.lines.get("base_model", part.line)
        bases = [Source(model=base_name, layers=None, parameters={}, line=line)]
        sources += bases
    if base_name is not None and not bases and schema.base != "plain":
        raise recipe.fail(
            part.line, f"base_model {base_name} is not among the sources of this slice"
        )
    base = None
    if schema.base != "plain" and bases:
        sources.remove(bases[0])
        if schema.base == "first":
            sources.insert(0, bases[0])
        else:
            base = bases[0]
    _check_count(recipe, method, part, len(sources), with_base=base is not None)
    return base, sources


def _check_count(
    recipe: Recipe, method: Method, part: Slice, count: int, *, with_base: bool
) -> None:
    low, high = method.schema.min_models, method.schema.max_models
    if count >= low and (high is None or count <= high):
        return
    if with_base and count == 0:  # the base alone, such as to merge an adapter into it
        return
    too_few = count < low
    bound = "exactly" if low == high else "at least" if too_few else "at most"
    limit = low if too_few or high is None else high
    raise recipe.fail(
        part.line,
        f"{method.name} takes {bound} {limit} model{'s' * (limit > 1)}"
        f"{' in addition to base_model' if with_base else ''}, not {count}",
    )


def check_parameters(
    recipe: Recipe, method: Method, part: Slice, sources: Sequence[Source]
) -> list[str]:
    """Return remarks on parameters that the method does not have, which are ignored.

    Args:
        recipe: the recipe.
        method: its method.
        part: one of its slices.
        sources: the models of the slice.

    Raises:
        UserError: a misspelled parameter, or a required one where it has no effect.
    """
    schema, parameters = method.schema, method.hyperparameters
    notes = []
    shared = {schema.recipe_key(p.name) for p in parameters}
    per_model = {schema.recipe_key(p.name) for p in parameters if p.type == "per_expert"}
    required = {schema.recipe_key(name) for name in schema.required}
    levels: list[tuple[ParameterMap, set[str], str]] = [
        (source.parameters, per_model, "for a single model") for source in sources
    ]
    levels += [(level, shared, "for the whole merge") for level in part.levels]
    strict = not is_shipped(method)  # the recipe was not written for mergekit
    for level, allowed, scope in levels:
        for key, value in level.items():
            if key in (*allowed, *schema.ignored, *RECIPE_PARAMETERS):
                continue
            message = f"{method.name} has no parameter {truncated_repr(key)} {scope}"
            misspelled = key not in known_parameters() and closest_name(key, shared) is not None
            if strict or misspelled or key in required:
                listed = f"allowed: {', '.join(sorted(allowed)) or 'none'}"
                raise recipe.fail(value.line, f"{message}; {did_you_mean(key, allowed, listed)}")
            notes.append(str(value.fail(f"{message}; ignored, as by mergekit")))
    return notes
