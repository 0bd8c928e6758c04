"""`sdjax merge`: a plan carried out, tensor by tensor, into a complete Hugging Face folder.

Reading, computing and writing go on at the same time: while a tensor is merged, the next one is
read and the last one is written. Memory holds a few tensors of each model, whatever their number.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sdjax import __version__
from sdjax.errors import UserError
from sdjax.io.resumable import ResumableFolder
from sdjax.merging import outputs
from sdjax.merging.checkpoints import open_checkpoint
from sdjax.merging.engine import default_slots
from sdjax.merging.lowering import TensorProgram, leaf_key_data
from sdjax.merging.method import Method
from sdjax.merging.outputs import RECIPE, Origin
from sdjax.merging.plan import Plan, Step, plan_recipe
from sdjax.merging.programs import Programs
from sdjax.merging.recipe import read_recipe
from sdjax.merging.tokens import TokenizerPlan, plan_tokenizer
from sdjax.merging.vocabulary import Vocabulary, align
from sdjax.models.spec import depth_of, kind_of
from sdjax.sharding.mesh import make_mesh

MAX_FILE_BYTES = 5_000_000_000  # as transformers splits
AHEAD = 2  # tensors that are read, and that are written, while one is computed

OnTensor = Callable[[int, int, str], None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result: its folder, how many tensors it has, how many no expert had changed, how many
    an interrupted attempt had left, its size, and what the user is to be told."""

    folder: Path
    tensors: int
    unchanged: int
    resumed: int
    bytes: int
    notes: tuple[str, ...]


