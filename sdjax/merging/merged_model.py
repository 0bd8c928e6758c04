"""Results of in-memory merges, their norms, and the reuse of their buffers.

Axes: *shape (of the tensor), experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.merging.model_tree import ModelTree, Tensors, any_traced
from sdjax.merging.tensor_program import task_vectors
from sdjax.xla.reductions import sums


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "finite", "change"),
    meta_fields=("merged", "kept"),
)
@dataclass(frozen=True, kw_only=True, repr=False)
class MergedModel:
    """Result of an in-memory merge.

    A pytree, so that a traced function may return it; `finite` and `change` are arrays then.

    Attributes:
        params: the base's tree with the tensors in scope replaced; all others are the base's own
            arrays. Without a base, the first expert takes its place.
        finite: whether every merged tensor is finite after rounding.
        change: ||merged task vector|| / mean_j ||task_vector_j||, Euclidean norms over the scope;
            0.0 if every task vector is zero, not finite if the merged one is not.
        merged: paths of the tensors in scope.
        kept: paths of all other tensors, whatever the experts have in their place.
    """

    params: Any
    finite: bool
    change: float
    merged: tuple[str, ...]
    kept: tuple[str, ...]

    def __repr__(self) -> str:
        """Return a summary in one line, without the tensors."""
        counts = f"{len(self.merged)} of {len(self.merged) + len(self.kept)} tensors merged"
        if not isinstance(self.change, float):
            return f"MergedModel({counts})"
        return f"MergedModel({counts}, finite={self.finite}, change={self.change:.3g})"


def merged_model(
    reference: ModelTree,
    paths: Sequence[str],
    new: Mapping[str, jax.Array],
    squares: Sequence[jax.Array],
    norms: Float[Array | np.ndarray, " experts"],
) -> MergedModel:
    """Assemble the result of a merge.

    Args:
        reference: the base, or the first expert.
        paths: paths of the tensors in scope.
        new: the merged tensors by path.
        squares: squared norms of the merged task vectors, infinite if one is not finite.
        norms: norm of each expert's task vector over the scope.
    """
    finite: Any
    change: Any
    if any_traced([*squares, norms]):
        total = sum((jnp.sum(square) for square in squares), jnp.float32(0))
        mean = jnp.mean(norms)
        finite = jnp.isfinite(total)
        change = jnp.where(mean > 0, jnp.sqrt(total) / jnp.where(mean > 0, mean, 1.0), 0.0)
    else:
        fetched = [np.asarray(square, np.float64) for square in jax.device_get(squares)]
        norm = math.sqrt(sum(float(np.sum(square)) for square in fetched))
        mean_norm = float(np.mean(norms))
        finite, change = math.isfinite(norm), norm / mean_norm if mean_norm else 0.0
    in_scope = set(paths)
    return MergedModel(
        params=reference.replace(new),
        finite=finite,
        change=change,
        merged=tuple(paths),
        kept=tuple(sorted(path for path in reference.tensors if path not in in_scope)),
    )


def donated_tensors(donate: object, tensors: Tensors) -> dict[str, jax.Array]:
    """Return the merged tensors of an earlier result, never those of the base or an expert.

    Args:
        donate: the earlier result, if any.
        tensors: the tensors that will be merged.

    Raises:
        UserError: the result is not one of the same merger, or was donated before.
    """
    if donate is None:
        return {}
    if not isinstance(donate, MergedModel):
        raise UserError(f"donate must be an earlier result, not {type(donate).__name__}")
    earlier = ModelTree.of(donate.params, "donate").tensors
    donated = {}
    for path, (base, experts) in tensors.items():
        reference = experts[0] if base is None else base
        tensor = earlier.get(path)
        if tensor is None or (tensor.shape, tensor.dtype) != (reference.shape, reference.dtype):
            raise UserError(f"donate: no {path} of this shape; pass a result of this merger")
        if not tensor.sharding.is_equivalent_to(reference.sharding, tensor.ndim):
            raise UserError(f"donate: {path} has a different sharding")
        if any(tensor is source for source in (base, *experts)):
            raise UserError(f"donate: {path} is not a merged tensor; pass an earlier result")
        if tensor.is_deleted():
            raise UserError("donate: the buffers of this result were donated before")
        donated[path] = tensor
    return donated


def squared_norms(tensors: Tensors) -> dict[str, jax.Array]:
    """Return the squared norms of the task vectors by path, each float32 [experts]."""
    return {path: _task_vector_squared_norms(*arrays) for path, arrays in tensors.items()}


@jax.jit
def _task_vector_squared_norms(
    base: Float[Array, "*shape"] | None, experts: tuple[Float[Array, "*shape"], ...]
) -> Float[Array, " experts"]:
    return jnp.stack(sums([t * t for t in task_vectors(base, experts)]))
