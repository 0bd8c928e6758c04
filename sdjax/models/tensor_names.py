"""Names of tensors: the canonical path, layer and kind of a tensor in any spelling.

A tensor has many names: `layers/3/mlp/down_proj` in sdjax, `model.layers.3.mlp.down_proj.weight` in
Hugging Face files, `blocks/3/kernel` in a Flax module. A name is split at "/" and ".", and a layer
is recognized by its number, wherever it is: `layers/3`, `h.3`, `blocks_3`, the fourth entry of a
list. Tensors that sdjax knows have one canonical path in all spellings, on which random keys, kinds
and scopes depend; other names keep their parts, joined by "/".
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

# Tensors of a layer in any family: name -> (Hugging Face's name, logical axes).
LAYER_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn/q_proj": ("self_attn.q_proj.weight", ("heads", "hidden")),
    "attn/k_proj": ("self_attn.k_proj.weight", ("kv_heads", "hidden")),
    "attn/v_proj": ("self_attn.v_proj.weight", ("kv_heads", "hidden")),
    "attn/qkv_proj": ("self_attn.qkv_proj.weight", ("query_key_value", "hidden")),
    "attn/o_proj": ("self_attn.o_proj.weight", ("hidden", "heads")),
    "attn/q_proj_bias": ("self_attn.q_proj.bias", ("heads",)),
    "attn/k_proj_bias": ("self_attn.k_proj.bias", ("kv_heads",)),
    "attn/v_proj_bias": ("self_attn.v_proj.bias", ("kv_heads",)),
    "attn/q_norm": ("self_attn.q_norm.weight", ("head_dim",)),
    "attn/k_norm": ("self_attn.k_norm.weight", ("head_dim",)),
    "mlp/gate_proj": ("mlp.gate_proj.weight", ("intermediate", "hidden")),
    "mlp/up_proj": ("mlp.up_proj.weight", ("intermediate", "hidden")),
    "mlp/gate_up_proj": ("mlp.gate_up_proj.weight", ("gate_and_up", "hidden")),
    "mlp/down_proj": ("mlp.down_proj.weight", ("hidden", "intermediate")),
    "input_norm": ("input_layernorm.weight", ("hidden",)),
    # Precedes the MLP, or follows attention in families with sandwich norms.
    "post_attn_norm": ("post_attention_layernorm.weight", ("hidden",)),
    "pre_mlp_norm": ("pre_feedforward_layernorm.weight", ("hidden",)),
    "post_mlp_norm": ("post_feedforward_layernorm.weight", ("hidden",)),
}
# Tensors outside the layers.
OUTSIDE_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed": ("model.embed_tokens.weight", ("vocab", "hidden")),
    "final_norm": ("model.norm.weight", ("hidden",)),
    "lm_head": ("lm_head.weight", ("vocab", "hidden")),
}

# Parts that may precede a known name: Flax's collection, Hugging Face's base model.
_ROOTS = ("params", "model")
# Both spellings, with "." between the parts -> name.
_IN_LAYER = {
    key: name for name, (hf, _) in LAYER_TENSORS.items() for key in (name.replace("/", "."), hf)
}
_OUTSIDE = {
    key: name
    for name, (hf, _) in OUTSIDE_TENSORS.items()
    for key in (name, hf.removeprefix("model."))
}
# Hugging Face's name of a module in a layer -> sdjax's.
_MODULES = {
    hf.partition(".")[0]: name.partition("/")[0]
    for name, (hf, _) in LAYER_TENSORS.items()
    if "/" in name
}
_STACK = re.compile(r"(?:.*(?:layers?|blocks?|stages?)|h)", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,9}")
_NUMBERED = re.compile(rf"({_STACK.pattern})_?({_NUMBER.pattern})", re.IGNORECASE)
# Numbered parts of a layer or a model that are not layers.
_NOT_STACKS = ("experts", "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorName:
    """A tensor's place in its model.

    Attributes:
        path: canonical path, such as "layers/3/mlp/down_proj".
        stack: path of the stack of layers that the tensor belongs to, such as "layers"; None
            outside the layers.
        layer: number of its layer within the stack; None outside the layers.
        kind: position of the tensor within its layer, such as "mlp.down_proj".
    """

    path: str
    stack: str | None
    layer: int | None
    kind: str

    def depth(self, num_layers: int) -> float:
        """Return the relative depth in [0, 1] among `num_layers` layers; -1 outside the layers."""
        return -1.0 if self.layer is None else self.layer / max(num_layers - 1, 1)

    @property
    def spellings(self) -> tuple[str, ...]:
        """The path, with "/" or "." between its parts, and Hugging Face's name if it is known."""
        known: tuple[str, ...] = ()
        stack = "model.layers" if self.stack == "layers" else (self.stack or "").replace("/", ".")
        if self.kind in OUTSIDE_TENSORS and self.layer is None:
            known = (OUTSIDE_TENSORS[self.kind][0],)
        elif (name := self.kind.replace(".", "/")) in LAYER_TENSORS and self.layer is not None:
            known = (f"{stack}.{self.layer}.{LAYER_TENSORS[name][0]}",)
        return (self.path, self.path.replace("/", "."), *known)


