"""Models as Hugging Face folders: config.json and weights, written as safetensors.

Weights are read tensor by tensor and, on a mesh, shard by shard: each process reads only the bytes
of its own devices, so peak memory is little more than the result. Weights are also written tensor
by tensor.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes
from sdjax.io.adapted_reader import open_weights
from sdjax.io.atomic_write import resolve_new_folder, staged_folder, write_file
from sdjax.io.links import member
from sdjax.io.model_paths import locate
from sdjax.io.peft import has_plain_factors, read_adapter
from sdjax.io.safetensors_reader import CONFIG
from sdjax.io.safetensors_writer import (
    DTYPE_CODES,
    DTYPES,
    HF_DTYPES,
    MAX_FILE_BYTES,
    SINGLE,
    assign_files,
    is_finite,
    write_index,
    write_safetensors,
)
from sdjax.io.tensor_reader import MAX_BLOCK_BYTES
from sdjax.io.weights import read_model_config
from sdjax.models.config import ModelConfig
from sdjax.models.hf_config import from_hf, to_hf
from sdjax.models.lora import Adapter, shard_adapter
from sdjax.models.params import ParamSpec, param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.sharding.rules import sharding_of

# Files of the tokenizer and of text generation, which are copied with a model.
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

logger = logging.getLogger(__name__)

# Buffers in old checkpoints of the Llama family; they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_LM_HEAD = "lm_head.weight"


class ModelReader:
    """Reader of the tensors of a model folder, whose names and headers are checked on construction.

    Attributes:
        folder: the model's folder.
        config: the model's config.
        specs: path to specification of every tensor.
    """

    def __init__(self, folder: str | Path, *, adapter: Path | None = None):
        """Open a model folder.

        Args:
            folder: a Hugging Face folder.
            adapter: folder of a PEFT adapter that is merged into the weights as they are read.

        Raises:
            UserError: no folder, config or safetensors; a truncated file; missing or unexpected
                tensors; or an adapter that is not supported or belongs to another model.
        """
        self.folder = Path(folder)
        self.config = load_config(self.folder)
        self.specs = param_specs(self.config)
        self._tensors = open_weights(self.folder, adapter)
        for note in self._tensors.notes:
            _report(f"{self.folder}: {note}")
        self._check_names()

    def read(self, path: str, *, dtype: Any = None, mesh: Mesh | None = None) -> jax.Array:
        """Read one tensor.

        Args:
            path: path of the parameter, such as `layers/3/mlp/down_proj`.
            dtype: dtype to cast to; the stored dtype by default.
            mesh: mesh to place the tensor on; the default device by default.

        Raises:
            UserError: an unknown path, a wrong shape, an unsupported dtype, NaN or infinity.
        """
        if path not in self.specs:
            raise UserError(
                f"{self.folder}: the model has no tensor {path!r}; "
                "use models of one architecture and size"
            )
        spec = self.specs[path]
        self._check_shape(spec)
        stored = self._tensors.dtype(spec.hf_name)
        # float64 only if JAX has it enabled
        result_dtype = jax.dtypes.canonicalize_dtype(stored if dtype is None else dtype)

        @functools.cache  # replicas ask for the same box
        def read_box(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
            box = self._tensors.read_box(spec.hf_name, tuple(slice(*pair) for pair in bounds))
            if not is_finite(box):
                raise UserError(
                    f"{self._tensors.where(spec.hf_name)} contains NaN or infinity; copy the file "
                    "again, or use an intact checkpoint"
                )
            return box.astype(result_dtype, copy=False)

        def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None only for replicated scalars, which no model has
            return read_box(
                tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True))
            )

        if mesh is None:
            return jax.device_put(read_shard((slice(None),) * len(spec.shape)))
        sharding = sharding_of(spec.shape, spec.axes, mesh)
        array = jax.make_array_from_callback(spec.shape, sharding, read_shard, dtype=result_dtype)
        return array.block_until_ready()  # otherwise the host keeps all shards in flight

    def check_shapes(self, paths: Collection[str] | None = None) -> None:
        """Raise UserError if a stored tensor has another shape than in the config.

        Args:
            paths: paths of the tensors to check; all by default.
        """
        for path in self.specs if paths is None else paths:
            self._check_shape(self.specs[path])

    def _check_names(self) -> None:
        expected = {spec.hf_name for spec in self.specs.values()}
        stored = {name for name in self._tensors.names if not name.endswith(_IGNORED_SUFFIX)}
        if missing := sorted(expected - stored):
            raise UserError(
                f"{self.folder}: missing from the weights: {_enumerate(missing)}; "
                f"copy the folder again, or correct {CONFIG}"
            )
        unexpected = sorted(stored - expected)
        if unexpected == [_LM_HEAD]:
            self._compare_tied()
        elif unexpected:
            raise UserError(
                f"{self.folder}: tensors that the model in {CONFIG} does not have: "
                f"{_enumerate(unexpected)}; correct {CONFIG}, or remove them"
            )

    def _compare_tied(self) -> None:
        """Report a stored output matrix that is not the embedding of a tied model."""
        names = (self.specs["embed"].hf_name, _LM_HEAD)
        self._check_shape(self.specs["embed"])
        shape, head_shape = (self._tensors.shape(name) for name in names)
        same = shape == head_shape and len({self._tensors.dtype(name) for name in names}) == 1
        rows = max(1, MAX_BLOCK_BYTES // (4 * shape[1]))
        for start in range(0, shape[0] if same else 0, rows):
            box = (slice(start, min(start + rows, shape[0])), slice(None))
            embed, head = (self._tensors.read_box(name, box) for name in names)
            same = same and embed.tobytes() == head.tobytes()
        if not same:
            _report(
                f"{self.folder}: {_LM_HEAD} differs from {names[0]}, to which {CONFIG} ties it: "
                "not used, as in transformers"
            )

    def _check_shape(self, spec: ParamSpec) -> None:
        shape = self._tensors.shape(spec.hf_name)
        if shape != spec.shape:
            raise UserError(
                f"{self._tensors.where(spec.hf_name)} has shape {list(shape)}, but {CONFIG} "
                f"requires {list(spec.shape)}; correct {CONFIG}, or use the weights that belong "
                "to it"
            )


def load_config(model: str | Path) -> ModelConfig:
    """Load the config of a model.

    Args:
        model: a folder, or a name as in `load_model`.

    Raises:
        UserError: no such model, no config.json, not JSON, or an unsupported model.
    """
    folder = locate(model)[0] if isinstance(model, str) else model
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give a folder with {CONFIG} and {SINGLE}")
    path, fields = folder / CONFIG, read_model_config(folder)
    if not fields:
        raise UserError(f"{path}: not found; a model folder needs it next to its weights")
    return from_hf(fields, str(path))


def load_model(
    model: str | Path,
    *,
    adapter: Path | None = None,
    paths: Collection[str] | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, Params]:
    """Load a model.

    Args:
        model: a folder, OWNER/MODEL or OWNER/MODEL@REVISION on Hugging Face, or zoo:NAME; as a
            string also MODEL+ADAPTER with a PEFT adapter, which is merged into the weights.
        adapter: folder of a PEFT adapter, if `model` is a folder. It is merged in float32;
            `sdjax.io.peft.read_adapter` reads it as separate factors instead.
        paths: load only these parameters (`layers/3/mlp/down_proj`); all by default.
        dtype: dtype to cast all parameters to; as stored by default.
        mesh: mesh on which the parameters are placed by `sdjax.sharding.rules`; the default
            device by default.

    Returns:
        The config, and the parameters as nested dicts of arrays, matrices as [out, in].

    Raises:
        UserError: the model cannot be found, is damaged or not supported.

    Examples:
        >>> import sdjax
        >>> config, params = sdjax.load_model("zoo:seed")
        >>> params["embed"].shape == (config.vocab_size, config.hidden_size)
        True
        >>> sorted(params["layers"]["0"]["mlp"])
        ['down_proj', 'gate_proj', 'up_proj']
    """
    folder = model
    if isinstance(model, str) and adapter is None:
        folder, adapter = locate(model)
    reader = ModelReader(folder, adapter=adapter)

    def size(path: str) -> int:
        return math.prod(reader.specs[path].shape) if path in reader.specs else 0

    # Largest first, so that its memory peak while reading does not add to all other tensors.
    order = sorted(
        reader.specs if paths is None else set(paths), key=lambda path: (-size(path), path)
    )
    leaves = {path: reader.read(path, dtype=dtype, mesh=mesh) for path in order}
    return reader.config, unflatten(leaves)


def load_generator(
    model: str, *, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params, Adapter | None]:
    """Load a model whose adapter, if any, is kept separate, as in training and in a run.

    The result of an adapter that is not merged is not rounded to the dtype of the weights.

    Args:
        model: a name as in `load_model`, also MODEL+ADAPTER.
        mesh: mesh on which the arrays are placed; the default device by default.

    Returns:
        The config, the parameters, and the adapter; None without an adapter, and if it cannot be
        separate (`sdjax.io.peft.read_adapter`) and is therefore merged into the parameters.

    Raises:
        UserError: the model or its adapter cannot be found, is damaged or not supported.
    """
    folder, adapter_folder = locate(model)
    config = load_config(folder)
    if adapter_folder is None or not has_plain_factors(adapter_folder, config):
        return config, load_model(folder, adapter=adapter_folder, mesh=mesh)[1], None
    adapter = read_adapter(adapter_folder, config, model=folder)
    if mesh is not None:
        adapter = shard_adapter(adapter, config, mesh)
    return config, load_model(folder, mesh=mesh)[1], adapter


def write_model(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    assets_from: str | Path | None = None,
    extra_files: Iterable[Path] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model folder that transformers can load; it appears only when it is complete.

    With several processes, all of them must call this; the first one writes.

    Args:
        folder: must not exist, or must be empty.
        config: the model's config.
        params: nested dicts of arrays, written in their own dtypes.
        assets_from: a folder whose tokenizer files and generation_config.json are copied.
        extra_files: further files to copy.
        max_file_bytes: size limit of a file of weights.

    Raises:
        UserError: the folder is not empty; a parameter is missing, unexpected, or of a wrong shape
            or unsupported dtype; or `assets_from` does not exist.
    """
    folder = Path(folder)
    resolve_new_folder(folder)
    leaves = flatten(params)
    specs = param_specs(config)
    _check_leaves(leaves, specs, folder)
    assets: list[Path] = []
    if assets_from is not None:
        if not Path(assets_from).is_dir():
            raise UserError(f"{assets_from}: no such folder to copy the tokenizer from")
        assets = [path for name in ASSETS if (path := member(Path(assets_from), name)).is_file()]
    tensors = {specs[path].hf_name: leaf for path, leaf in leaves.items()}
    files = assign_files(tensors, max_file_bytes)
    is_writer = jax.process_index() == 0
    with staged_folder(folder) if is_writer else nullcontext() as staged:
        for file, names in files.items():
            write_safetensors(
                None if staged is None else staged / file, {name: tensors[name] for name in names}
            )
        if staged is not None:
            write_index(staged, files, tensors)
            main_dtype = max(leaves.values(), key=lambda leaf: leaf.size).dtype
            fields = to_hf(config, dtype=HF_DTYPES[DTYPE_CODES[np.dtype(main_dtype)]])
            write_file(staged / CONFIG, json.dumps(fields, indent=2) + "\n")
            for source in (*assets, *extra_files):
                write_file(staged / source.name, read_bytes(source, MAX_VOCABULARY_BYTES))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"write_model {folder.name}")


@functools.cache  # once, although a model may be opened several times
def _report(note: str) -> None:
    logger.info(note)


def _check_leaves(leaves: Mapping[str, Any], specs: Mapping[str, ParamSpec], folder: Path) -> None:
    missing, unexpected = sorted(specs.keys() - leaves.keys()), sorted(leaves.keys() - specs.keys())
    if missing or unexpected:
        problem = "missing parameters" if missing else "unexpected parameters"
        raise UserError(
            f"{folder}: not written because of {problem}: {_enumerate(missing or unexpected)}; "
            "pass the complete parameter tree of this config"
        )
    for path, leaf in leaves.items():
        if tuple(leaf.shape) != specs[path].shape:
            raise UserError(
                f"{folder}: not written: {path} has shape {list(leaf.shape)}, "
                f"not {list(specs[path].shape)}; pass parameters that belong to this config"
            )
        if np.dtype(leaf.dtype) not in DTYPES.values():
            raise UserError(
                f"{folder}: not written: {path} is {leaf.dtype}; "
                f"cast it to one of {', '.join(sorted(HF_DTYPES.values()))}"
            )


def _enumerate(names: list[str]) -> str:
    """Return the first names and the number of others, so that the message stays one line."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
