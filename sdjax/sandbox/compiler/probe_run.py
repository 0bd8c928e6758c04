"""Runs of a verified program on small fixed tensors, the first time that it computes anything.

A program runs operation by operation on the CPU. Compiling it as a whole would take longer
than running it, and compiled operations are reused by later candidates. The number of operations,
both cached and per program, is bounded: each takes 20 ms to compile and 200 kB of memory.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sdjax.models.tensor_names import layer_depths, name_tensors
from sdjax.sandbox.ir.calling_convention import CallingConvention
from sdjax.sandbox.ir.decode import Equation
from sdjax.sandbox.ir.primitives import CONTROL_FLOW
from sdjax.sandbox.refusal import NON_FINITE, Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.interpreter import bind_equation, run_block
from sdjax.sandbox.verify.verified_program import VerifiedProgram
from sdjax.xla.compiler_options import quick_options

MAX_DEPTHS = 3  # depths of layers that an array program is probed at
MAX_CACHED = 2_048
MAX_OPERATIONS = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeInputs:
    """Probe tensors of one array program.

    Attributes:
        task_vectors: one tensor or tree per slot.
        base: tensor or tree of the base model.
        host: the task vectors as NumPy arrays, indexed by slot and leaf.
    """

    task_vectors: tuple[Any, ...]
    base: Any
    host: list[list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An equation on operands of given shapes and dtypes, which programs can share.

    Attributes:
        key: primitive and parameters, or the equation itself for control flow.
        types: shape and dtype of each operand.
        max_loop_iterations: iterations after which a `while` loop is cut off.
        equation: the equation.
    """

    key: Any
    types: tuple[tuple[Any, Any], ...]
    max_loop_iterations: int
    equation: Equation = field(compare=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRun:
    """One array program and the tensors to run it on.

    Attributes:
        name: name of the array program.
        inputs: probe tensors.
        depth: value of the depth input.
        operations: operations that all probe runs of the program have used so far.
    """

    name: Any
    inputs: ProbeInputs
    depth: float
    operations: set[Operation]


def probe_runs(program: VerifiedProgram, signature: MergeSignature) -> list[ProbeRun]:
    """Return the runs: one per probed array program, at several depths if it reads the depth."""
    runs: list[ProbeRun] = []
    operations: set[Operation] = set()
    depths = _probe_depths(signature) if "depth" in program.requests else (0.0,)
    for name in program.probes:
        inputs = _probe_inputs(program.programs[name][0], name)
        runs += [
            ProbeRun(name=name, inputs=inputs, depth=depth, operations=operations)
            for depth in depths
        ]
    return runs


def execute_probe_run(
    program: VerifiedProgram, probe_run: ProbeRun, order: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Run a program on probe tensors.

    Args:
        program: the program.
        probe_run: what to run.
        order: permutation of the experts.

    Returns:
        the leaves of the result.

    Raises:
        Refusal: a result is not finite, a loop does not end, or JAX rejects an operation (only
            possible for forged IR).
        MemoryError: memory runs out, possibly because of earlier programs.
    """
    try:
        order = order or range(len(probe_run.inputs.task_vectors))
        return _execute(program, probe_run, order)
    except (Refusal, MemoryError, ImportError):  # the last two are faults of the process
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        message = f"the array program cannot be run ({type(error).__name__})"
        raise Refusal("refused", "ir", message) from None


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise MemoryError if XLA could not allocate memory."""
    if "RESOURCE_EXHAUSTED" in str(error):
        raise MemoryError from error


def _execute(
    program: VerifiedProgram, probe_run: ProbeRun, order: Sequence[int]
) -> list[np.ndarray]:
    convention, block = program.programs[probe_run.name]
    inputs = convention.pack(
        [probe_run.inputs.task_vectors[slot] for slot in order],
        probe_run.inputs.base,
        jax.random.key(0, impl="threefry2x32"),
        np.float32(probe_run.depth),
        [np.float32(value) for value in program.hyperparameters.values()],
    )
    bind = functools.partial(_bind_compiled, probe_run.operations)
    outputs, exhausted = run_block(block, inputs, program.max_loop_iterations, bind)
    if exhausted is not None and bool(exhausted):
        limit = program.max_loop_iterations
        message = f"a `while` loop did not end within {limit} iterations on the probe tensors"
        raise Refusal("too costly", "loop-iterations", message)
    leaves = [np.asarray(leaf) for leaf in outputs]
    for leaf in leaves:
        if not np.isfinite(leaf).all():
            fraction = float(np.mean(~np.isfinite(leaf)))
            raise Refusal(
                NON_FINITE,
                "non-finite",
                f"{fraction:.2g} of the result is NaN or infinite on probe tensors, which contain"
                " zeros as real task vectors do; guard divisions, logarithms and roots",
            )
    return leaves


def _bind_compiled(
    operations: set[Operation], equation: Equation, operands: list[Any], max_loop_iterations: int
) -> Any:
    # Control flow contains sub-programs, so such an equation equals only itself.
    is_control_flow = equation.name in CONTROL_FLOW
    operation = Operation(
        key=equation if is_control_flow else (equation.name, repr(equation.params)),
        types=tuple((x.shape, x.dtype) for x in operands),
        max_loop_iterations=max_loop_iterations,
        equation=equation,
    )
    operations.add(operation)
    if len(operations) > MAX_OPERATIONS:
        message = f"the program has more than {MAX_OPERATIONS} different operations"
        raise Refusal("too costly", "operations", message)
    return _compiled(operation)(*operands)


@functools.lru_cache(maxsize=MAX_CACHED)
def _compiled(operation: Operation) -> jax.stages.Compiled:
    def call(*operands: Any) -> Any:
        return bind_equation(operation.equation, list(operands), operation.max_loop_iterations)

    types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operation.types]
    return jax.jit(call).lower(*types).compile(compiler_options=quick_options())


@functools.lru_cache(maxsize=16)
def _probe_depths(signature: MergeSignature) -> tuple[float, ...]:
    """Return depths of tensors in scope: outside the layers, the first, the last, some between.

    Programs that agree at all depths of a model agree at these, whatever they do elsewhere.
    """
    if not signature.paths:
        return (0.0, 1.0)
    depths = layer_depths(name_tensors(path for path, _ in signature.paths).values())
    in_layers = sorted({depth for depth in depths.values() if depth >= 0})
    count = min(MAX_DEPTHS, len(in_layers))
    chosen = [in_layers[i * (len(in_layers) - 1) // max(count - 1, 1)] for i in range(count)]
    return ((-1.0,) if -1.0 in depths.values() else ()) + tuple(chosen)


@functools.lru_cache(maxsize=16)
def _probe_inputs(convention: CallingConvention, name: Any) -> ProbeInputs:
    """Draw task vectors like those of fine-tuning: bfloat16 differences, some exactly zero."""
    seed = int.from_bytes(hashlib.sha256(repr((name, convention)).encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)

    def tensor(shape: tuple[int, ...], scale: float, zeros: float) -> np.ndarray:
        values = rng.standard_normal(shape) * scale
        values = np.where(rng.random(shape) < zeros, 0.0, values)
        return values.astype(jax.numpy.bfloat16).astype(np.float32)

    zero_everywhere = [rng.random(shape) < 0.02 for shape in convention.shapes]  # in all experts
    host = [
        [
            np.where(zero, np.float32(0), tensor(shape, 0.01 * (1 + i), 0.05))
            for shape, zero in zip(convention.shapes, zero_everywhere, strict=True)
        ]
        for i in range(len(convention.slots))
    ]
    base = [tensor(shape, 0.05, 0.0) for shape in convention.shapes]
    return ProbeInputs(
        task_vectors=tuple(jax.device_put(convention.result(leaves)) for leaves in host),
        base=jax.device_put(convention.result(base)),
        host=host,
    )
