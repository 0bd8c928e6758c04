"""Families of merges: a shipped method with numbers per expert, along the layers and by kind.

| family    | numbers of a hyperparameter that has a value per expert                        |
|-----------|--------------------------------------------------------------------------------|
| `weights` | one per expert                                                                 |
| `slope`   | two per expert: in the first and in the last layer, interpolated between them  |
| `layers`  | one per expert and layer                                                       |
| `kinds`   | one per expert, layer and kind of tensor, such as "mlp.down_proj"              |

`METHOD:FAMILY` names a family over a method, `FAMILY` alone one over task arithmetic, and `METHOD`
alone its `weights`. Hyperparameters that all experts share follow the same rule without the
experts. Tensors outside the layers have the first layer's numbers; in `kinds` they have their own.

A tuned member is written as a recipe: lists are gradients along the layers, `filter` selects the
kind, and tensors outside the scope have weight 0 (mergekit 0.1.5's format, see
`sdjax.merging.recipe.parameters`). Methods whose recipes subtract no base merge differently in
memory; of those, `linear` is task arithmetic with `normalize`, and the others are in
`sdjax.tuning.programs`.

A weight per expert and layer follows Yang et al., "AdaMerging: adaptive model merging for
multi-task learning" (arXiv 2310.02575), who tune by gradient on the entropy of unlabeled inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdjax.core.errors import UserError, did_you_mean
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.method import Hyperparameter, Method
from sdjax.merging.methods.registry import methods
from sdjax.models.tensor_names import parse_name
from sdjax.tuning.model_set import ModelSet, filter_of
from sdjax.tuning.patterns import Pattern, PatternedAlgorithm
from sdjax.tuning.programs import method_program_tunable
from sdjax.tuning.recipe_text import check_scope, recipe_text
from sdjax.tuning.types import Parameter, Tunable

DEFAULT_METHOD = "task_arithmetic"
SMALL = 1e-4  # defaults up to it are tolerances, except of `t`


Layout = Callable[["ModelSet"], list[tuple[str | None, list[str]]]]
"""Returns the entries of a pattern: filter, and the label of each number along the layers."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family: its description, and which numbers a hyperparameter has.

    Attributes:
        summary: one line for tables and help texts.
        layout: returns filters and labels of the numbers for some models.
    """

    summary: str
    layout: Layout


def _one(models: ModelSet) -> list[tuple[str | None, list[str]]]:
    return [(None, [""])]


def _first_and_last(models: ModelSet) -> list[tuple[str | None, list[str]]]:
    if _layers(models, "slope") < 2:
        raise UserError("slope needs at least two layers; use the family weights")
    return [(None, ["first layer", "last layer"])]


def _each_layer(models: ModelSet) -> list[tuple[str | None, list[str]]]:
    return [(None, [f"layer {i}" for i in range(_layers(models, "layers"))])]


def _each_kind(models: ModelSet) -> list[tuple[str | None, list[str]]]:
    count = _layers(models, "kinds")
    entries: dict[str, list[str]] = {}
    for place in map(parse_name, models.in_scope):
        labels = [place.kind]
        if place.layer is not None:
            labels = [f"layer {i}, {place.kind}" for i in range(count)]
        entries.setdefault(filter_of(place), labels)
    # A filter may be part of another kind's name only if that name's own filter is longer.
    return [(pattern, entries[pattern]) for pattern in sorted(entries, key=lambda p: (-len(p), p))]


FAMILIES: Mapping[str, Family] = {
    "weights": Family(summary="one number per expert", layout=_one),
    "slope": Family(summary="per expert, with a slope in depth", layout=_first_and_last),
    "layers": Family(summary="one number per expert and layer", layout=_each_layer),
    "kinds": Family(summary="one number per expert, layer and kind", layout=_each_kind),
}


def family_tunable(
    method: str, family: str, models: ModelSet, *, starts: Mapping[str, float] | None = None
) -> Tunable:
    """Return a family over a shipped method.

    Args:
        method: name of the method.
        family: name of the family.
        models: the models to merge.
        starts: hyperparameter to initial value; by default the method's default.

    Raises:
        UserError: no such method or family, a method without numbers, one that recipes apply
            without a base, a wrong number of experts, layers that are not recognized, or a start
            that is out of bounds.
    """
    described, algorithm = _method(method)
    if family not in FAMILIES:
        listed = f"available: {', '.join(FAMILIES)}"
        raise UserError(f"no family {family!r}; {did_you_mean(family, FAMILIES, listed)}")
    count = len(models.experts)
    check_expert_count(described, count)
    tuned = tuned_hyperparameters(described, algorithm)
    if described.schema.base in ("first", "plain"):
        return _written_as_program(described, tuned, family, models, starts or {})
    check_scope(described, models)
    layout = FAMILIES[family].layout(models)
    normalized = bool(algorithm.hyperparameters.get("normalize", False))
    parameters: list[Parameter] = []

    def pattern(hyperparameter: Hyperparameter, expert: str | None) -> Pattern:
        key, entries = hyperparameter.name, []
        for _, labels in layout:
            entries.append(tuple(range(len(parameters), len(parameters) + len(labels))))
            for label in labels:
                place = ", ".join(part for part in (expert, label) if part)
                start = (starts or {}).get(key, algorithm.hyperparameters[key])
                low, high = bounds_of(described, hyperparameter, start, normalized=normalized)
                name = f"{key}[{place}]" if place else key
                parameters.append(Parameter(name=name, start=start, low=low, high=high))
        return Pattern(numbers=tuple(entries), filters=tuple(text for text, _ in layout))

    shared = {p.name: pattern(p, None) for p in tuned if p.type == "float"}
    per_expert = {
        p.name: [pattern(p, slot) for slot in models.experts]
        for p in tuned
        if p.type == "per_expert"
    }
    patterned = PatternedAlgorithm(algorithm=algorithm, shared=shared, per_expert=per_expert)
    return Tunable(
        name=f"{method}:{family}",
        slots=tuple(models.experts),
        parameters=tuple(parameters),
        bind=patterned.bind,
        write=lambda values: recipe_text(described, patterned, models, values),
        suffix=".yaml",
    )


def _written_as_program(
    method: Method,
    tuned: Sequence[Hyperparameter],
    family: str,
    models: ModelSet,
    starts: Mapping[str, float],
) -> Tunable:
    """Return the weights of a method whose recipes subtract no base."""
    if family != "weights":
        raise UserError(
            f"{method.name}: its recipes subtract no base, so that numbers by layer cannot be "
            f"written; use {method.name} alone, or a family over another method"
        )
    parameters = {}
    for hyperparameter in tuned:
        name = hyperparameter.name
        start = starts.get(name, hyperparameter.default)
        low, high = bounds_of(method, hyperparameter, start)
        parameters[name] = Parameter(name=name, start=start, low=low, high=high)
    return method_program_tunable(method, tuple(models.experts), parameters)


def tuned_hyperparameters(method: Method, algorithm: Algorithm) -> list[Hyperparameter]:
    """Return the numeric hyperparameters that are tuned.

    Tolerances are not. Neither is `scale` if the weights scale the result as well.

    Raises:
        UserError: the method has none.
    """
    numeric = [p for p in method.hyperparameters if p.type in ("float", "per_expert")]
    scaled = "weight" in algorithm.hyperparameters and (
        not algorithm.hyperparameters.get("normalize", False) or method.name == DEFAULT_METHOD
    )
    tuned = [
        p
        for p in numeric
        if (p.default > SMALL or p.name == "t") and not (p.name == "scale" and scaled)
    ]
    if not tuned:
        listed = ", ".join(p.name for p in method.hyperparameters) or "none"
        raise UserError(
            f"{method.name} has no number to tune (hyperparameters: {listed}); see `sdjax methods`"
        )
    return tuned


def bounds_of(
    method: Method, hyperparameter: Hyperparameter, start: float, *, normalized: bool = False
) -> tuple[float, float]:
    """Return the bounds of a hyperparameter: from its constraints, its name and the start.

    Args:
        method: the method.
        hyperparameter: its hyperparameter.
        start: the initial value.
        normalized: whether weights are divided by their sum, which must not be zero.
    """
    name = hyperparameter.name
    if name == "t" and start <= SMALL:  # nearswap's threshold, in units of a weight's change
        return 0.0, 100 * start if start > 0 else 100 * SMALL
    if name in method.schema.unit_interval or name in ("t", "rate"):
        return 0.0, 1.0
    if name == "weight":
        return weight_low(start, normalized=normalized), 2.0
    return free_bounds(start)


def weight_low(start: float, *, normalized: bool) -> float:
    """Return the lower bound of a weight; if weights are normalized, one that keeps their sum."""
    return min(0.01, start) if normalized and start >= 0 else -1.0


def free_bounds(start: float) -> tuple[float, float]:
    """Return the bounds of a number about whose use nothing is known."""
    reach = max(1.0, 2 * abs(start))
    return start - reach, start + reach


def check_expert_count(method: Method, count: int) -> None:
    """Raise UserError if a method does not take that many experts."""
    low, high = method.schema.min_models, method.schema.max_models
    if method.schema.base == "first" or (low <= count and (high is None or count <= high)):
        if count:
            return
        low = max(low, 1)
    allowed = f"exactly {low}" if low == high else f"at least {low}" if count < low else "at most 1"
    raise UserError(
        f"{method.name} takes {allowed} expert{'s' * (low > 1)}, not {count}; give --expert "
        "NAME=MODEL once per expert"
    )


def _method(name: str) -> tuple[Method, Algorithm]:
    """Return the method that merges in memory as recipes do, and its algorithm."""
    available = methods()
    if name == "linear":  # relative to the base, as the other methods
        method = available[DEFAULT_METHOD]
        return method, method.bind(normalize=True, weight=1.0)
    if name not in available:
        listed = f"families: {', '.join(FAMILIES)}; `sdjax methods` lists the methods"
        hint = did_you_mean(name, (*FAMILIES, *available), listed)
        raise UserError(f"no method or family {name!r}; {hint}")
    return available[name], available[name].algorithm


def _layers(models: ModelSet, family: str) -> int:
    if not models.num_layers:
        example = models.paths[0] if models.paths else "(none)"
        raise UserError(
            f"{family} needs the layers, but no tensor in scope is recognized as part of one, such "
            f"as {example!r}; name the layers by number, such as layers/3/..., or use the family "
            "weights"
        )
    return models.num_layers
