"""Merge engine: applies an algorithm to the tensors of a model.

For every tensor in scope::

    task_vector_j = float32(expert_j) - float32(base)
    new = round(float32(base) + algorithm(task_vectors))        once, to base's dtype

One executable is compiled per algorithm, shape and sharding, and per kind if the algorithm requests
it. Base, experts, numeric hyperparameters, depth and key are its arguments, so further layers,
other experts and sweeps over coefficients do not recompile.

Each executable also computes `squared_norm_or_inf` of its result, for `MergedModel.finite` and
`MergedModel.change`. On a mesh that is one scalar all-reduce, the only collective of an elementwise
method.

If a weight or a hyperparameter is traced (jit, grad, vmap), the same functions become part of that
trace: nothing is compiled or fetched, and all numbers of the result are traced too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.merged_model import MergedModel, donated_tensors, merged_model, squared_norms
from sdjax.merging.model_tree import (
    ModelTree,
    Tensors,
    Tree,
    align_tensors,
    any_traced,
    is_float,
    warn_of_surplus,
)
from sdjax.merging.scope import Scope, select_paths
from sdjax.merging.statistics import (
    Statistics,
    check_statistics,
    place_statistics,
    tensor_statistics,
)
from sdjax.merging.tensor_program import (
    TensorProgram,
    TreeProgram,
    check_layers,
    squared_norm_or_inf,
)
from sdjax.models.tensor_names import layer_depths
from sdjax.sharding.memory import exhaustion_reported, require_fit

Merged = tuple[dict[str, jax.Array], list[jax.Array]]


class Merger:
    """Repeated merges of the same base and experts, as in a search.

    The experts' norms, and which tensors no expert has changed, are computed once.

    Examples:
        >>> import sdjax
        >>> from sdjax.merging.methods.registry import algorithm
        >>> _, seed = sdjax.load_model("zoo:seed")
        >>> experts = [sdjax.load_model(f"zoo:{name}")[1] for name in ("reader", "accountant")]
        >>> merger = sdjax.Merger(seed, experts)
        >>> method = algorithm("task_arithmetic")
        >>> changes = [merger(method.bind(scale=s)).change for s in (0.5, 1.0)]
        >>> round(changes[1] / changes[0], 3)
        2.0

    Attributes:
        slots: names of the experts.
        compile_cache: cache of the executables, which mergers may share.
        paths: paths of the tensors in scope.
        changed: those that some expert has changed; all of them while the weights are traced.
        norms: float64 [experts], the norm of each task vector over the scope; float32 while the
            weights are traced.
    """

    def __init__(
        self,
        base: Tree | None,
        experts: Sequence[Tree],
        *,
        slots: Sequence[str] | None = None,
        scope: Scope = "all",
        num_layers: int | None = None,
        stats: Sequence[Statistics] | None = None,
        compile_cache: CompileCache | None = None,
    ) -> None:
        """Prepare merges of the same models.

        Args:
            base: pytree of arrays, or None if the task vectors are the experts' own weights.
            experts: pytrees in slot order; tensors outside the scope may be missing.
            slots: the experts' names; by default expert_1 ... expert_k.
            scope: "all" (every floating-point tensor), "mlp", "attention", or glob patterns over
                tensor paths.
            num_layers: number of layers, for the `depth` of a base that has only some of them.
            stats: statistics of each expert on data, in slot order, for methods that request them.
            compile_cache: cache to use; by default a new one.

        Raises:
            UserError: no experts, an argument that is not a pytree of arrays, a tensor that is
                missing, is not floating point, or differs in shape or devices from the base's.
        """
        if not experts:
            raise UserError("a merge needs at least one expert")
        self.slots = tuple(slots) if slots is not None else default_slots(len(experts))
        if len(set(self.slots)) != len(experts):
            raise UserError(
                f"{len(experts)} experts need {len(experts)} distinct names, not {self.slots}"
            )
        if stats is not None and len(stats) != len(experts):
            raise UserError(f"stats has {len(stats)} entries for {len(experts)} experts")
        self._stats = stats
        self.compile_cache = compile_cache if compile_cache is not None else CompileCache()
        base_tree = None if base is None else ModelTree.of(base, "the base")
        expert_trees = [
            ModelTree.of(tree, slot) for slot, tree in zip(self.slots, experts, strict=True)
        ]
        self._reference = expert_trees[0] if base_tree is None else base_tree
        self._base_is_zero = base_tree is None
        title = self.slots[0] if base_tree is None else "the base"
        warn_of_surplus(self._reference, title, expert_trees, self.slots)
        floats = [path for path, x in self._reference.tensors.items() if is_float(x)]
        self.paths = select_paths(floats, scope)
        names = self._reference.names
        self._names = {path: names[path] for path in self.paths}
        self._depths = layer_depths(names.values())
        if num_layers is not None:
            self._depths = {name.path: name.depth(num_layers) for name in names.values()}
        self._traced = any(any_traced(t.tensors.values()) for t in (self._reference, *expert_trees))
        align = partial(align_tensors, base_tree, expert_trees, self.paths, self.slots)
        self._tensors = align()
        squares = squared_norms(self._tensors)
        if self._traced:
            self.changed = frozenset(self.paths)
            self._is_changed = {path: jnp.any(square != 0) for path, square in squares.items()}
            self.norms = jnp.sqrt(sum(squares.values()))
            return
        if any_traced(squares.values()):
            # The weights are concrete, but a traced function closes over them.
            with jax.ensure_compile_time_eval():
                self._tensors = align()
                squares = squared_norms(self._tensors)
        squares = jax.device_get(squares)
        self.changed = frozenset(path for path, s in squares.items() if not np.all(s == 0))
        total = np.sum([np.asarray(s, np.float64) for s in squares.values()], axis=0)
        self.norms = np.sqrt(total)

    @property
    def tensors(self) -> Mapping[str, tuple[jax.Array | None, tuple[jax.Array, ...]]]:
        """The base's tensor (None without a base) and the experts' in scope, by path."""
        return self._tensors

    def place(self, path: str) -> tuple[str, float]:
        """Return the canonical path of a tensor in scope and the relative depth of its layer."""
        name = self._names[path].path
        return name, self._depths[name]

    def __call__(
        self,
        algorithm: Algorithm,
        *,
        key: jax.Array | None = None,
        donate: MergedModel | None = None,
        max_memory: int | None = None,
    ) -> MergedModel:
        """Merge the models by an algorithm.

        Args:
            algorithm: the algorithm, in either form.
            key: typed PRNG key; required if the algorithm requests one.
            donate: an earlier result of this merger; its buffers are donated to the new result
                (writing to fresh memory is several times slower). Ignored by the tree form.
            max_memory: limit on an executable's temporary memory per device, in bytes.

        Raises:
            MemoryLimitExceeded: an executable needs more memory than `max_memory` or than the
                devices have; nothing has run.
            UserError: the algorithm does not trace or does not return one array of the tensor's
                shape, it requests `depth` of a model whose layers are not recognized, a key is
                missing or traced, or `donate` does not match.
        """
        if not isinstance(algorithm, Algorithm):
            raise UserError(
                f"a Merger is called with an Algorithm, not {truncated_repr(algorithm)}; use "
                "sdjax.merge, or Algorithm.from_function for a function of your own"
            )
        self._check(algorithm, key)
        with exhaustion_reported():
            if self._traced or any_traced(jax.tree.leaves(dict(algorithm.hyperparameters))):
                if donate is not None and algorithm.form == "tensor":
                    raise UserError("donate cannot be used while the merge is traced; leave it out")
                new, squares = self._merge_in_trace(algorithm, key)
            elif algorithm.form == "tree":
                new, squares = self._merge_tree(algorithm, key, max_memory)
            else:
                new, squares = self._merge_tensors(algorithm, key, donate, max_memory)
            return merged_model(self._reference, self.paths, new, squares, self.norms)

    def _check(self, algorithm: Algorithm, key: jax.Array | None) -> None:
        algorithm.check_key(key)
        check_layers(algorithm, list(self._names.values()))
        check_statistics(algorithm.name, algorithm.requests, self._stats, self.slots)
        if self._base_is_zero:
            algorithm.constraints.check_without_base(algorithm.name, algorithm.hyperparameters)

    def merge_in_trace(
        self, algorithm: Algorithm, tensors: Tensors, *, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Return the merged tensors by path, as part of another trace (jit, grad).

        Weights and hyperparameters are then arguments of the caller's executable. The tensors are
        those of `changed`. Their norms are not computed, and tensors that share a shape (and a
        kind, if the algorithm requests it) are traced once.

        Args:
            algorithm: the algorithm; its hyperparameters may be traced.
            tensors: replaces the attribute `tensors`, with the same shapes. For an algorithm in the
                tensor form it may be a subset, and only that is merged.
            key: concrete typed PRNG key; required if the algorithm requests one.

        Raises:
            UserError: as for a call.
        """
        self._check(algorithm, key)
        return self._trace(algorithm, tensors, key)[0]

    def program_arguments(
        self, algorithm: Algorithm, tensors: Tensors, key: jax.Array | None
    ) -> dict[str, dict[str, Any]]:
        """Return what describes the merge of each changed tensor, by path.

        Args:
            algorithm: an algorithm in the tensor form.
            tensors: the tensors, as in `merge_in_trace`.
            key: typed PRNG key; required if the algorithm requests one.

        Returns:
            keyword arguments of `TensorProgram.of` and of `MergeGradient.of_tensor`.
        """
        arguments = {}
        for path, (base, experts) in tensors.items():
            if path not in self.changed:
                continue
            name, depth = self.place(path)
            statistics = tensor_statistics(
                algorithm.requests, self._stats, self.slots, name, experts[0].shape
            )
            arguments[path] = {
                "base": base,
                "experts": experts,
                "path": name,
                "depth": depth,
                "key": key,
                "statistics": place_statistics(statistics, experts[0]),
            }
        return arguments

    def _merge_tensors(
        self,
        algorithm: Algorithm,
        key: jax.Array | None,
        donate: MergedModel | None,
        max_memory: int | None,
    ) -> Merged:
        """Return the changed tensors by path, and the squared norms of their task vectors."""
        arguments = self.program_arguments(algorithm, self._tensors, key)
        donated = donated_tensors(donate, {path: self._tensors[path] for path in arguments})
        describe = partial(TensorProgram.of, algorithm, self.slots, statistic=squared_norm_or_inf)
        programs = {
            path: describe(donated=donated.get(path), **own) for path, own in arguments.items()
        }
        executables = self._compile(list(programs.values()), max_memory)
        new, squares = {}, []
        for (path, program), executable in zip(programs.items(), executables, strict=True):
            base, experts = self._tensors[path]
            new[path], square = executable(base, experts, *program.inputs, donated.get(path))
            squares.append(square)
        return new, squares

    def _tree_program(
        self, algorithm: Algorithm, tensors: Tensors, key: jax.Array | None
    ) -> tuple[TreeProgram, tuple[Any, ...], list[str]]:
        """Return the merge of the scope, its bases and experts, and the paths that it replaces."""
        paths = sorted(self.paths, key=lambda path: self._names[path].path)
        new_paths = [path for path in paths if path in self.changed]
        program = TreeProgram.of(
            algorithm,
            self.slots,
            {self._names[path].path: tensors[path] for path in paths},
            changed=frozenset(self._names[path].path for path in new_paths),
            key=key,
        )
        return program, tuple(zip(*(tensors[path] for path in paths), strict=True)), new_paths

    def _merge_tree(
        self, algorithm: Algorithm, key: jax.Array | None, max_memory: int | None
    ) -> Merged:
        if not self.changed:
            return {}, []
        program, arrays, new_paths = self._tree_program(algorithm, self._tensors, key)
        (executable,) = self._compile([program], max_memory)
        tensors, squares = executable(*arrays, *program.inputs)
        return dict(zip(new_paths, tensors, strict=True)), [squares]

    def _trace(
        self,
        algorithm: Algorithm,
        tensors: Tensors,
        key: jax.Array | None,
        statistic: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> tuple[dict[str, jax.Array], Iterable[Any]]:
        """Merge inside another trace.

        Returns:
            the new tensors by path, and for each the statistic; of a tree its squared norm.
        """
        if not self.changed:
            return {}, ()
        if algorithm.form == "tree":
            tree, arrays, new_paths = self._tree_program(algorithm, tensors, key)
            merged, squares = tree.function(*arrays, *tree.inputs)
            return dict(zip(new_paths, merged, strict=True)), squares
        programs = {
            path: TensorProgram.of(algorithm, self.slots, statistic=statistic, **arguments)
            for path, arguments in self.program_arguments(algorithm, tensors, key).items()
        }
        # Tensors that share a cache key are traced once.
        functions = {p.cache_key: jax.jit(p.function) for p in programs.values()}
        new, statistics = {}, []
        for path, program in programs.items():
            new[path], value = functions[program.cache_key](*tensors[path], *program.inputs, None)
            statistics.append(value)
        return new, statistics

    def _merge_in_trace(self, algorithm: Algorithm, key: jax.Array | None) -> Merged:
        new, squares = self._trace(algorithm, self._tensors, key, squared_norm_or_inf)
        if not self._traced:
            return new, list(squares)
        # A tensor that no expert has changed stays as it is, which only the trace's run can tell.
        old, changed = self._reference.tensors, self._is_changed
        kept = {path: jnp.where(changed[path], x, old[path]) for path, x in new.items()}
        return kept, [jnp.where(changed[p], s, 0.0) for p, s in zip(new, squares, strict=True)]

    def _compile(
        self, programs: Sequence[TensorProgram | TreeProgram], max_memory: int | None
    ) -> list[jax.stages.Compiled]:
        """Return executables that fit into the memory of their devices."""
        executables = self.compile_cache.get(programs, max_memory)
        for executable in dict.fromkeys(executables):
            require_fit(executable)
        return executables


_SHARED_CACHE = CompileCache()


def merge(
    base: Tree | None,
    experts: Sequence[Tree],
    algorithm: Algorithm,
    *,
    slots: Sequence[str] | None = None,
    scope: Scope = "all",
    key: jax.Array | None = None,
    num_layers: int | None = None,
    stats: Sequence[Statistics] | None = None,
    compile_cache: CompileCache | None = None,
    donate: MergedModel | None = None,
) -> MergedModel:
    """Merge once; see `Merger` for the arguments and for many merges of the same experts."""
    merger = Merger(
        base,
        experts,
        slots=slots,
        scope=scope,
        num_layers=num_layers,
        stats=stats,
        compile_cache=_SHARED_CACHE if compile_cache is None else compile_cache,
    )
    return merger(algorithm, key=key, donate=donate)


def default_slots(count: int) -> tuple[str, ...]:
    """Return the experts' default names: expert_1 ... expert_k."""
    return tuple(f"expert_{i + 1}" for i in range(count))
