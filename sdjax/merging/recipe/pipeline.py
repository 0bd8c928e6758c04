"""Disk-to-disk merge into a complete Hugging Face folder.

While one tensor is merged, the next is read and the previous one is written. Memory holds a few
tensors per model, in buffers that are reused. All computations are traced before the first tensor,
so that an error in a method is reported at once; they are compiled in the background from then on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from sdjax import __version__
from sdjax.core.errors import TransientError, UserError
from sdjax.core.storage_errors import storage_errors
from sdjax.io.atomic_write import resolve_new_folder
from sdjax.io.buffer_pool import BufferPool
from sdjax.io.resumable_writer import ResumableFolder
from sdjax.io.safetensors_writer import MAX_FILE_BYTES, is_finite
from sdjax.io.tensor_reader import narrowed
from sdjax.merging.recipe import output_files
from sdjax.merging.recipe.expert_statistics import StepStatistics
from sdjax.merging.recipe.fused_experts import read_fused, split_fused
from sdjax.merging.recipe.model_card import RECIPE, Provenance, write_model_card
from sdjax.merging.recipe.plan import MergePlan, MergeStep, tensor_sharding
from sdjax.merging.recipe.recipe_method import LoadProgram, find_method
from sdjax.merging.recipe.recipe_plan import plan_recipe
from sdjax.merging.recipe.recipe_reader import read_recipe
from sdjax.merging.recipe.schema import Recipe
from sdjax.merging.recipe.source_models import open_source_model
from sdjax.merging.recipe.tokenizer_plan import align_rows
from sdjax.merging.tensor_program import TensorProgram
from sdjax.sharding.memory import exhaustion_reported, require_fit
from sdjax.xla.compiler_options import compile_for_single_use

COMPILE_THREADS = 2
_RESUME = "run the command again, which resumes the merge"
QUEUE_SIZE = 1  # tensors queued to be merged, and to be written
# Tensors merged at a time on a single device: on a CPU, XLA runs only part of an executable on all
# cores. On several devices, two executables at once could deadlock in their collectives.
MERGE_THREADS = 2

OnTensor = Callable[[int, int], None]
"""Called with (tensors done, all tensors), at the beginning and after each tensor."""

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """Result of a merge to disk.

    Attributes:
        folder: the folder of the result.
        tensors: number of tensors in the result.
        coverage: how many tensors were merged, and how many copied.
        unchanged: number of tensors that this attempt copied, since they are outside the scope or
            no expert had changed them.
        resumed: number of tensors that an interrupted attempt had written.
        bytes: size of all tensors.
        notes: remarks for the user.
    """

    folder: Path
    tensors: int
    coverage: str
    unchanged: int
    resumed: int
    bytes: int
    notes: tuple[str, ...]


def merge_recipe(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    allow_crimes: bool = False,
    load_program: LoadProgram | None = None,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> MergeResult:
    """Merge models as described by a recipe (mergekit's YAML).

    The result appears under its name only when it is complete; an interrupted merge resumes when it
    is called again. A tensor's random key depends on the seed and the tensor's path alone, so a
    streamed merge gives the same result as one in memory.

    Args:
        recipe: the recipe, or its file; its paths are relative to its folder or the working
            directory.
        out: folder of the result.
        seed: random seed.
        allow_crimes: merge models of different architectures.
        load_program: has the program file judged that is a recipe's method.
        on_tensor: called with (tensors done, total) at the beginning and after each tensor.
        max_file_bytes: maximum size of a safetensors file.
        overwrite: replace `out` if it exists.

    Raises:
        UserError: an invalid recipe, missing or damaged models, models that do not match or have
            different architectures, a result that is not finite, or an `out` that exists.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    resolve_new_folder(Path(out), overwrite=overwrite)  # before models are opened
    path, architectures = recipe.path, recipe.architectures
    open_model = cache(
        lambda name: open_source_model(name, path.parent, architecture=architectures.get(name))
    )
    method, program = find_method(recipe, open_model, load_program)
    plan = plan_recipe(recipe, method, open_model, seed, allow_crimes=allow_crimes)
    return write_merged(
        plan,
        Path(out),
        provenance=Provenance(
            method=recipe.merge_method, file=RECIPE, text=recipe.text, seed=seed, program=program
        ),
        chat_template=output_files.resolve_chat_template(recipe, plan.models),
        on_tensor=on_tensor,
        max_file_bytes=max_file_bytes,
        overwrite=overwrite,
    )


def write_merged(
    plan: MergePlan,
    out: Path,
    *,
    provenance: Provenance,
    chat_template: str | None = None,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> MergeResult:
    """Write the model that a plan describes.

    Args:
        plan: the plan.
        out: folder of the result.
        provenance: recorded in the model card.
        chat_template: replaces the tokenizer's chat template.
        on_tensor: called with (tensors done, total) at the beginning and after each tensor.
        max_file_bytes: maximum size of a safetensors file.
        overwrite: replace `out` if it exists.

    Raises:
        UserError: as in `merge_recipe`.
    """
    notes = (*plan.notes, *output_files.dropped(plan, chat_template))
    plan = dataclasses.replace(plan, notes=notes)
    specs = plan.tensors
    fingerprint = _fingerprint(plan, provenance, chat_template)
    inputs = {folder.resolve() for model in plan.models for folder in model.reader.folders}
    if overwrite and out.resolve() in inputs:
        raise UserError(f"{out}: is one of the merged models; choose another folder")
    writer = ResumableFolder(
        out,
        specs,
        fingerprint=fingerprint,
        max_file_bytes=max_file_bytes,
        overwrite=overwrite,
    )
    resumed = len(writer.done)
    try:
        with storage_errors(out, then=_RESUME):
            # Small files first: one may be damaged, and tensors take a long time.
            output_files.write_config(writer.folder, plan, specs)
            output_files.write_tokenizer(
                writer.folder, plan.tokenizer, plan.template.folder, chat_template
            )
            write_model_card(writer.folder, out.name, plan, provenance)
            unchanged = _write_tensors(plan, writer, on_tensor)
            size = writer.bytes
            writer.finish()
    except TransientError:
        raise
    except UserError:
        writer.discard()  # a second attempt would fail in the same way
        raise
    finally:
        writer.close()
    return MergeResult(
        folder=out,
        tensors=len(specs),
        coverage=plan.coverage,
        unchanged=unchanged,
        resumed=resumed,
        bytes=size,
        notes=plan.notes,
    )


def _write_tensors(plan: MergePlan, writer: ResumableFolder, on_tensor: OnTensor | None) -> int:
    """Merge the tensors that are not written yet; return the number that were only copied."""
    members = {step.name: [name for names in step.members for name in names] for step in plan.steps}
    steps = [
        step for step in plan.steps if not writer.done.issuperset(members[step.name] or [step.name])
    ]
    merge_threads = MERGE_THREADS if len(jax.devices()) == 1 else 1
    pool = BufferPool()

    def read(step: MergeStep) -> list[np.ndarray]:
        if step.array is not None:
            return [step.array]
        with np.errstate(over="ignore"):
            if step.members:
                return [read_fused(ref) for ref in step.sources]
            arrays = [ref.model.reader.read(ref.name, pool.acquire) for ref in step.sources]
        if step.alignment is None:
            return arrays
        aligned = align_rows(arrays, step.alignment)
        pool.release(arrays)
        return aligned

    def merge(step: MergeStep, arrays: list[np.ndarray]) -> tuple[MergeStep, np.ndarray, bool]:
        # Bytes, since NumPy compares bfloat16 slowly; most arrays differ near the beginning.
        views = [array.reshape(-1).view(np.uint8) for array in arrays]
        unchanged = step.program is None or (
            step.has_base
            and all(array.dtype == arrays[0].dtype for array in arrays)
            and all(np.array_equal(v[:n], views[0][:n]) for n in (4096, None) for v in views[1:])
        )
        if step.program is None or unchanged:
            with np.errstate(over="ignore"):
                new = arrays[0].astype(step.spec.dtype, copy=False)
        else:
            with np.errstate(over="ignore"):
                floats = [array.astype(narrowed(array.dtype), copy=False) for array in arrays]
            placed = [jax.device_put(array, tensor_sharding(array.shape)) for array in floats]
            base, experts = (placed[0], placed[1:]) if step.has_base else (None, placed)
            executable = executables[step.program.cache_key].result()
            inputs = _with_statistics(step.program.inputs, step.statistics)
            with exhaustion_reported():
                result, _ = executable(base, tuple(experts), *inputs, None)
                new = np.asarray(result).astype(step.spec.dtype, copy=False)
        # Not part of the executable, which would store the result in float32 to measure it.
        if not is_finite(new):
            raise not_finite(step, arrays)
        pool.release(array for array in arrays if array is not new)
        return step, new, unchanged

    def write(step: MergeStep, new: np.ndarray, unchanged: bool) -> bool:
        if step.members:
            for name, tensor in split_fused(step.members, new):
                writer.write(name, tensor)
        else:
            writer.write(step.name, new)
        pool.release([new])
        return unchanged

    num_unchanged, done = 0, len(plan.steps) - len(steps)
    if on_tensor is not None:
        on_tensor(done, len(plan.steps))
    compiler = ThreadPoolExecutor(max_workers=COMPILE_THREADS)
    try:
        executables = _compile((step.program for step in steps if step.program), compiler)
        arrays = _prefetch(read, ((step,) for step in steps), queue_size=QUEUE_SIZE)
        merged = _prefetch(
            merge,
            zip(steps, arrays, strict=True),
            threads=merge_threads,
            queue_size=merge_threads - 1,
        )
        for unchanged in _prefetch(write, merged, queue_size=QUEUE_SIZE):
            num_unchanged += unchanged
            done += 1
            if on_tensor is not None:
                on_tensor(done, len(plan.steps))
    finally:
        compiler.shutdown(cancel_futures=True)
    return num_unchanged


def _with_statistics(inputs: tuple[Any, ...], statistics: StepStatistics) -> tuple[Any, ...]:
    """Return the inputs of a program, with the statistics read from their files."""
    if not any(statistics.values()):
        return inputs
    read = {
        kind: refs and tuple(jax.device_put(ref.read(), tensor_sharding(ref.shape)) for ref in refs)
        for kind, refs in statistics.items()
    }
    return (*inputs[:-1], read)


def _compile(
    programs: Iterable[TensorProgram], compiler: ThreadPoolExecutor
) -> dict[tuple, Future[jax.stages.Compiled]]:
    """Trace every distinct computation and start compiling it; return cache key to executable."""

    def compile_one(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        with exhaustion_reported():
            executable = compile_for_single_use(lowered)
        require_fit(executable)
        return executable

    distinct = {program.cache_key: program for program in programs}
    return {
        cache_key: compiler.submit(compile_one, program.lower())
        for cache_key, program in distinct.items()
    }


def not_finite(step: MergeStep, arrays: Sequence[np.ndarray]) -> UserError:
    """Return the error for a result that is not finite, naming the model at fault, if any.

    Args:
        step: the step.
        arrays: the values of its sources.
    """
    for ref, array in zip(step.sources, arrays, strict=True):
        if not is_finite(array):
            return UserError(
                f"{ref.model.name}: the tensor {ref.name} contains NaN or infinity; copy the model "
                "again, or leave it out"
            )
    name = "the merge" if step.algorithm is None else step.algorithm.name
    return UserError(
        f"{name}: the merged tensor {step.name} is not finite in {step.spec.dtype.name}"
    )


def _fingerprint(plan: MergePlan, provenance: Provenance, chat_template: str | None) -> str:
    """Return a hash of everything that determines the result; only the same merge is resumed."""
    content = {
        "versions": (__version__, jax.__version__),
        "text": provenance.text,
        "key": None if plan.key is None else np.asarray(jax.random.key_data(plan.key)).tolist(),
        "chat_template": chat_template,
        "models": [
            (model.name, [output_files.file_stats(folder) for folder in model.reader.folders])
            for model in plan.models
        ],
        "slots": plan.slots,
        "statistics": [output_files.file_stats(folder) for folder in _statistics_folders(plan)],
        "tokenizer": output_files.file_stats(plan.tokenizer.folder),
        "steps": [
            {
                "tensor": (step.name, step.path, step.spec.shape, step.spec.dtype.name),
                "base": step.has_base,
                "sources": [(ref.model.name, ref.name, ref.members) for ref in step.sources],
                "algorithm": step.algorithm
                and (step.algorithm.identity, dict(step.algorithm.hyperparameters)),
                "rows": step.alignment is not None,
                "statistics": {
                    kind: refs and [(str(ref.folder.folder), ref.name) for ref in refs]
                    for kind, refs in step.statistics.items()
                },
                "merged": None if step.array is None else _digest(step.array),
            }
            for step in plan.steps
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _statistics_folders(plan: MergePlan) -> list[Path]:
    refs = (refs or () for step in plan.steps for refs in step.statistics.values())
    return sorted({ref.folder.folder for group in refs for ref in group})


def _prefetch(
    function: Callable[..., R], items: Iterable[tuple], *, threads: int = 1, queue_size: int
) -> Iterator[R]:
    """Yield function(*item) in order, computed in threads up to `queue_size` items ahead."""
    pool = ThreadPoolExecutor(max_workers=threads)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, *item))
            if len(pending) > queue_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
