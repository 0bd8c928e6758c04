"""A verified program run on small fixed tensors: the first time that it computes anything.

It runs operation by operation on the host's CPU: compiling it whole would take longer than running
it ever does, and single operations stay compiled from one candidate to the next. How many are kept,
and how many different ones a program may have, is bounded: each takes 20 ms and 200 kB.
"""

import functools
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sdjax.sandbox.ir.calling_convention import CallingConvention
from sdjax.sandbox.ir.decode import Equation
from sdjax.sandbox.ir.primitives import CONTROL_FLOW
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import VerifiedProgram, bind, run
from sdjax.xla.compiler_options import quick_options

DEPTHS = (0.0, 1.0)  # the first and the last layer
MOST_KEPT = 2_048
MOST_DIFFERENT = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    task_vectors: tuple[Any, ...]
    base: Any
    host: list[list[np.ndarray]]  # the task vectors once more: [slot][leaf]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRun:
    """One of a program's array programs on its probe tensors."""

    name: Any
    inputs: Inputs
    depth: float
    used: set["Operation"]  # by all trials of the program


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An equation on operands of certain types, which other programs may have as well."""

    what: Any
    types: tuple[tuple[Any, Any], ...]  # shape and dtype of each operand
    max_loop_iterations: int
    equation: Equation = field(compare=False)


@functools.lru_cache(maxsize=MOST_KEPT)
def _compiled(operation: Operation) -> jax.stages.Compiled:
    def call(*operands: Any) -> Any:
        return bind(operation.equation, list(operands), operation.max_loop_iterations)

    types = [jax.ShapeDtypeStruct(*of) for of in operation.types]
    return jax.jit(call).lower(*types).compile(compiler_options=quick_options())


def _step(
    used: set[Operation], equation: Equation, operands: list[Any], max_loop_iterations: int
) -> Any:
    # Control flow holds a program of its own, and is the same as itself alone.
    same = equation if equation.name in CONTROL_FLOW else (equation.name, repr(equation.params))
    types = tuple((x.shape, x.dtype) for x in operands)
    operation = Operation(
        what=same, types=types, max_loop_iterations=max_loop_iterations, equation=equation
    )
    used.add(operation)
    if len(used) > MOST_DIFFERENT:
        message = f"the program has more than {MOST_DIFFERENT} different operations"
        raise Refusal("too costly", "operations", message)
    return _compiled(operation)(*operands)


def probe_runs(program: VerifiedProgram) -> list[ProbeRun]:
    """What is to be run: a tensor of each group (layout.plan), at either end of the depth."""
    found: list[ProbeRun] = []
    used: set[Operation] = set()
    for name in program.probes:
        inputs = _inputs(program.programs[name][0], name)
        depths = DEPTHS if "depth" in program.requests else DEPTHS[:1]
        found += [ProbeRun(name=name, inputs=inputs, depth=d, used=used) for d in depths]
    return found


@functools.lru_cache(maxsize=16)
def _inputs(convention: CallingConvention, name: Any) -> Inputs:
    """Task vectors as fine-tuning leaves them: bfloat16 differences, some of them exactly zero."""
    seed = int.from_bytes(hashlib.sha256(repr((name, convention)).encode()).digest()[:8], "big")
    draw = np.random.default_rng(seed)

    def tensor(shape: tuple[int, ...], scale: float, zeros: float) -> np.ndarray:
        values = draw.standard_normal(shape) * scale
        values = np.where(draw.random(shape) < zeros, 0.0, values)
        return values.astype(jax.numpy.bfloat16).astype(np.float32)

    common = [draw.random(shape) < 0.02 for shape in convention.shapes]  # zero for every expert
    host = [
        [
            np.where(zero, np.float32(0), tensor(shape, 0.01 * (1 + i), 0.05))
            for shape, zero in zip(convention.shapes, common, strict=True)
        ]
        for i in range(len(convention.slots))
    ]
    base = [tensor(shape, 0.05, 0.0) for shape in convention.shapes]
    put = jax.device_put
    return Inputs(
        task_vectors=tuple(put(convention.result(leaves)) for leaves in host),
        base=put(convention.result(base)),
        host=host,
    )


def execute_probe_run(
    program: VerifiedProgram, probe_run: ProbeRun, order: Sequence[int] | None = None
) -> list[np.ndarray]:
    """The result's leaves, with the experts in another order if one is given.

    Refusal where a leaf is not finite, where a loop does not end, and for what XLA objects to
    (only a forged message gets so far).
    """
    with _on_host():
        try:
            return _run(program, probe_run, order or range(len(probe_run.inputs.task_vectors)))
        except Refusal:
            raise
        except Exception as error:
            message = f"the array program cannot be run ({type(error).__name__})"
            raise Refusal("refused", "ir", message) from None


def _run(program: VerifiedProgram, probe_run: ProbeRun, order: Sequence[int]) -> list[np.ndarray]:
    convention, block = program.programs[probe_run.name]
    inputs = convention.pack(
        [probe_run.inputs.task_vectors[slot] for slot in order],
        probe_run.inputs.base,
        jax.random.key(0, impl="threefry2x32"),
        np.float32(probe_run.depth),
        [np.float32(value) for value in program.hyperparameters.values()],
    )
    outputs, exhausted = run(
        block, inputs, program.max_loop_iterations, functools.partial(_step, probe_run.used)
    )
    if exhausted is not None and bool(exhausted):
        limit = program.max_loop_iterations
        message = f"a `while` loop did not end within {limit} iterations on the probe tensors"
        raise Refusal("too costly", "loop-iterations", message)
    leaves = [np.asarray(leaf) for leaf in outputs]
    for leaf in leaves:
        if not np.isfinite(leaf).all():
            share = float(np.mean(~np.isfinite(leaf)))
            raise Refusal(
                "non-finite",
                "non-finite",
                f"{share:.2g} of the result is NaN or infinite on probe tensors that hold some"
                " zeros, as real task vectors do; guard divisions, logarithms and roots",
            )
    return leaves


def _on_host() -> AbstractContextManager:
    """The host's CPU, so that verdicts are the same beside any accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # a process that was started for its accelerator alone
        return nullcontext()
