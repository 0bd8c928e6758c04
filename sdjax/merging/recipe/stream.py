"""The steps of a plan carried out: read, merged and written at the same time.

While a tensor is merged, the next one is read and the last one is written. Memory holds a few
tensors of each model, whatever their number, and is used again and again. All programs are traced
before the first tensor, so that a method's mistake is told at once; each is compiled from then on,
beside the tracing of the others and the first tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sdjax.core.errors import UserError
from sdjax.io.buffer_pool import BufferPool
from sdjax.io.resumable_writer import ResumableFolder
from sdjax.io.safetensors_writer import is_finite
from sdjax.merging.compile_cache import compile_for_single_use
from sdjax.merging.engine import default_slots
from sdjax.merging.recipe.plan import MergePlan, MergeStep
from sdjax.merging.recipe.vocabulary import Vocabulary, align
from sdjax.merging.tensor_program import TensorProgram
from sdjax.sharding.mesh import make_mesh

COMPILERS = 2  # programs compiled at a time
AHEAD = 1  # tensors that wait to be merged, and to be written
# Tensors merged at a time on one device: XLA on a CPU divides by far not all of a program among the
# cores. On several devices, two programs at once could wait for each other's halves.
MERGED = 2

OnTensor = Callable[[int, int, str], None]
R = TypeVar("R")


def output_specs(plan: MergePlan, vocabulary: Vocabulary | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Name to shape and dtype of every tensor of the result, in the order of the plan."""
    return {
        step.name: jax.ShapeDtypeStruct(_shape(step, vocabulary), step.dtype) for step in plan.steps
    }


def merge_steps(
    plan: MergePlan,
    vocabulary: Vocabulary | None,
    writer: ResumableFolder,
    key: jax.Array | None,
    on_tensor: OnTensor | None,
) -> int:
    """Merge what the writer does not have yet; how many tensors no expert had changed.

    vocabulary: how rows are matched, where they have to be. key: for methods that draw.
    Raises UserError for a method that does not trace, a result that is not finite, and a damaged
    file.
    """
    steps = [step for step in plan.steps if step.name not in writer.done]
    together = MERGED if len(jax.devices()) == 1 else 1
    memory = BufferPool()

    def read(step: MergeStep) -> list[np.ndarray]:
        with np.errstate(over="ignore"):
            arrays = [one.model.tensors.read(one.name, memory.acquire) for one in step.everything]
        if vocabulary is None or not step.vocabulary:
            return arrays
        rows = [vocabulary.rows[one.model.name] for one in step.everything]
        aligned = align(arrays, rows, vocabulary.size, step.anchor)
        memory.release(arrays)
        return aligned

    def merge(step: MergeStep, arrays: list[np.ndarray]) -> tuple[MergeStep, np.ndarray, bool]:
        as_it_was = _unchanged(step, arrays)
        if as_it_was:
            with np.errstate(over="ignore"):
                new = arrays[0].astype(step.dtype, copy=False)
        else:
            new = np.asarray(_compute(step, arrays, *programs[step.name]))
        # Not in the program, which would store what is merged in float32 to measure it.
        if not is_finite(new):
            raise not_finite(step, arrays)
        memory.release(array for array in arrays if array is not new)
        return step, new, as_it_was

    def put(step: MergeStep, new: np.ndarray, as_it_was: bool) -> tuple[str, bool]:
        writer.write(step.name, new)
        memory.release([new])
        return step.name, as_it_was

    unchanged, done = 0, len(plan.steps) - len(steps)
    compiler = ThreadPoolExecutor(max_workers=COMPILERS)
    try:
        programs = _compiled(steps, plan, vocabulary, key, compiler)
        arrays = _ahead(read, ((step,) for step in steps), ahead=AHEAD)
        pairs = zip(steps, arrays, strict=True)
        merged = _ahead(merge, pairs, threads=together, ahead=together - 1)
        for name, as_it_was in _ahead(put, merged, ahead=AHEAD):
            unchanged += as_it_was
            done += 1
            if on_tensor is not None:
                on_tensor(done, len(plan.steps), name)
    finally:
        compiler.shutdown(cancel_futures=True)
    return unchanged


