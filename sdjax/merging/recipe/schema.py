"""Recipes: mergekit's YAML in one form, whichever way it is written.

A recipe merges one or several parts of its models (`modules`; "default" is the whole model). Every
way of writing a part (`models` or `slices`) yields a list of slices: layers of some models, merged
into the same number of layers of the result. `recipe_reader.py` reads recipes, and
`recipe_plan.py` turns them into merge plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.merging.recipe.parameters import ParameterMap

DTYPES = ("bfloat16", "float16", "float32", "float64")
DEFAULT = "default"  # the module that is a whole model


@dataclass(frozen=True, kw_only=True)
class Source:
    """Layers of one model.

    Attributes:
        model: name of the model.
        layers: half-open range of layers, or None for all of them.
        ignored_layers: half-open range of layers next to a whole model, which mergekit ignores.
        parameters: parameters of this model.
        line: line in the recipe.
        stats: folder of its statistics; by default MODEL.stats, if the method needs any.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: ParameterMap
    line: int
    ignored_layers: tuple[int, int] | None = None
    stats: str | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the result, merged layer by layer from the sources.

    Attributes:
        sources: the models and their layers.
        base_model: overrides the recipe's.
        levels: parameters that apply to every source, the innermost level first.
        line: line in the recipe.
        whole_models: whether the sources are whole models, so that the base takes part even if it
            is not listed.
    """

    sources: tuple[Source, ...]
    base_model: str | None
    levels: tuple[ParameterMap, ...]
    line: int
    whole_models: bool = False


@dataclass(frozen=True, kw_only=True)
class Module:
    """A part of the models that is merged, such as the vision tower.

    Attributes:
        name: "default" for the whole model, or the part's name.
        slices: its slices, in the order of the result's layers.
        line: line in the recipe.
    """

    name: str
    slices: tuple[Slice, ...]
    line: int


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Row of the embedding and of the output matrix that a recipe chooses for one token.

    Attributes:
        model: the model that has the row; None for zeros.
        token: text or id of the token in that model; None for the same token.
        force: use the row in every model, rather than only in models that lack the token.
        line: line in the recipe.
    """

    model: str | None
    token: str | int | None
    force: bool
    line: int


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """Choice of the result's tokenizer.

    Attributes:
        source: "base", "union" or a model.
        line: line in the recipe.
        pad_to_multiple_of: the number of embedding rows is padded to a multiple of it.
        tokens: token to its row; tokens that the tokenizer lacks are added to it.
    """

    source: str
    line: int
    pad_to_multiple_of: int = 1
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe.

    Attributes:
        path: its file.
        text: its text.
        lines: line of each top-level key.
        merge_method: name of the method.
        base_model: name of the base, if any.
        modules: the parts that are merged.
        dtype: dtype in which the result is stored, unless `out_dtype` is set.
        out_dtype: dtype in which the result is stored.
        tokenizer: choice of the tokenizer.
        chat_template: "auto", a template's name or a Jinja template.
        architectures: model to the architecture that the recipe says it has.
        name: name of the result in a file with several recipes.
        depends: names of the recipes of the file whose results it uses.
        notes: remarks for the user.
    """

    path: Path
    text: str
    lines: Mapping[str, int]
    merge_method: str
    base_model: str | None
    modules: tuple[Module, ...]
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None
    architectures: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    depends: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of all modules."""
        return tuple(part for module in self.modules for part in module.slices)

    def fail(self, at: str | int, message: str) -> UserError:
        """Return the error for a top-level key or a line number."""
        line = self.lines[at] if isinstance(at, str) else at
        return UserError(f"{self.path}, line {line}: {message}")

    def line_of(self, model: str) -> int:
        """Return the line of the first source with this model, or that of `base_model`."""
        lines = [s.line for part in self.slices for s in part.sources if s.model == model]
        return lines[0] if lines else self.lines["base_model"]

    def models(self) -> tuple[str, ...]:
        """Return the names of all models without duplicates, the base first."""
        names = [self.base_model]
        for part in self.slices:
            names += [part.base_model, *(source.model for source in part.sources)]
        return tuple(dict.fromkeys(name for name in names if name))