@functools.cache
def parse_name(name: str) -> TensorName:
    """Return the place of a tensor by its name in any spelling.

    Examples:
        >>> parse_name("model.layers.3.mlp.down_proj.weight").path
        'layers/3/mlp/down_proj'
        >>> gpt2 = parse_name("transformer.h.7.mlp.c_fc.weight")
        >>> gpt2.path, gpt2.layer, gpt2.kind
        ('transformer/h/7/mlp/c_fc/weight', 7, 'mlp.c_fc.weight')
    """
    parts = re.split(r"[/.]", name)
    roots = 0
    while roots < len(parts) - 1 and parts[roots] in _ROOTS:
        roots += 1
    known = _OUTSIDE.get(".".join(parts[roots:]))
    if known is not None:
        return TensorName(path=known, stack=None, layer=None, kind=known)
    found = _find_layer(parts)
    if found is None:
        return TensorName(path="/".join(parts), stack=None, layer=None, kind=".".join(parts))
    stack, layer, end = found
    if stack[roots:] == ["layers"]:
        parts, stack, end = parts[roots:], stack[roots:], end - roots
    rest = parts[end:]
    inner = _IN_LAYER.get(".".join(rest))
    if inner is not None:
        rest = inner.split("/")
    elif len(rest) > 1:
        rest = [_MODULES.get(rest[0], rest[0]), *rest[1:]]
    return TensorName(
        path="/".join([*parts[:end], *rest]),
        stack="/".join(stack),
        layer=layer,
        kind=".".join(rest or stack[-1:]),
    )


def name_tensors(names: Iterable[str]) -> dict[str, TensorName]:
    """Return the place of each tensor of one model; their canonical paths are distinct.

    In addition to `parse_name`, a model that is itself a list of layers, all with the same tensors,
    is a stack named "layers".

    Args:
        names: distinct names.
    """
    parsed = {name: parse_name(name) for name in names}
    if parsed and _is_layer_list(parsed):
        parsed = {name: parse_name(f"layers/{name}") for name in parsed}
    count = Counter(tensor.path for tensor in parsed.values())
    return {
        name: tensor if count[tensor.path] == 1 else dataclasses.replace(tensor, path=name)
        for name, tensor in parsed.items()
    }


def layer_depths(tensors: Iterable[TensorName]) -> dict[str, float]:
    """Return the relative depth of each tensor by its canonical path.

    Returns:
        The position of its layer in its stack, from 0 (first) to 1 (last); -1 outside the layers.
    """
    tensors = list(tensors)
    numbers: dict[str | None, list[int]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            numbers.setdefault(tensor.stack, []).append(tensor.layer)
    ends = {stack: (min(layers), max(layers)) for stack, layers in numbers.items()}

    def depth(tensor: TensorName) -> float:
        if tensor.layer is None:
            return -1.0
        first, last = ends[tensor.stack]
        return (tensor.layer - first) / max(last - first, 1)

    return {tensor.path: depth(tensor) for tensor in tensors}


def kind_of(name: str) -> str:
    """Return the position of a tensor within its layer, such as "mlp.down_proj".

    Examples:
        >>> kind_of("layers/3/mlp/down_proj"), kind_of("embed")
        ('mlp.down_proj', 'embed')
    """
    return parse_name(name).kind


def _find_layer(parts: Sequence[str]) -> tuple[list[str], int, int] | None:
    """Return the parts of the stack, the layer's number, and the number of parts up to it.

    The outermost stack counts: stages before their blocks, blocks before their parts.
    """
    for i, part in enumerate(parts):
        if i > 0 and _NUMBER.fullmatch(part) and _STACK.fullmatch(parts[i - 1]):
            return list(parts[:i]), int(part), i + 1
        if numbered := _NUMBERED.fullmatch(part):
            return [*parts[:i], numbered[1]], int(numbered[2]), i + 1
    # Lists of another name, but not tuples of arrays such as (kernel, bias).
    for i in range(1, len(parts) - 1):
        number, container = (_NUMBER.fullmatch(part) for part in (parts[i], parts[i - 1]))
        if number and not container and parts[i - 1] not in _NOT_STACKS:
            return list(parts[:i]), int(parts[i]), i + 1
    return None


def _is_layer_list(parsed: Mapping[str, TensorName]) -> bool:
    """Return whether the names are those of a list of at least two layers with equal tensors."""
    if any(tensor.layer is not None for tensor in parsed.values()):
        return False
    layers: dict[str, set[str]] = {}
    for name in parsed:
        number, slash, rest = name.partition("/")
        if not (slash and _NUMBER.fullmatch(number)):
            return False
        layers.setdefault(number, set()).add(rest)
    first, *others = layers.values()
    return bool(others) and all(names == first for names in others)
