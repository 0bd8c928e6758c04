"""Trial of a merge or of its gradient: compiles what will be compiled, and runs it once."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import squared_norm_or_inf
from sdjax.merging.merge_gradient import MergeGradient
from sdjax.merging.tensor_program import TensorProgram, TreeProgram
from sdjax.sandbox.algorithm import difference, loop_limit_check, to_algorithm
from sdjax.sandbox.compiler.probe_run import raise_if_out_of_memory
from sdjax.sandbox.config import Limits
from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor, check_estimate
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import VerifiedProgram, verify_ir
from sdjax.sharding.memory import compiled_memory, shortage
from sdjax.xla.compiler_options import compile_for_single_use

# The rest is for the process itself, which takes 1.3 GB of addresses, and for the compiler.
RUN_SHARE = 0.25  # share of the address space that the arrays of one run may take

Computation = TensorProgram | TreeProgram | MergeGradient


def try_merge(program: VerifiedProgram, trial: MergeTrial, signature: MergeSignature) -> None:
    """Compile every executable of a merge; run those that are cheap and small enough.

    Args:
        program: the verified program.
        trial: what the merge will compile.
        signature: expert slots, tensors and limits.

    Raises:
        Refusal: the merge needs more memory than there is, or JAX or XLA rejects the program.
        MemoryError: memory runs out, possibly because of earlier programs.
    """
    check_estimate(program.memory, trial.memory)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    algorithms = _algorithms(program, trial, signature)
    total = sum(tensor.size for tensor in signature.scope)
    tried = set()
    try:
        for weights, computation in (
            pair
            for algorithm in algorithms
            for pair in _computations(algorithm, trial, signature.slots, sharding)
        ):
            if computation.cache_key in tried:
                continue
            tried.add(computation.cache_key)
            executable = _compile(computation, trial.compiler)
            needed = compiled_memory(executable)
            if needed > trial.memory:
                message = f"the compiled merge {shortage(needed, trial.memory)}"
                raise Refusal("too costly", "memory", message)
            elements = sum(leaf.size for leaf in jax.tree.leaves(weights)) // (
                len(signature.slots) + 1
            )
            cost = program.cost * elements // max(total, 1)
            if cost <= signature.limits.max_probe_cost and _fits(executable, signature.limits):
                _run(executable, weights, computation)
    except (UserError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise_if_out_of_memory(error)
        message = f"the array program fails on the model ({type(error).__name__})"
        raise Refusal("refused", "ir", message) from None


def _algorithms(
    program: VerifiedProgram, trial: MergeTrial, signature: MergeSignature
) -> list[Algorithm]:
    """Return what the merge will apply."""
    if trial.subtracted is not None:
        return [difference(program, verify_ir(trial.subtracted, signature))]
    name = f"program {program.identity[:12]}"
    algorithms = [to_algorithm(program, name=name)]
    # The gradient is compiled of the merge alone.
    if trial.computes == "merge" and any(block.loops for _, block in program.programs.values()):
        algorithms.append(loop_limit_check(program, name=name))
    return algorithms


def _computations(
    algorithm: Algorithm, trial: MergeTrial, slots: Sequence[str], sharding: Any
) -> list[tuple[Any, Computation]]:
    """Return (weights, computation) of each merged tensor, or of the whole tree."""

    def specs(tensor: TrialTensor) -> tuple[Any, tuple[Any, ...]]:
        def spec(dtype: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(dtype), sharding=sharding)

        base = None if tensor.base is None else spec(tensor.base)
        return base, tuple(map(spec, tensor.experts))

    key = jax.random.key(0)
    changed = [tensor for tensor in trial.tensors if tensor.changed]
    if not changed:
        return []
    if algorithm.form == "tree":
        ordered = sorted(trial.tensors, key=lambda tensor: tensor.path)  # as the merger does
        tensors = {tensor.path: specs(tensor) for tensor in ordered}
        paths = frozenset(tensor.path for tensor in changed)
        if trial.computes == "gradient":
            gradient = MergeGradient.of_tree(algorithm, slots, tensors, changed=paths, key=key)
            return [(gradient.weights, gradient)]
        tree = TreeProgram.of(algorithm, slots, tensors, changed=paths, key=key)
        bases, experts = zip(*tensors.values(), strict=True)
        return [((bases, experts), tree)]
    place: dict[str, Any] = {"depth": 0.5, "key": key}
    if trial.computes == "gradient":
        gradients = [
            MergeGradient.of_tensor(algorithm, slots, *specs(tensor), path=tensor.path, **place)
            for tensor in changed
        ]
        return [(gradient.weights, gradient) for gradient in gradients]
    # A merge from disk computes no statistic.
    statistic = None if trial.compiler == "single use" else squared_norm_or_inf
    return [
        (
            specs(tensor),
            TensorProgram.of(
                algorithm, slots, *specs(tensor), path=tensor.path, statistic=statistic, **place
            ),
        )
        for tensor in changed
    ]


def _compile(computation: Computation, compiler: str) -> jax.stages.Compiled:
    if compiler == "single use" and isinstance(computation, TensorProgram):
        return compile_for_single_use(computation.lower())
    (executable,) = CompileCache(quick=compiler == "quick").get([computation])
    return executable


def _fits(executable: jax.stages.Compiled, limits: Limits) -> bool:
    """Return whether the arrays of a run are small next to the address space of this process."""
    sizes = executable.memory_analysis()
    if sizes is None:
        return False
    arguments, results = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    total = 2 * arguments + results + sizes.temp_size_in_bytes  # drawn in float32
    return total <= RUN_SHARE * limits.compile_address_space


def _run(executable: jax.stages.Compiled, weights: Any, computation: Computation) -> None:
    """Run an executable once on tensors like weights and their fine-tunes."""
    seed = hashlib.sha256(repr(computation.cache_key[1]).encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "big"))

    def draw(spec: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.05)
        return jax.device_put(values.astype(spec.dtype), spec.sharding)

    donated = (None,) if isinstance(computation, TensorProgram) else ()
    arguments = jax.tree.map(draw, weights)
    jax.block_until_ready(executable(*arguments, *computation.inputs, *donated))
