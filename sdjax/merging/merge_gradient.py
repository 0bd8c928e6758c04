"""Gradient of a merge in its hyperparameters, given that of a loss in the merged tensors.

A loss of a merged model depends on the hyperparameters through the merged tensors alone::

    d loss / d hyperparameters = sum over tensors of J(tensor)^T (d loss / d tensor)

Each product with a transposed Jacobian is a small executable of its own. As for a merge, one is
compiled per algorithm, shape, sharding and requested kind, whatever the depth of the model. It is
differentiated before the merged tensor is rounded to its dtype.

Axes: *shape (of the tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import Merger
from sdjax.merging.model_tree import Tensors
from sdjax.merging.tensor_program import ArraySpec, TensorProgram, TreeProgram, replicated
from sdjax.models.tensor_names import parse_name
from sdjax.sharding.memory import require_fit
from sdjax.xla.differentiation import NOT_DIFFERENTIABLE

# Hyperparameters of each tensor by path, as `Algorithm.hyperparameter_arrays` returns them; the
# single path is ALL_TENSORS if they are the same for all.
Hyperparameters = dict[str, dict[str, Any]]
ALL_TENSORS = ""


@dataclass(frozen=True, kw_only=True)
class MergeGradient:
    """Product of the transposed Jacobian of a merge with a cotangent.

    The executable's arguments are (base, experts, cotangent, *inputs), with a tuple of bases, of
    experts and of cotangents for a tree. Cotangents are float32. It returns the cotangents of the
    hyperparameters.

    Attributes:
        cache_key: gradients with the same cache key share an executable.
        function: the computation.
        lower: traces and lowers it.
        weights: shapes and shardings of the first three arguments.
        inputs: those of the merge, the hyperparameters first.
    """

    cache_key: tuple
    function: Callable[..., dict[str, jax.Array]]
    lower: Callable[[], jax.stages.Lowered]
    weights: tuple[Any, Any, Any]
    inputs: tuple[Any, ...]

    @classmethod
    def of_tensor(
        cls,
        algorithm: Algorithm,
        slots: Sequence[str],
        base: ArraySpec | None,
        experts: tuple[ArraySpec, ...],
        *,
        path: str,
        depth: float,
        key: jax.Array | None,
        statistics: Mapping[str, Sequence[ArraySpec] | None] | None = None,
    ) -> MergeGradient:
        """Describe the gradient of the merge of one tensor; see `TensorProgram.of`."""
        merge = TensorProgram.of(
            algorithm,
            slots,
            base,
            experts,
            path=path,
            depth=depth,
            key=key,
            statistics=statistics,
            dtype=jnp.float32,
        )
        reference = experts[0] if base is None else base
        return cls._of(merge, (base, experts, reference), (None,))

    @classmethod
    def of_tree(
        cls,
        algorithm: Algorithm,
        slots: Sequence[str],
        tensors: Mapping[str, tuple[ArraySpec | None, tuple[ArraySpec, ...]]],
        *,
        changed: frozenset[str],
        key: jax.Array | None,
    ) -> MergeGradient:
        """Describe the gradient of a merge in the tree form; see `TreeProgram.of`."""
        merge = TreeProgram.of(
            algorithm, slots, tensors, changed=changed, key=key, dtype=jnp.float32
        )
        bases, experts = zip(*tensors.values(), strict=True)
        references = tuple(
            own[0] if base is None else base
            for path, (base, own) in tensors.items()
            if path in changed
        )
        return cls._of(merge, (bases, experts, references), ())

    @classmethod
    def _of(
        cls, merge: TensorProgram | TreeProgram, arrays: tuple[Any, Any, Any], last: tuple
    ) -> MergeGradient:
        """Differentiate a merge.

        Args:
            merge: the merge, whose result is float32.
            arrays: bases, experts, and arrays of the shapes and shardings of the cotangents.
            last: further arguments of the merge.
        """

        def pull_back(
            bases: Any, experts: Any, cotangents: Any, hyperparameters: Any, *rest: Any
        ) -> dict[str, jax.Array]:
            def merged(hyperparameters: Any) -> Any:
                return merge.function(bases, experts, hyperparameters, *rest, *last)[0]

            _, transposed = jax.vjp(merged, hyperparameters)
            return transposed(cotangents)[0]

        bases, experts, references = arrays
        weights = (*_specs((bases, experts)), _specs(references, jnp.float32))

        def lower() -> jax.stages.Lowered:
            out = replicated(jax.tree.leaves(references)[0].sharding)
            try:
                return jax.jit(pull_back, out_shardings=out).lower(*weights, *merge.inputs)
            except NOT_DIFFERENTIABLE as error:
                raise UserError(f"no gradient: {error}") from error

        return cls(
            cache_key=("gradient", *merge.cache_key),
            function=pull_back,
            lower=lower,
            weights=weights,
            inputs=merge.inputs,
        )


def hyperparameters_by_tensor(merger: Merger, algorithm: Algorithm) -> Hyperparameters:
    """Return the hyperparameters of each tensor; their values may be traced.

    Args:
        merger: merger of the models.
        algorithm: the algorithm.
    """
    if not algorithm.is_scheduled:
        return {ALL_TENSORS: algorithm.hyperparameter_arrays(merger.slots)}
    found = {}
    for path in sorted(merger.changed):
        name, depth = merger.place(path)
        here = algorithm.at(parse_name(name).spellings[-1], depth)
        found[path] = here.hyperparameter_arrays(merger.slots)
    return found


def hyperparameter_gradient(
    merger: Merger,
    algorithm: Algorithm,
    cotangents: Mapping[str, jax.Array],
    *,
    key: jax.Array | None = None,
) -> Hyperparameters:
    """Return the derivative of a loss in the hyperparameters.

    Args:
        merger: merger of the models; its cache keeps the executables.
        algorithm: the algorithm, with concrete hyperparameters.
        cotangents: path of each tensor of `merger.changed` to the derivative of the loss in it,
            float32 with the sharding of the base's tensor.
        key: typed PRNG key of the merge.

    Returns:
        a tree like that of `hyperparameters_by_tensor`, in float64.

    Raises:
        MemoryLimitExceeded: an executable needs more memory than the devices have.
        UserError: JAX cannot differentiate the algorithm.
    """
    gradients = _gradients(merger, algorithm, merger.tensors, key)
    executables = merger.compile_cache.get(list(gradients.values()))
    for executable in dict.fromkeys(executables):
        require_fit(executable, "the gradient of the merge")
    results = {}
    for (path, gradient), executable in zip(gradients.items(), executables, strict=True):
        arrays = _arrays(merger, path, cotangents)
        results[path] = executable(*arrays, *gradient.inputs)
    fetched = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(results))
    if algorithm.is_scheduled or not fetched:
        return fetched
    return {ALL_TENSORS: jax.tree.map(lambda *parts: sum(parts), *fetched.values())}


def trace_gradient(
    merger: Merger, algorithm: Algorithm, tensors: Tensors, *, key: jax.Array | None = None
) -> None:
    """Trace what `hyperparameter_gradient` compiles; nothing is compiled.

    Args:
        merger: merger of the models.
        algorithm: the algorithm.
        tensors: some of the merger's tensors; all of them for the tree form.
        key: typed PRNG key of the merge.

    Raises:
        NotImplementedError: JAX cannot differentiate the algorithm; or TypeError, or ValueError.
    """
    gradients = _gradients(merger, algorithm, tensors, key)
    for gradient in {one.cache_key: one for one in gradients.values()}.values():
        jax.eval_shape(gradient.function, *gradient.weights, *gradient.inputs)


def _gradients(
    merger: Merger, algorithm: Algorithm, tensors: Tensors, key: jax.Array | None
) -> dict[str, MergeGradient]:
    """Return the gradients by path; that of the tree form is at ALL_TENSORS."""
    if not merger.changed:
        return {}
    if algorithm.form == "tree":
        names = _tree_names(merger)
        tree = MergeGradient.of_tree(
            algorithm,
            merger.slots,
            {name: tensors[path] for path, name in names.items()},
            changed=frozenset(names[path] for path in merger.changed),
            key=key,
        )
        return {ALL_TENSORS: tree}
    return {
        path: MergeGradient.of_tensor(algorithm, merger.slots, **arguments)
        for path, arguments in merger.program_arguments(algorithm, tensors, key).items()
    }


def _arrays(merger: Merger, path: str, cotangents: Mapping[str, jax.Array]) -> tuple[Any, Any, Any]:
    """Return the first three arguments of the gradient at a path."""
    if path != ALL_TENSORS:
        return (*merger.tensors[path], cotangents[path])
    paths = list(_tree_names(merger))
    bases, experts = zip(*(merger.tensors[path] for path in paths), strict=True)
    return bases, experts, tuple(cotangents[path] for path in paths if path in merger.changed)


def _tree_names(merger: Merger) -> dict[str, str]:
    """Return the canonical paths of the scope by path, in the order of a merge."""
    names = {path: merger.place(path)[0] for path in merger.paths}
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _specs(arrays: Any, dtype: Any = None) -> Any:
    def spec(x: ArraySpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding)

    return jax.tree.map(spec, arrays)
