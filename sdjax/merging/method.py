"""Description of a human-designed merge method and of how recipes use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdjax.merging.algorithm import Algorithm
from sdjax.merging.signature import Constraints

SUBSPACE_CAUTION = (
    "in a comparison of six methods on four language models (arXiv 2511.21437), methods on "
    "singular values typically scored lower than the base, and only task_arithmetic reliably gained"
)
"""Of the methods on singular values that the comparison includes."""

BaseRole = Literal["required", "optional", "first", "plain"]


@dataclass(frozen=True, kw_only=True)
class RecipeSchema:
    """Rules for reading a recipe (mergekit's YAML) for one method.

    Attributes:
        base: role of `base_model`. "required": task vectors are relative to it; "optional": the
            same if it is given; "first": it is the first of the models, and nothing is subtracted;
            "plain": it is a model like any other, and nothing is subtracted.
        min_models: minimum number of models, not counting a base that is subtracted.
        max_models: maximum number of models, or None.
        param_names: hyperparameter to its key in a recipe, if they differ.
        defaults: mergekit's default, if it differs from the function's (which follows the paper).
        required: hyperparameters that a recipe must set.
        choices: string hyperparameter to {value in a recipe: value}; mergekit's value may be a
            boolean.
        unit_interval: hyperparameters that must be in [0, 1].
        normalized: hyperparameter that is divided by its sum over the experts, to the one that
            switches this on.
        ignored: keys that mergekit accepts for this method and that have no effect.
    """

    base: BaseRole = "required"
    min_models: int = 1
    max_models: int | None = None
    param_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    unit_interval: tuple[str, ...] = ()
    normalized: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def constraints(self) -> Constraints:
        """Conditions on the hyperparameters besides their types."""
        return Constraints(
            unit_interval=self.unit_interval,
            normalized=self.normalized,
            all_zero=self.base == "required",
        )

    def recipe_key(self, hyperparameter: str) -> str:
        """Return a hyperparameter's key in a recipe."""
        return self.param_names.get(hyperparameter, hyperparameter)


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """A hyperparameter: name, type ("float", "per_expert", "bool", "int" or "str"), default."""

    name: str
    type: str
    default: Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """A human-designed merge method, as listed by `sdjax methods` and used in recipes.

    Attributes:
        name: name of the method.
        summary: first line of its documentation.
        description: paragraphs of the documentation after the summary.
        formula: the method as a formula.
        hyperparameters: all hyperparameters, in the order of the function's signature.
        algorithm: the method with its default hyperparameters.
        schema: how recipes use the method.
        caution: what published comparisons found against it, a note of every merge; or "".
    """

    name: str
    summary: str
    description: str
    formula: str
    hyperparameters: tuple[Hyperparameter, ...]
    algorithm: Algorithm
    schema: RecipeSchema
    caution: str = ""

    def bind(self, **values: Any) -> Algorithm:
        """Return the algorithm with these hyperparameters.

        Raises:
            UserError: an unknown hyperparameter, a value of the wrong type or outside [0, 1], or
                weights that are normalized but sum to zero.
        """
        return self.algorithm.bind(**values)
