"""Parts of a model that a recipe names in `modules`, such as its vision tower.

A part is named as its tensors are (`vision_tower`, `model.visual`, `decoder`), or by the word that
mergekit has for it in its tables (`text_decoder`, `multi_modal_projector`). A tensor belongs to the
part whose name is the longest that fits.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence

from sdjax.core.errors import truncated_repr
from sdjax.merging.recipe.schema import DEFAULT, Module, Recipe
from sdjax.merging.recipe.source_models import SourceModel, main_stack
from sdjax.merging.recipe.tensor_roles import core_name

# What the names of a part's tensors contain, and mergekit's words for the part; all other tensors
# are the text decoder's. A projector comes first, since it may be within a vision tower.
_PROJECTOR = r"(^|[._])(\w*projector|merger|deepstack_merger_list|connector|vision_adapter)\."
_VISION = r"(^|[._])vis\w*\."
_AUDIO = r"(^|[._])audio\w*\."
_ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_PROJECTOR, ("multi_modal_projector", "projector")),
    (_VISION, ("vision_tower", "vision_model", "visual", "vision")),
    (_AUDIO, ("audio_tower", "audio_model", "audio")),
    ("", ("text_decoder", "text_model", "language_model", "shared")),
)


def open_parts(
    recipe: Recipe, open_model: Callable[[str], SourceModel]
) -> list[tuple[Module, Callable[[str], SourceModel]]]:
    """Return each module of a recipe, with a function that opens that part of a model.

    Args:
        recipe: the recipe.
        open_model: opens a whole model.

    Raises:
        UserError: the models have no such part.
    """
    names = [module.name for module in recipe.modules]
    if names == [DEFAULT]:
        return [(recipe.modules[0], open_model)]
    template = open_model(recipe.models()[0])
    tensors = template.tensor_names()
    found = Counter(part_of(name, names) for name in tensors)
    for module in recipe.modules:
        if not found[module.name]:
            parts = ", ".join(dict.fromkeys(core_name(name).split(".")[0] for name in tensors))
            raise recipe.fail(
                module.line,
                f"{template.name} has no part {truncated_repr(module.name)}; it has {parts}",
            )

    def opened(name: str, module: Module) -> SourceModel:
        return restrict(open_model(name), names, module.name)

    return [
        (module, lambda name, module=module: opened(name, module))  # type: ignore[misc]
        for module in recipe.modules
    ]


def part_of(name: str, parts: Sequence[str]) -> str | None:
    """Return the part that a tensor belongs to, or None.

    Args:
        name: name of the tensor.
        parts: names of the parts; "default" has what belongs to no other.
    """
    core = core_name(name)
    fitting = [part for part in parts if any(n.startswith(f"{part}.") for n in (name, core))]
    if fitting:
        return max(fitting, key=len)
    words = next(words for pattern, words in _ROLES if re.search(pattern, name))
    return next((part for part in parts if part in words), DEFAULT if DEFAULT in parts else None)


def restrict(model: SourceModel, parts: Sequence[str], part: str) -> SourceModel:
    """Return one of several parts of a model.

    Args:
        model: the model.
        parts: names of all parts.
        part: name of the part.
    """
    names = [name for name in model.tensor_names() if part_of(name, parts) == part]
    prefix, layers, outside = main_stack(names, model.config, model.folder, parts=True)
    return dataclasses.replace(model, prefix=prefix, layers=layers, outside=outside, notes=())
