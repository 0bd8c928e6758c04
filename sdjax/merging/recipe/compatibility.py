"""Comparison of the configs of models that are merged.

Tensors of equal shapes may belong to different functions: another number of heads, another
activation, another rotary base. The result has the config of one model, so the weights of the
others would compute something else than they were trained for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdjax.core.errors import UserError, truncated_repr
from sdjax.merging.recipe.schema import Recipe
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.models.config import ModelConfig
from sdjax.models.hf_config import from_hf
from sdjax.models.rope import Rope

# Fields of `ModelConfig` that neither shapes nor slices show.
_STRUCTURE = ("num_heads", "num_kv_heads", "head_dim")
_SETTINGS = (
    "norm_eps",
    "query_pre_attn_scalar",
    "attn_logit_softcap",
    "final_logit_softcap",
    "sliding_window",
)
# The same for families that `ModelConfig` does not know: parts of keys of config.json.
_STRUCTURE_KEY = re.compile(
    r"(^|_)(n_?heads?|num_heads|attention_heads|key_value_heads|kv_heads|head_dim|head_size"
    r"|kv_channels|act|act_fn|activation|activation_function)$"
)
_SETTING_KEY = re.compile(
    r"rope|rotary|alibi|norm_eps|epsilon|sliding_window|softcap|query_pre_attn_scalar|multiplier"
    r"|parallel_residual|experts_per_tok|norm_topk"
)
_MAX_LISTED = 3


def compare_configs(
    reference: SourceModel, models: Sequence[SourceModel], *, allow_crimes: bool = False
) -> tuple[str, ...]:
    """Compare the function of each model with that of the one whose config the result has.

    Args:
        reference: the model whose config the result has.
        models: all models.
        allow_crimes: accept models of a different architecture (mergekit's name of this option).

    Returns:
        A note for each model whose config changes what its weights compute, or lacks the name of
        an architecture that the other has.

    Raises:
        UserError: a model has a different architecture, unless `allow_crimes`.
    """
    notes = []
    for model in models:
        structure, settings = _differences(reference.config, model.config)
        for one, other in ((model, reference), (reference, model)):
            if missing := _missing_architecture(one.config, other.config):
                notes.append(
                    f"{one.name}: its config has no {' and no '.join(missing)}, so that its "
                    f"architecture was not fully compared with that of {other.name}"
                )
        if structure and not allow_crimes:
            raise UserError(
                f"{model.name} has a different architecture from {reference.name}: "
                f"{_listed(structure)}; merge models of one architecture, or pass --allow-crimes"
            )
        if differences := [*structure, *settings]:
            notes.append(
                f"{model.name}: its config changes what its weights compute "
                f"({_listed(differences)}); the result has the config of {reference.name}"
            )
    return tuple(notes)


def compare_in_recipe(
    recipe: Recipe, models: Sequence[SourceModel], *, allow_crimes: bool
) -> list[str]:
    """Return the notes of `compare_configs` for the models of a recipe; errors name the line."""
    notes: list[str] = []
    for model in models[1:]:
        try:
            notes += compare_configs(models[0], [model], allow_crimes=allow_crimes)
        except UserError as error:
            raise recipe.fail(recipe.line_of(model.name), str(error)) from None
    return notes


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return the differences in the architecture, and in settings that change the function."""
    structure = []
    for key, value in (
        ("model_type", lambda config: config.get("model_type")),
        ("architecture", _architecture),
    ):
        old, new = value(expected), value(found)
        if None not in (old, new) and old != new:
            structure.append(_difference(key, old, new))
    if structure:
        return structure[:1], []
    old_config, new_config = _model_config(expected), _model_config(found)
    if old_config is not None and new_config is not None:
        return _compare_known(old_config, new_config)
    return _compare_keys(_flat(expected), _flat(found))


def _missing_architecture(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of its architecture that a config lacks and the other has."""
    names = {"model_type": lambda config: config.get("model_type"), "architectures": _architecture}
    return [
        key for key, value in names.items() if value(config) is None and value(other) is not None
    ]


def _architecture(config: Mapping[str, Any]) -> Any:
    architectures = config.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else None


def _model_config(config: Mapping[str, Any]) -> ModelConfig | None:
    """Return the config of a supported model, with the defaults of its family, or None."""
    try:
        return from_hf(config, "config.json")
    except UserError:
        return None


def _compare_known(old: ModelConfig, new: ModelConfig) -> tuple[list[str], list[str]]:
    structure, settings = (
        [
            _difference(name, getattr(old, name), getattr(new, name))
            for name in names
            if getattr(old, name) != getattr(new, name)
        ]
        for names in (_STRUCTURE, _SETTINGS)
    )
    for name in ("rope", "local_rope"):
        settings += _compare_ropes(name, getattr(old, name), getattr(new, name))
    same_layers = old.num_layers == new.num_layers and old.sliding_window == new.sliding_window
    if same_layers and old.windows != new.windows:
        settings.append("other layers have a sliding window")
    return structure, settings


def _compare_ropes(name: str, old: Rope | None, new: Rope | None) -> Iterator[str]:
    if old is None or new is None:
        return
    if old.theta != new.theta:
        yield _difference(f"{name}_theta", old.theta, new.theta)
    if old.partial != new.partial:
        yield _difference("partial_rotary_factor", old.partial, new.partial)
    if old.scaling != new.scaling:
        kinds = [rope.scaling.kind if rope.scaling else "none" for rope in (old, new)]
        same = len(set(kinds)) == 1
        yield f"{name}_scaling" if same else _difference(f"{name}_scaling", *kinds)


def _compare_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    different = [
        key
        for key in old
        if old[key] is not None and new.get(key) is not None and old[key] != new[key]
    ]
    structure = [key for key in different if _STRUCTURE_KEY.search(key)]
    settings = [key for key in different if _SETTING_KEY.search(key) and key not in structure]
    first, second = (
        [_difference(key, old[key], new[key]) for key in keys] for keys in (structure, settings)
    )
    return first, second


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the entries of a nested config, with keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _difference(name: str, old: Any, new: Any) -> str:
    return f"{name} {_printable(new)} instead of {_printable(old)}"


def _printable(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else truncated_repr(value).strip("'")


def _listed(differences: Sequence[str]) -> str:
    more = len(differences) - _MAX_LISTED
    suffix = f" and {more} more" if more > 0 else ""
    return ", ".join(differences[:_MAX_LISTED]) + suffix