def _compiled(
    steps: Sequence[MergeStep],
    plan: MergePlan,
    vocabulary: Vocabulary | None,
    key: jax.Array | None,
    compiler: ThreadPoolExecutor,
) -> dict[str, tuple[tuple, Future[jax.stages.Compiled]]]:
    """The program of every step that has one, each traced and compiled once."""
    wanted = {}
    for step in steps:
        if step.algorithm is None:
            continue
        aligned = vocabulary is not None and step.vocabulary
        dtypes = [one.model.tensors.dtype(one.name) for one in step.everything]
        shape = _shape(step, vocabulary)
        leaves = [
            jax.ShapeDtypeStruct(
                shape,
                jnp.result_type(*dtypes) if aligned else dtype,
                sharding=_sharding(shape),
            )
            for dtype in dtypes
        ]
        base, experts = (leaves[0], leaves[1:]) if step.base else (None, leaves)
        wanted[step.name] = TensorProgram.of(
            step.algorithm,
            plan.slots or default_slots(len(experts)),
            base,
            tuple(experts),
            path=step.path,
            num_layers=plan.num_layers,
            key=key,
            dtype=step.dtype,
        )
    distinct = {program.cache_key: program for program in wanted.values()}
    programs = {
        cache_key: compiler.submit(compile_for_single_use, program.lower())
        for cache_key, program in distinct.items()
    }
    return {name: (program.inputs, programs[program.cache_key]) for name, program in wanted.items()}


def _compute(
    step: MergeStep,
    arrays: list[np.ndarray],
    inputs: tuple,
    executable: Future[jax.stages.Compiled],
) -> jax.Array:
    """The new tensor, under way on the device."""
    placed = [jax.device_put(array, _sharding(array.shape)) for array in arrays]
    base, experts = (placed[0], placed[1:]) if step.base else (None, placed)
    new, _ = executable.result()(base, tuple(experts), *inputs, None)
    return new


def not_finite(step: MergeStep, arrays: Sequence[np.ndarray]) -> UserError:
    """The error of a step whose result is not finite: the model's, if one is to blame.

    arrays: of ``step.everything``.
    """
    for one, array in zip(step.everything, arrays, strict=True):
        if not is_finite(array):
            return UserError(
                f"{one.model.name}: the tensor {one.name} has a NaN or an infinity; copy the model "
                "again, or leave it out"
            )
    name = "the merge" if step.algorithm is None else step.algorithm.name
    return UserError(f"{name}: the merged tensor {step.name} is not finite in {step.dtype.name}")


def _shape(step: MergeStep, vocabulary: Vocabulary | None) -> tuple[int, ...]:
    if vocabulary is None or not step.vocabulary:
        return step.shape
    return (vocabulary.size, *step.shape[1:])


@cache
def _sharding(shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Every tensor is spread over all devices along its first axis that they divide."""
    devices = jax.devices()
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    mesh = make_mesh({"fsdp": len(devices)})
    for axis, size in enumerate(shape):
        if size % len(devices) == 0:
            return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))
    return NamedSharding(mesh, PartitionSpec())


def _unchanged(step: MergeStep, arrays: Sequence[np.ndarray]) -> bool:
    """Whether the result is the first of the arrays, since that is all or nobody changed it."""
    if step.algorithm is None or not step.base:
        return step.algorithm is None
    # Bytes, not values: bfloat16 has no fast comparison in NumPy. Most differ at once.
    first, *others = (array.reshape(-1).view(np.uint8) for array in arrays)
    return all(array.dtype == arrays[0].dtype for array in arrays) and all(
        np.array_equal(first[:4096], other[:4096]) and np.array_equal(first, other)
        for other in others
    )


def _ahead(
    function: Callable[..., R], items: Iterable[tuple], *, threads: int = 1, ahead: int
) -> Iterator[R]:
    """itertools.starmap, in threads that are ``ahead`` items ahead of the one that takes the
    results.
    """
    pool = ThreadPoolExecutor(max_workers=threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
