"""What a human-designed method is to the rest of the program: its function and its description.

The methods themselves stand above this package (``sdjax.algorithms``), so a recipe is given them as
a mapping from name to ``Method`` and imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdjax.merging.algorithm import Algorithm

Base = Literal["required", "optional", "first", "plain"]


@dataclass(frozen=True, kw_only=True)
class RecipeSchema:
    """How a recipe (mergekit's YAML) is to be read for one method.

    base: what ``base_model`` is. "required": the model that task vectors are relative to;
        "optional": the same where it is given; "first": the first of the models, and nothing is
        subtracted; "plain": one of the models like any other, and nothing is subtracted.
    fewest, most: how many models there may be beside the base that is subtracted.
    names: hyperparameter to its key in a recipe, where they differ.
    defaults: mergekit's default where the function's differs (it follows the paper).
    needed: hyperparameters that a recipe has to give.
    spellings: hyperparameter that is one of a few words to (what a recipe may say to the word);
        for some mergekit has true and false.
    shares: hyperparameters that are shares, numbers in [0, 1].
    ignored: keys that mergekit takes for this method and that change nothing.
    """

    base: Base = "required"
    min_models: int = 1
    max_models: int | None = None
    param_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    unit_interval: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def key(self, hyperparameter: str) -> str:
        """A hyperparameter's key in a recipe."""
        return self.param_names.get(hyperparameter, hyperparameter)


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """One hyperparameter: its annotation ("float", "per_expert", "bool", "int", "str"), default."""

    name: str
    type: str
    default: Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One human-designed method: what ``sdjax methods`` prints and what a recipe needs to know."""

    name: str
    title: str
    formula: str
    parameters: tuple[Hyperparameter, ...]
    function: Callable[..., Any]
    schema: RecipeSchema

    def bind(self, **hyperparameters: Any) -> Algorithm:
        """The algorithm with these values. Raises UserError for an unknown name or value."""
        return Algorithm.from_function(self.function, name=self.name, **hyperparameters)
