"""Experts of a mixture merged as one tensor per layer, as mergekit does.

mergekit 0.1.5 stacks the experts of a layer, the gate and the up projection one above the other,
before it merges: a threshold, a norm or an angle is then that of all experts together. sdjax merges
each expert on its own unless a recipe sets `fuse_experts: true`. The result has the experts under
their own names either way.

Axes: e (experts), r (rows of the parts of an expert), c (columns).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sdjax.core.errors import UserError
from sdjax.merging.recipe.plan import Members, TensorRef

# An expert's tensor: what precedes its number, the number, its projection.
_EXPERT = re.compile(r"(.*\.experts\.)([0-9]{1,6})\.(\w+)\.weight")
# Projections that are stacked, in their order, to the name of the fused tensor. The second spelling
# is Mixtral's.
_FUSED = {
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
    ("down_proj",): "down_proj",
    ("w2",): "down_proj",
}


def fuse_experts(
    tensors: Sequence[tuple[str, Sequence[TensorRef | None]]],
) -> Iterator[tuple[str, Members, list[TensorRef | None]]]:
    """Yield the tensors of a layer, with those of its experts fused.

    Args:
        tensors: name in the result and source in every model, of each tensor of the layer.

    Yields:
        The name, the names of the members if it is fused, and the source in every model.

    Raises:
        UserError: experts with different tensors or shapes.
    """
    sources = dict(tensors)
    groups: dict[tuple[str, str], Members] = {}
    for prefix in dict.fromkeys(m[1] for name in sources if (m := _EXPERT.fullmatch(name))):
        found = {(int(m[2]), m[3]) for name in sources if (m := _match(prefix, name))}
        experts = sorted({number for number, _ in found})
        for parts, fused in _FUSED.items():
            if any(part in parts for _, part in found):
                groups[prefix, fused] = tuple(
                    tuple(f"{prefix}{number}.{part}.weight" for part in parts) for number in experts
                )
    name_of = {
        member: (prefix.replace("block_sparse_moe.", "mlp.") + fused, members)
        for (prefix, fused), members in groups.items()
        for names in members
        for member in names
    }
    done = set()
    for name, refs in tensors:
        if name not in name_of:
            yield name, (), list(refs)
        elif name_of[name][0] not in done:
            fused_name, members = name_of[name]
            done.add(fused_name)
            yield fused_name, members, _fuse_sources(fused_name, members, sources)


def _match(prefix: str, name: str) -> re.Match[str] | None:
    match = _EXPERT.fullmatch(name)
    return match if match and match[1] == prefix else None


def _fuse_sources(
    name: str, members: Members, sources: Mapping[str, Sequence[TensorRef | None]]
) -> list[TensorRef | None]:
    """Return the fused tensor in every model."""
    if missing := [n for names in members for n in names if n not in sources]:
        raise UserError(f"fuse_experts: {missing[0]} is missing, which other experts have")
    rows = [[sources[member] for member in names] for names in members]
    fused: list[TensorRef | None] = []
    for index in range(len(rows[0][0])):
        refs = [[parts[index] for parts in row] for row in rows]
        present = [[ref for ref in row if ref is not None] for row in refs]
        if not any(present):
            fused.append(None)
            continue
        model = next(ref for row in present for ref in row).model
        if [len(row) for row in present] != [len(row) for row in refs]:
            raise UserError(f"fuse_experts: {model.name} lacks some of the experts of {name}")
        shapes = [[model.info[ref.name].shape for ref in row] for row in present]
        dtypes = {model.info[ref.name].dtype for row in present for ref in row}
        if any(row != shapes[0] for row in shapes) or len(dtypes) > 1:
            raise UserError(
                f"fuse_experts: the experts of {name} have different shapes or dtypes in "
                f"{model.name}"
            )
        names = tuple(tuple(ref.name for ref in row) for row in present)
        fused.append(TensorRef(model=model, name=name, members=names))
    return fused


def read_fused(ref: TensorRef) -> np.ndarray:
    """Read a fused tensor: [e, r, c]."""
    read = ref.model.reader.read
    return np.stack([np.concatenate([read(name) for name in names]) for names in ref.members])


def split_fused(members: Members, fused: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each member's name and its values, of a fused tensor [e, r, c]."""
    for names, expert in zip(members, fused, strict=True):
        for name, part in zip(names, np.split(expert, len(names)), strict=True):
            yield name, np.ascontiguousarray(part)
