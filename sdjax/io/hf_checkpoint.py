"""Models as Hugging Face folders: config.json and safetensors, one file or a sharded index.

Reading goes tensor by tensor and, on a mesh, shard by shard: a process reads the bytes of its own
devices and no others, and holds little more than it keeps. Writing goes tensor by tensor too, into
a folder that appears whole or not.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.io.peft import AdaptedFolder
from sdjax.io.safetensors_reader import CONFIG, INDEX, PIECE, SINGLE, TensorFolder, read_json
from sdjax.io.safetensors_writer import (
    CODES,
    HF_DTYPES,
    file_parts,
    is_finite,
    sync_folder,
    write_bytes,
    write_text,
)
from sdjax.models.config import ModelConfig
from sdjax.models.hf_config import from_hf, to_hf
from sdjax.models.params import ParamSpec, param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.sharding.rules import sharding_of

MAX_FILE_BYTES = 5_000_000_000  # as transformers splits

# Files beside the weights that belong to the tokenizer or to generation.
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# Buffers that old checkpoints of the Llama family carry; they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_TIED = "lm_head.weight"


class ModelReader:
    """A model folder, checked by its headers and read tensor by tensor.

    With `adapter`, the folder of a PEFT adapter for it, that is added to the weights as they are
    read.

    Attributes:
        folder: where the model lies.
        config: its description.
        specs: path to specification of every tensor.

    Raises:
        UserError: on construction: no folder, no config, no safetensors, a file that is cut short,
            a tensor that is missing or surplus, a tied model with an output matrix of its own, or
            an adapter that is not supported or for another model.
    """

    def __init__(self, folder: str | Path, *, adapter: Path | None = None):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.specs = param_specs(self.config)
        stored = TensorFolder(self.folder)
        self._tensors = stored if adapter is None else AdaptedFolder(stored, adapter)
        self._check_names()

    def read(self, path: str, *, dtype: Any = None, mesh: Mesh | None = None) -> jax.Array:
        """One tensor in its stored dtype or cast to `dtype`, on the default device or a mesh.

        Raises:
            UserError: a path that the model does not have, a wrong shape, an unsupported dtype, a
                number that is not finite.
        """
        if path not in self.specs:
            raise UserError(
                f"{self.folder}: the model has no tensor {path!r}; "
                "use models of one architecture and size"
            )
        spec = self.specs[path]
        self._check_shape(spec)
        kept = self._tensors.dtype(spec.hf_name) if dtype is None else np.dtype(dtype)

        # Replicas ask for the same box again.
        @functools.cache
        def read_box(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
            box = self._tensors.read_box(spec.hf_name, tuple(slice(*pair) for pair in bounds))
            if not is_finite(box):
                raise UserError(
                    f"{self._tensors.where(spec.hf_name)} has a NaN or an infinity; copy the file "
                    "again, or use a checkpoint that is whole"
                )
            return box.astype(kept, copy=False)

        def callback(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only of a fully replicated scalar, which no model has
            return read_box(
                tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True))
            )

        if mesh is None:
            return jax.device_put(callback((slice(None),) * len(spec.shape)))
        sharding = sharding_of(spec.shape, spec.axes, mesh)
        array = jax.make_array_from_callback(spec.shape, sharding, callback, dtype=kept)
        return array.block_until_ready()  # else the host keeps every part that is under way

    def _check_names(self) -> None:
        needed = {spec.hf_name for spec in self.specs.values()}
        stored = {name for name in self._tensors.names if not name.endswith(_IGNORED_SUFFIX)}
        missing = sorted(needed - stored)
        if missing:
            raise UserError(
                f"{self.folder}: {_names(missing)} missing from the weights; "
                f"copy the folder again, or correct {CONFIG}"
            )
        surplus = sorted(stored - needed)
        if surplus == [_TIED]:
            self._check_tied()
        elif surplus:
            raise UserError(
                f"{self.folder}: {_names(surplus)} in the weights but not in the model that "
                f"{CONFIG} describes; correct {CONFIG}, or remove it"
            )

    def _check_tied(self) -> None:
        """A tied model may store its output matrix again, but not another one."""
        names = (self.specs["embed"].hf_name, _TIED)
        self._check_shape(self.specs["embed"])
        shape, other = (self._tensors.shape(name) for name in names)
        same = shape == other and len({self._tensors.dtype(name) for name in names}) == 1
        rows = max(1, PIECE // (4 * shape[1]))
        for start in range(0, shape[0] if same else 0, rows):
            box = (slice(start, min(start + rows, shape[0])), slice(None))
            first, second = (self._tensors.read_box(name, box) for name in names)
            same = same and first.tobytes() == second.tobytes()
        if not same:
            raise UserError(
                f"{self.folder}: {_TIED} differs from {names[0]} though "
                f"{CONFIG} ties them; set tie_word_embeddings to false there"
            )

    def _check_shape(self, spec: ParamSpec) -> None:
        found = self._tensors.shape(spec.hf_name)
        if found != spec.shape:
            raise UserError(
                f"{self._tensors.where(spec.hf_name)} has shape {list(found)}, not "
                f"{list(spec.shape)} as {CONFIG} says; correct {CONFIG}, or use the weights that "
                "belong to it"
            )


def read_config(folder: str | Path) -> ModelConfig:
    """The description of the model in a folder.

    Raises:
        UserError: no such folder, no config.json, not JSON, or an unsupported model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give a folder with {CONFIG} and {SINGLE}")
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: not found; a model folder needs it beside its weights")
    fields = read_json(path)
    return from_hf(fields, str(path))


