"""`sdjax merge`: a recipe carried out, tensor by tensor, into a complete Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sdjax.errors import UserError
from sdjax.merging.engine import TensorProgram, default_slots, leaf_key_data
from sdjax.merging.programs import Programs
from sdjax.merging.recipe import Plan, plan, read_recipe
from sdjax.merging.sources import Source, check_match
from sdjax.models.spec import LAYER_TENSORS, depth_of, kind_of

SHARD_BYTES = 4 * 2**30
RECIPE_NAME = "recipe.yaml"

# What a model folder needs beside its weights, copied from the base (or the first model).
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result: its folder, how many tensors it has, how many no expert had changed, its size."""

    folder: Path
    tensors: int
    unchanged: int
    bytes: int


def merge_recipe(
    recipe_path: Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    on_tensor: Callable[[int, int, str], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Merge by a recipe (mergekit's YAML) into the folder ``out``.

    Memory holds one tensor of each model and one shard of the result. ``out`` appears under its
    name only when it is complete. Paths in the recipe are relative to its folder, else to the
    working directory. seed: for methods that draw random numbers; a tensor's key comes from it and
    the tensor's path, as in ``sdjax.merging.engine``, so that streamed and in memory are the same.
    on_tensor: called with (done, total, name) after each tensor.

    Raises UserError for a bad recipe, a missing folder, tensors that do not match, a file cut
    short, a result that is not finite, and an ``out`` that exists already.
    """
    recipe_path, out = Path(recipe_path), Path(out)
    steps = plan(read_recipe(recipe_path))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not empty; name another folder")
    base = _open(steps.base, recipe_path) if steps.base is not None else None
    experts = [_open(model, recipe_path) for model in steps.experts]
    reference = base or experts[0]
    for expert in experts:
        check_match(reference, expert)
    template = _folder(steps.template, recipe_path)
    config = _config(template, steps.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        leaves = _merged(steps, base, experts, seed, on_tensor)
        tensors, unchanged, size = _write_weights(work, leaves, shard_bytes)
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in _COMPANIONS:
            if (template / name).exists():
                shutil.copyfile(template / name, work / name)
        shutil.copyfile(recipe_path, work / RECIPE_NAME)
        work.chmod(0o755)
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Written(folder=out, tensors=tensors, unchanged=unchanged, bytes=size)


def _merged(
    steps: Plan,
    base: Source | None,
    experts: list[Source],
    seed: int,
    on_tensor: Callable[[int, int, str], None] | None,
) -> Iterable[tuple[str, np.ndarray, bool]]:
    """(name, tensor, whether no expert had changed it), in order of name."""
    algorithm, slots = steps.algorithm, default_slots(len(experts))
    reference = base or experts[0]
    programs, arguments = Programs(), algorithm.arguments(slots)
    key = jax.random.key(seed)
    num_layers = 1 + max((_layer(name) for name in reference.names), default=0)
    for done, name in enumerate(reference.names, start=1):
        at = None if base is None else base.read(name)
        values = [expert.read(name) for expert in experts]
        like = values[0] if at is None else at
        dtype = jnp.dtype(steps.dtype) if steps.dtype else like.dtype
        if not jnp.issubdtype(like.dtype, jnp.floating):
            yield name, like, True
        elif at is not None and all(_same(at, value) for value in values):
            yield name, at.astype(dtype), True
        else:
            path = tensor_path(name)
            leaf = None if at is None else jnp.asarray(at)
            program = TensorProgram.of(
                algorithm,
                slots,
                leaf,
                arrays := tuple(jnp.asarray(value) for value in values),
                kind=kind_of(path) if "kind" in algorithm.requests else None,
                key=key,
                dtype=dtype,
            )
            depth = (
                np.float32(depth_of(path, num_layers)) if "depth" in algorithm.requests else None
            )
            data = leaf_key_data(key, path) if "key" in algorithm.requests else None
            (compiled,) = programs.get([program])
            new, square = compiled(leaf, arrays, arguments, depth, data)
            if not np.isfinite(square):
                raise UserError(f"{algorithm.name}: the merged tensor {name} is not finite")
            yield name, np.asarray(new), False
        if on_tensor is not None:
            on_tensor(done, len(reference.names), name)


def _write_weights(
    folder: Path, leaves: Iterable[tuple[str, np.ndarray, bool]], shard_bytes: int
) -> tuple[int, int, int]:
    """Write shards as they fill up, and the index; (tensors, unchanged, bytes)."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    tensors = unchanged = size = pending_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, leaf, same in leaves:
        if pending and pending_bytes + leaf.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        # save_file writes the buffer as it lies in memory.
        pending[name] = np.ascontiguousarray(leaf)
        pending_bytes += leaf.nbytes
        tensors, unchanged, size = tensors + 1, unchanged + same, size + leaf.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return tensors, unchanged, size
    where = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}", folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return tensors, unchanged, size


_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_IN_LAYER = {hf_name: name for name, (hf_name, _) in LAYER_TENSORS.items()}
_OUTSIDE = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}


def tensor_path(name: str) -> str:
    """Our path of a tensor in Hugging Face's name; an unknown name is its own path."""
    match = _HF_LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return f"layers/{match[1]}/{_IN_LAYER[match[2]]}"
    return _OUTSIDE.get(name, name)


def _layer(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else 0


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    # Bytes, not values: bfloat16 has no fast comparison in NumPy.
    first, second = (x.reshape(-1).view(np.uint8) for x in (a, b))
    return a.dtype == b.dtype and bool(np.array_equal(first, second))


def _folder(model: str, recipe_path: Path) -> Path:
    beside = recipe_path.parent / model
    folder = beside if beside.is_dir() else Path(model)
    if not folder.is_dir():
        raise UserError(
            f"{recipe_path}: no model folder {model} beside the recipe or in {Path.cwd()}"
        )
    return folder


def _open(model: str, recipe_path: Path) -> Source:
    return Source(_folder(model, recipe_path))


def _config(folder: Path, dtype: str | None) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); every model needs one") from error
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config
