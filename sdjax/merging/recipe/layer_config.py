"""Entries of config.json that depend on the number of a layer, for a stack of layers.

The result's layer 7 may be layer 3 of a model. Counts of layers and lists with an entry per layer
then follow the stack. Entries that give layers a kind by a rule, such as every sixth, must give
each layer of the result the kind that it had, or the stack is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdjax.core.errors import UserError
from sdjax.io.safetensors_reader import CONFIG
from sdjax.merging.recipe.plan import Stack
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.merging.recipe.tensor_roles import stack_counts
from sdjax.models.config import FULL, SLIDING
from sdjax.models.hf_config import from_hf

# Lists that are not per-layer, even if they happen to have one item per layer.
_NOT_PER_LAYER = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")
# Lists of numbers of layers.
_LAYER_NUMBERS = (
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "attn_layer_indices",
    "mlp_only_layers",
    "moe_layers",
    "sliding_layers",
)


def _every(section: Mapping[str, Any], key: str, layer: int) -> bool:
    return (layer + 1) % max(section[key], 1) == 0


def _from(section: Mapping[str, Any], key: str, layer: int) -> bool:
    return layer >= section[key]


def _periodic(section: Mapping[str, Any], key: str, layer: int) -> bool:
    offset = section.get(key.replace("_period", "_offset"), 0)
    return layer % max(section[key], 1) == offset


# Integers that give layers a kind: key to the rule.
_RULES: dict[str, Callable[[Mapping[str, Any], str, int], bool]] = {
    "attn_layer_period": _periodic,
    "expert_layer_period": _periodic,
    "decoder_sparse_step": _every,
    "first_k_dense_replace": _from,
    "global_attn_every_n_layers": lambda section, key, layer: layer % max(section[key], 1) == 0,
    "interleave_moe_layer_step": _every,
}
# The same, unless `layer_types` lists the kinds.
_ATTENTION_RULES: dict[str, Callable[[Mapping[str, Any], str, int], bool]] = {
    "full_attention_interval": _every,
    "sliding_window_pattern": _every,
    "max_window_layers": _from,
}


def set_layers(fields: dict[str, Any], template: SourceModel, stack: Stack) -> None:
    """Change the entries for one stack of layers of the result.

    Args:
        fields: the config of the result, so far that of the template; changed in place.
        template: the model whose config the result has.
        stack: the templates of the layers.

    Raises:
        UserError: the config cannot describe the stack.
    """
    reference = stack[0][0]
    own = [(template.name, layer) for layer in range(len(reference.layers))]
    is_same_count = len(stack) == _length(template, reference)
    if is_same_count and [(model.name, layer) for model, layer in stack] == own:
        return
    old = _length(template, reference)
    counts = [(s, key) for s, key in stack_counts(fields, reference.prefix) if s[key] == old]
    if not counts and not is_same_count:
        raise UserError(
            f"{template.folder / CONFIG}: does not say how many layers the model has"
            f"{'' if reference.prefix == template.prefix else f' in {reference.prefix[:-1]}'}, so "
            f"that the {len(stack)} layers of the result cannot be declared"
        )
    sections = {id(section): section for section, _ in counts} or {id(fields): fields}
    for section in sections.values():
        _set_lists(section, template, stack, old)
        _set_windows(section, template, stack)
        _check_rules(section, template, stack)
    for section, key in counts:
        section[key] = len(stack)


def _length(template: SourceModel, reference: SourceModel) -> int:
    """Return the number of layers that the template has in a stack."""
    numbers = {
        name.removeprefix(reference.prefix).partition(".")[0]
        for name in template.info
        if name.startswith(reference.prefix)
    }
    return len(numbers) if reference.prefix != template.prefix else len(template.layers)


def _section(model: SourceModel, prefix: str) -> Mapping[str, Any]:
    """Return the section of a model's config that describes a stack."""
    counts = stack_counts(model.config, prefix)
    section: Mapping[str, Any] = counts[0][0] if counts else model.config
    return section


def _set_lists(
    section: dict[str, Any], template: SourceModel, stack: Stack, num_layers: int
) -> None:
    """Change lists with an entry per layer, and lists of numbers of layers."""
    for key, value in section.items():
        if not isinstance(value, list) or key in _NOT_PER_LAYER:
            continue
        items = [(_section(model, model.prefix).get(key, value), n) for model, n in stack]
        if not all(isinstance(entries, list) for entries, _ in items):
            continue
        if key in _LAYER_NUMBERS:
            section[key] = [n for n, (entries, layer) in enumerate(items) if layer in entries]
        elif len(value) == num_layers and all(layer < len(entries) for entries, layer in items):
            section[key] = [entries[layer] for entries, layer in items]


def _set_windows(section: dict[str, Any], template: SourceModel, stack: Stack) -> None:
    """List the kinds of attention of a family that alternates them by a default rule."""
    if section.get("layer_types") is not None:
        return
    windows = []
    for model, layer in stack:
        try:
            own = _section(model, model.prefix)
            windows.append(from_hf(own, CONFIG).windows[layer])
        except (UserError, IndexError):
            return
    if len(set(windows)) > 1:
        section["layer_types"] = [FULL if window is None else SLIDING for window in windows]


def _check_rules(section: Mapping[str, Any], template: SourceModel, stack: Stack) -> None:
    """Raise UserError if a layer of the result would have another kind than in its model."""
    rules = dict(_RULES)
    if section.get("layer_types") is None:
        rules |= _ATTENTION_RULES
    if not section.get("use_sliding_window"):
        rules.pop("max_window_layers", None)
    for key, rule in rules.items():
        if type(section.get(key)) is not int:
            continue
        for number, (model, layer) in enumerate(stack):
            own = _section(model, model.prefix)
            if type(own.get(key)) is int and rule(section, key, number) != rule(own, key, layer):
                raise UserError(
                    f"{template.folder / CONFIG}: {key}={section[key]} gives layers a kind by "
                    f"number, and layer {number} of the result, layer {layer} of {model.name}, "
                    "would have another; choose slices whose layers keep their kind"
                )
