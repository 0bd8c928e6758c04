"""In-memory merging: `sdjax.merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.merging import engine
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.merged_model import MergedModel
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.model_tree import ModelTree, Tree
from sdjax.merging.scope import Scope
from sdjax.merging.statistics import Statistics
from sdjax.models.tensor_names import LAYER_TENSORS, OUTSIDE_TENSORS, TensorName
from sdjax.sharding.rules import sharding_of


def merge(
    base: Tree | None,
    experts: Sequence[Tree] | Mapping[str, Tree],
    method: str | Algorithm | Callable[..., Any],
    *,
    scope: Scope = "all",
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    stats: Sequence[Statistics] | Mapping[str, Statistics] | None = None,
    donate: MergedModel | None = None,
    **hyperparameters: Any,
) -> MergedModel:
    """Merge models that are in memory.

    One executable is compiled per method and tensor shape. Numeric hyperparameters are its
    arguments, so a sweep over them does not recompile. To merge the same models many times, create
    an `sdjax.Merger`, which computes the experts' norms only once.

    Under `jit`, `grad`, `vmap` and `eval_shape` the merge becomes part of the traced function, and
    of trees of `jax.ShapeDtypeStruct` it returns the shapes.

    Args:
        base: pytree of arrays that task vectors are relative to (matrices as [out, in]), or None if
            the task vectors are the experts' own weights. Tensors may have sdjax's names or Hugging
            Face's, as `safetensors.flax.load_file` gives them.
        experts: trees with the same tensors, in slot order (expert_1 ... expert_k), or by name.
            Tensors outside the scope may be missing.
        method: a method's name (see `sdjax methods`), a function of the algorithm API, or an
            `Algorithm`.
        scope: "all" (every floating-point tensor), "mlp", "attention", or glob patterns over tensor
            paths in either spelling.
        mesh: mesh to shard all tensors over by `sdjax.sharding.rules`; by default they are not
            moved.
        key: typed PRNG key, for random methods. A tensor's random numbers depend on the key and on
            its path, not on its spelling.
        stats: statistics of each expert on data, like `experts` a list or by name; methods such as
            fisher and regmean need them. `sdjax.load_stats` reads what `sdjax stats` has written.
        donate: an earlier result whose buffers are donated to the new one.
        **hyperparameters: hyperparameters of the method.

    Returns:
        The base's tree (without a base, the first expert's) with merged tensors of the same shapes
        and dtypes, which tensors were merged, whether they are finite, and the size of the change.

    Raises:
        UserError: an unknown method or hyperparameter, models that do not match, a missing key, or
            an algorithm that does not trace.

    Examples:
        >>> import sdjax
        >>> _, seed = sdjax.load_model("zoo:seed")
        >>> experts = [sdjax.load_model(f"zoo:{name}")[1] for name in ("reader", "accountant")]
        >>> merged = sdjax.merge(seed, experts, "ties", density=0.3, scale=0.8)
        >>> merged.finite
        True
    """
    if not isinstance(experts, Mapping | Sequence):
        raise UserError(f"experts must be a list of trees or trees by name, not {experts!r:.60}")
    if isinstance(experts, Mapping) and _is_model(experts, base):
        raise UserError(
            "experts must be a list of trees or trees by name, and this is one tree; for a single "
            "expert, pass [expert]"
        )
    slots = tuple(experts) if isinstance(experts, Mapping) else None
    trees = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"mesh must be a jax.sharding.Mesh, not {type(mesh).__name__}")
    bound = _bind(method, hyperparameters)
    own = _in_slot_order(stats, slots)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((base, trees))):
        return jax.eval_shape(
            lambda base, trees: engine.merge(
                base, trees, bound, slots=slots, scope=scope, key=key, stats=own
            ),
            base,
            trees,
        )
    if mesh is not None:
        base = None if base is None else place_on_mesh(base, mesh)
        trees = [place_on_mesh(tree, mesh) for tree in trees]
    return engine.merge(
        base, trees, bound, slots=slots, scope=scope, key=key, stats=own, donate=donate
    )


def _in_slot_order(
    stats: Sequence[Statistics] | Mapping[str, Statistics] | None, slots: Sequence[str] | None
) -> list[Statistics] | None:
    if stats is None or not isinstance(stats, Mapping):
        return None if stats is None else list(stats)
    if slots is None or set(stats) != set(slots):
        raise UserError("stats by name needs experts by name, with the same names")
    return [stats[slot] for slot in slots]


def _is_model(experts: Mapping[str, Any], base: Any) -> bool:
    """Return whether a mapping is a single tree of tensors and not trees by name."""
    same_keys = isinstance(base, Mapping) and set(experts) == set(base)
    return same_keys or any(hasattr(value, "shape") for value in experts.values())


def place_on_mesh(tree: Tree, mesh: Mesh) -> Tree:
    """Return the tree with every tensor on the mesh; those already there are not copied."""

    def place(name: TensorName, tensor: Any) -> jax.Array:
        return jax.device_put(tensor, _sharding(name, tensor, mesh))

    return ModelTree.of(tree, "a model").map(place)


def _sharding(name: TensorName, tensor: Any, mesh: Mesh) -> jax.sharding.Sharding:
    tensors = OUTSIDE_TENSORS if name.layer is None else LAYER_TENSORS
    _, axes = tensors.get(name.kind.replace(".", "/"), ("", ()))
    if len(axes) != tensor.ndim:
        axes = ("",) * tensor.ndim  # unknown tensors are replicated
    return sharding_of(tensor.shape, axes, mesh)


def _bind(
    method: str | Algorithm | Callable[..., Any], hyperparameters: Mapping[str, Any]
) -> Algorithm:
    if isinstance(method, str):
        return algorithm(method, **hyperparameters)
    if isinstance(method, Algorithm):
        return method.bind(**hyperparameters)
    if not callable(method):
        raise UserError(f"method must be a name, a function or an Algorithm, not {method!r:.60}")
    return Algorithm.from_function(method, **hyperparameters)