def read_model(
    folder: str | Path,
    *,
    adapter: Path | None = None,
    paths: Collection[str] | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, dict]:
    """Reads a model as a nested dict of arrays.

    Args:
        folder: a Hugging Face folder.
        adapter: the folder of a PEFT adapter, which is added to the weights in float32;
            `sdjax.io.peft.read_adapter` reads it as factors beside them instead.
        paths: keep only these leaves (`layers/3/mlp/down_proj`); all by default.
        dtype: cast every tensor to this; as stored by default.
        mesh: place each tensor by `sdjax.sharding.rules`; on the default device without.

    Returns:
        The description, and the parameters in Hugging Face's orientation [out, in].

    Raises:
        UserError: one line that names the folder, the file and the tensor, and what to do.
    """
    reader = ModelReader(folder, adapter=adapter)
    wanted = reader.specs if paths is None else set(paths)

    def size(path: str) -> int:
        return math.prod(reader.specs[path].shape) if path in reader.specs else 0

    # The largest first: what a tensor takes beside itself while it is read is then not added to
    # all the others.
    order = sorted(wanted, key=lambda path: (-size(path), path))
    leaves = {path: reader.read(path, dtype=dtype, mesh=mesh) for path in order}
    return reader.config, unflatten(leaves)


def write_model(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    assets_from: str | Path | None = None,
    more: Iterable[Path] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a model folder that transformers loads too; it appears whole or not at all.

    On several processes every one calls this, and the first one writes.

    Args:
        folder: must not exist, or be empty.
        config: the description.
        params: nested dict of arrays, written in their own dtypes.
        assets_from: a folder whose tokenizer files and generation_config.json are copied.
        more: further files that are copied.
        max_file_bytes: weights beyond this are split into several files with an index.

    Raises:
        UserError: the folder holds something, a leaf is missing, surplus, of a wrong shape or of a
            dtype that is not supported, or `assets_from` does not exist.
    """
    folder = Path(folder)
    _check_free(folder)
    leaves = flatten(params)
    specs = param_specs(config)
    _check_leaves(leaves, specs, folder)
    if assets_from is not None and not Path(assets_from).is_dir():
        raise UserError(f"{assets_from}: no such folder to copy the tokenizer from; correct it")
    partial = folder.parent / f".{folder.name}.partial"
    writes = jax.process_index() == 0
    try:
        if writes:
            # What a killed process left behind.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _write_weights(partial if writes else None, leaves, specs, max_file_bytes)
        if writes:
            stored = CODES[np.dtype(max(leaves.values(), key=lambda leaf: leaf.size).dtype)]
            fields = to_hf(config, dtype=HF_DTYPES[stored])
            write_text(partial / CONFIG, json.dumps(fields, indent=2) + "\n")
            assets = [] if assets_from is None else [Path(assets_from) / name for name in ASSETS]
            for source in (*(path for path in assets if path.is_file()), *more):
                write_bytes(partial / source.name, [source.read_bytes()])
            sync_folder(partial)
            os.replace(partial, folder)
            sync_folder(folder.parent)
    finally:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"write_model {folder.name}")


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already holds something; give a new folder or remove it")


def _check_leaves(leaves: Mapping[str, Any], specs: Mapping[str, ParamSpec], folder: Path) -> None:
    missing, surplus = sorted(specs.keys() - leaves.keys()), sorted(leaves.keys() - specs.keys())
    if missing or surplus:
        what = f"{_names(missing)} missing" if missing else f"{_names(surplus)} surplus"
        raise UserError(f"{folder}: not written, {what}; give the whole tree of this config")
    for path, leaf in leaves.items():
        if tuple(leaf.shape) != specs[path].shape:
            raise UserError(
                f"{folder}: not written, {path} has shape {list(leaf.shape)}, "
                f"not {list(specs[path].shape)}; give parameters that belong to this config"
            )
        if np.dtype(leaf.dtype) not in CODES:
            raise UserError(
                f"{folder}: not written, {path} is {leaf.dtype}; "
                f"cast it to one of {', '.join(sorted(HF_DTYPES.values()))}"
            )


def _write_weights(
    folder: Path | None,
    leaves: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    max_file_bytes: int,
) -> None:
    """Writes the files of the weights; a process without `folder` only takes part in gathering."""
    groups: list[list[str]] = [[]]
    size = 0
    for path, leaf in leaves.items():
        if groups[-1] and size + leaf.nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += leaf.nbytes
    weight_map = {}
    for number, paths in enumerate(groups, 1):
        name = SINGLE
        if len(groups) > 1:
            name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map.update({specs[path].hf_name: name for path in paths})
        parts = file_parts({specs[path].hf_name: leaves[path] for path in paths})
        if folder is not None:
            write_bytes(folder / name, parts)
        else:
            for _ in parts:
                pass
    if folder is not None and len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(leaf.nbytes for leaf in leaves.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _names(names: list[str]) -> str:
    """A few names, so that the line stays one line."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (
        f" and {len(names) - 3} more are" if len(names) > 3 else " are" if len(names) > 1 else " is"
    )
