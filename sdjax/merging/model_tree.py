"""Models as pytrees of arrays: their tensors by path, and the same tree with other tensors.

Any pytree works: nested dicts, lists, tuples, dataclasses, `FrozenDict`, `nnx.State`. Paths are for
people, scopes and random keys only: a tree is rebuilt from its own structure, never from text.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.core.errors import UserError, truncated_repr
from sdjax.models.tensor_names import TensorName, name_tensors

logger = logging.getLogger(__name__)

Tree = Any  # a pytree of arrays
# Path to (base or None, experts).
Tensors = Mapping[str, tuple[jax.Array | None, tuple[jax.Array, ...]]]

_NNX_VALUE = jax.tree_util.GetAttrKey("value")  # the array of an `nnx.Variable`


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelTree:
    """A pytree of arrays with a path for each.

    Attributes:
        tensors: path to array, in the order of the tree. A path consists of keys, indices and
            attribute names, joined by "/".
        names: path to the tensor's place in the model.
        structure: structure of the tree.
    """

    tensors: Mapping[str, Any]
    names: Mapping[str, TensorName]
    structure: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, tree: Tree, title: str) -> ModelTree:
        """Read a tree.

        Args:
            tree: the tree.
            title: name of the model in error messages.

        Raises:
            UserError: anything that is not a pytree of arrays.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        if not leaves or not leaves[0][0]:
            kind = type(tree).__name__
            found = truncated_repr(tree, 20) if isinstance(tree, Mapping | Sequence) else kind
            raise UserError(
                f"{title} must be a pytree of arrays, such as a nested dict, not {found}"
            )
        texts = [_text(path) for path, _ in leaves]
        count = Counter(texts)
        # For example the keys "a/b", and "b" within "a".
        texts = [
            text if count[text] == 1 else jax.tree_util.keystr(path)
            for text, (path, _) in zip(texts, leaves, strict=True)
        ]
        tensors = dict(zip(texts, (leaf for _, leaf in leaves), strict=True))
        for path, leaf in tensors.items():
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise UserError(f"{title}: {path!r} must be an array, not {type(leaf).__name__}")
        return cls(tensors=tensors, names=name_tensors(tensors), structure=structure)

    @property
    def by_name(self) -> dict[str, Any]:
        """The arrays by canonical path."""
        return {self.names[path].path: leaf for path, leaf in self.tensors.items()}

    def replace(self, new: Mapping[str, Any]) -> Tree:
        """Return the tree with other arrays at some paths."""
        return self.structure.unflatten([new.get(path, x) for path, x in self.tensors.items()])

    def map(self, function: Callable[[TensorName, Any], Any]) -> Tree:
        """Return the tree with `function(name, array)` of each array."""
        return self.replace(
            {path: function(self.names[path], x) for path, x in self.tensors.items()}
        )


def is_float(array: Any) -> bool:
    """Return whether an array has a real floating-point dtype."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def any_traced(arrays: Iterable[Any]) -> bool:
    """Return whether some array is a tracer of `jit`, `grad` or `vmap`."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def align_tensors(
    base: ModelTree | None,
    experts: Sequence[ModelTree],
    paths: Sequence[str],
    slots: Sequence[str],
) -> Tensors:
    """Return (base or None, experts) by path; check that shapes and devices match.

    Args:
        base: the base model, if there is one.
        experts: the experts, which may spell the names differently.
        paths: paths of the base, or of the first expert, to look up.
        slots: names of the experts.

    Raises:
        UserError: a tensor is missing, is not floating point, or differs in shape or devices.
    """
    reference = experts[0] if base is None else base
    by_name = [expert.by_name for expert in experts]
    aligned = {}
    for path in paths:
        name, shape = reference.names[path].path, reference.tensors[path].shape
        for slot, expert in zip(slots, by_name, strict=True):
            if name not in expert:
                raise UserError(
                    f"{slot} has no tensor {path!r}, which is in the scope of the merge"
                )
            if expert[name].shape != shape:
                raise UserError(
                    f"tensor {path!r}: {slot} has shape {list(expert[name].shape)}, "
                    f"{'the base' if base is not None else slots[0]} {list(shape)}"
                )
        arrays = [] if base is None else [base.tensors[path]]
        arrays += [expert[name] for expert in by_name]
        for array in arrays:
            if isinstance(array, jax.ShapeDtypeStruct):
                raise UserError(
                    f"tensor {path!r} has a shape but no values; use sdjax.merge, which returns "
                    "the shapes of the result"
                )
            if not is_float(array):
                raise UserError(f"tensor {path!r}: {array.dtype} cannot be merged; use floats")
        arrays = [jnp.asarray(array) for array in arrays]
        devices = {_devices(array) for array in arrays} - {None}
        if len(devices) > 1:
            raise UserError(
                f"tensor {path!r}: the models are on different devices; pass `mesh` to merge, or "
                "put all models on the same devices"
            )
        aligned[path] = (None, tuple(arrays)) if base is None else (arrays[0], tuple(arrays[1:]))
    return aligned


def warn_of_surplus(
    reference: ModelTree, title: str, experts: Sequence[ModelTree], slots: Sequence[str]
) -> None:
    """Log a warning if an expert has tensors that the result will not have.

    Args:
        reference: the base, or the first expert.
        title: its name in the warning.
        experts: the experts.
        slots: their names.
    """
    known = {name.path for name in reference.names.values()}
    for slot, expert in zip(slots, experts, strict=True):
        surplus = [path for path, name in expert.names.items() if name.path not in known]
        if surplus:
            logger.warning(
                "%s: %d of %d tensors %s left out, since %s does not have %s: %s",
                slot,
                len(surplus),
                len(expert.names),
                "is" if len(surplus) == 1 else "are",
                title,
                "it" if len(surplus) == 1 else "them",
                ", ".join([*surplus[:2], *(["..."] if len(surplus) > 2 else [])]),
            )


def _text(path: tuple[Any, ...]) -> str:
    if len(path) > 1 and path[-1] == _NNX_VALUE:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _devices(array: jax.Array) -> frozenset[jax.Device] | None:
    """Return the devices that hold an array; None while it is traced."""
    return None if isinstance(array, jax.core.Tracer) else frozenset(array.sharding.device_set)