def merge_recipe(
    recipe_path: Path | str,
    out: Path | str,
    methods: Mapping[str, Method],
    *,
    seed: int = 0,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Written:
    """Merge by a recipe (mergekit's YAML) into the folder ``out``.

    ``out`` appears under its name only when it is complete; an interrupted merge goes on where it
    stopped when it is called again. Paths in the recipe are relative to its folder, else to the
    working directory. methods: by name. seed: for methods that draw random numbers; a tensor's key
    comes from it and the tensor's path, as in ``sdjax.merging.engine``, so that streamed and in
    memory are the same. on_tensor: called with (done, total, name) after each tensor.

    Raises UserError for a bad recipe, a missing folder, tensors that do not match, a file cut
    short, a result that is not finite, and an ``out`` that exists already.
    """
    recipe = read_recipe(Path(recipe_path))
    opened = cache(lambda name: open_checkpoint(name, recipe.path.parent))
    plan = plan_recipe(recipe, methods, opened)
    chat_template = None
    if recipe.chat_template is not None:
        chat_template = outputs.find_chat_template(recipe.chat_template, plan.models, recipe.path)
    return write_merged(
        plan,
        Path(out),
        origin=Origin(method=recipe.merge_method, file=RECIPE, text=recipe.text),
        tokenizer=plan_tokenizer(plan.template, plan.models, recipe.tokenizer, opened),
        chat_template=chat_template,
        key=jax.random.key(seed),
        on_tensor=on_tensor,
        max_file_bytes=max_file_bytes,
    )


def write_merged(
    plan: Plan,
    out: Path,
    *,
    origin: Origin,
    key: jax.Array,
    tokenizer: TokenizerPlan | None = None,
    chat_template: str | None = None,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Written:
    """Carry out a plan; see ``merge_recipe``. key: for methods that draw random numbers."""
    if tokenizer is None:
        tokenizer = TokenizerPlan(folder=plan.template.folder, new={}, vocabulary=None)
    vocabulary = tokenizer.vocabulary
    announced = {step.name: _announced(step, vocabulary) for step in plan.steps}
    fingerprint = _fingerprint(plan, origin, key, chat_template, announced)
    writer = ResumableFolder(out, announced, fingerprint=fingerprint, max_file_bytes=max_file_bytes)
    resumed = len(writer.done)
    try:
        todo = [step for step in plan.steps if step.name not in writer.done]
        unchanged = _merge_steps(
            todo, plan, vocabulary, writer, announced, key, on_tensor, len(plan.steps)
        )
        outputs.write_config(
            writer.folder,
            plan.template,
            num_layers=plan.num_layers,
            names=list(announced),
            dtype=plan.dtype,
            vocabulary=None if vocabulary is None else vocabulary.size,
        )
        outputs.write_tokenizer(
            writer.folder,
            tokenizer.folder,
            plan.template.folder,
            new=tokenizer.new,
            chat_template=chat_template,
        )
        names = [model.name for model in plan.models]
        outputs.write_card(
            writer.folder,
            out.name,
            origin=origin,
            models=names,
            notes=tokenizer.notes,
        )
        size = writer.bytes
        writer.finish()
    except UserError:
        writer.discard()  # trying again would end the same way
        raise
    finally:
        writer.close()
    return Written(
        folder=out,
        tensors=len(plan.steps),
        unchanged=unchanged,
        resumed=resumed,
        bytes=size,
        notes=tokenizer.notes,
    )


def _merge_steps(
    steps: Sequence[Step],
    plan: Plan,
    vocabulary: Vocabulary | None,
    writer: ResumableFolder,
    announced: Mapping[str, jax.ShapeDtypeStruct],
    key: jax.Array,
    on_tensor: OnTensor | None,
    total: int,
) -> int:
    """Merge and write; how many tensors no expert had changed."""
    programs = Programs(capacity=1024)
    unchanged, done = 0, total - len(steps)

    def read(step: Step) -> list[np.ndarray]:
        return _read(step, vocabulary)

    def put(step: Step, new: Any, square: Any) -> str:
        if square is not None and not np.isfinite(square):
            assert step.algorithm is not None
            raise UserError(f"{step.algorithm.name}: the merged tensor {step.name} is not finite")
        writer.write(step.name, np.asarray(new))
        return step.name

    def computed() -> Iterator[tuple[Step, Any, Any]]:
        nonlocal unchanged
        for step, arrays in zip(steps, _ahead(read, steps), strict=True):
            dtype = announced[step.name].dtype
            if step.algorithm is None or (step.base and _all_same(arrays)):
                unchanged += 1
                yield step, arrays[0].astype(dtype, copy=False), None
            else:
                yield step, *_compute(step, arrays, plan, programs, key, dtype)

    for name in _ahead(lambda item: put(*item), computed()):
        done += 1
        if on_tensor is not None:
            on_tensor(done, total, name)
    return unchanged


def _compute(
    step: Step,
    arrays: list[np.ndarray],
    plan: Plan,
    programs: Programs,
    key: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """The new tensor and the square that says whether it is finite, under way on the device."""
    algorithm = step.algorithm
    assert algorithm is not None
    placed = [jax.device_put(array, _sharding(array.shape)) for array in arrays]
    base, experts = (placed[0], placed[1:]) if step.base else (None, placed)
    slots = plan.slots or default_slots(len(experts))
    program = TensorProgram.of(
        algorithm,
        slots,
        base,
        tuple(experts),
        kind=kind_of(step.path) if "kind" in algorithm.requests else None,
        key=key,
        dtype=dtype,
    )
    (compiled,) = programs.get([program])
    depth = data = None
    if "depth" in algorithm.requests:
        depth = np.float32(depth_of(step.path, plan.num_layers))
    if "key" in algorithm.requests:
        data = leaf_key_data(key, step.path)
    return compiled(base, tuple(experts), algorithm.arguments(slots), depth, data, None)


def _read(step: Step, vocabulary: Vocabulary | None) -> list[np.ndarray]:
    arrays = [one.model.tensors.read(one.name) for one in step.everything]
    if vocabulary is None or not step.vocabulary:
        return arrays
    rows = [vocabulary.rows[one.model.name] for one in step.everything]
    return align(arrays, rows, vocabulary.size, step.anchor)


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


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """map, in a thread that is up to AHEAD items ahead of the one that takes the results."""
    pool = ThreadPoolExecutor(max_workers=1)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _announced(step: Step, vocabulary: Vocabulary | None) -> jax.ShapeDtypeStruct:
    shape = step.shape
    if vocabulary is not None and step.vocabulary:
        shape = (vocabulary.size, *shape[1:])
    return jax.ShapeDtypeStruct(shape, step.dtype)


def _all_same(arrays: Sequence[np.ndarray]) -> bool:
    # Bytes, not values: bfloat16 has no fast comparison in NumPy. Most differ at once.
    first, *others = (array.reshape(-1).view(np.uint8) for array in arrays)
    return all(array.dtype == arrays[0].dtype for array in arrays) and all(
        np.array_equal(first[:4096], other[:4096]) and np.array_equal(first, other)
        for other in others
    )


def _fingerprint(
    plan: Plan,
    origin: Origin,
    key: jax.Array,
    chat_template: str | None,
    announced: Mapping[str, jax.ShapeDtypeStruct],
) -> str:
    """What an interrupted merge must have in common with the one that goes on with it."""
    told = {
        "version": __version__,
        "text": origin.text,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "chat_template": chat_template,
        "models": {model.name: outputs.facts(model.folder) for model in plan.models},
        "tensors": {name: (one.shape, one.dtype.name) for name, one in announced.items()},
        "algorithms": sorted({s.algorithm.identity for s in plan.steps if s.algorithm}),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
