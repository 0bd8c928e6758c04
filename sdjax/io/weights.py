"""The one way to open weights, in whatever format a folder has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.io.float8_reader import Float8Reader
from sdjax.io.gguf_reader import GgufReader, gguf_files
from sdjax.io.links import member
from sdjax.io.quantization import check_not_packed
from sdjax.io.safetensors_reader import CONFIG, SafetensorsReader, read_json
from sdjax.io.safetensors_writer import FLOAT8_DTYPES, INDEX, SINGLE
from sdjax.io.tensor_reader import TensorReader
from sdjax.io.torch_reader import TORCH_INDEX, TORCH_SINGLE, TorchReader

# Of the files that the readers here may read.
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".gguf")
ADAPTER_SAFETENSORS = "adapter_model.safetensors"
ADAPTER_TORCH = "adapter_model.bin"


def open_model_weights(folder: Path) -> TensorReader:
    """Open the weights of a model folder: safetensors, files of PyTorch, or a GGUF file.

    8-bit floats and the blocks of GGUF are dequantized.

    Args:
        folder: the folder; safetensors are preferred if it has several formats.

    Raises:
        UserError: no weights, damaged ones, or weights that are packed into integers.
    """
    reader = _open_stored(folder)
    config = read_json(folder / CONFIG)
    infos = reader.infos(reader.names)
    check_not_packed(folder, config, infos)
    if any(infos[name].dtype in FLOAT8_DTYPES.values() for name in reader.names):
        return Float8Reader(reader, config)
    return reader


def _open_stored(folder: Path) -> TensorReader:
    """Open weights as they are stored."""
    if any(member(folder, name).exists() for name in (INDEX, SINGLE)):
        return SafetensorsReader(folder)
    if any(member(folder, name).exists() for name in (TORCH_INDEX, TORCH_SINGLE)):
        return TorchReader(folder)
    if gguf_files(folder):
        return GgufReader(folder)
    raise UserError(
        f"{folder}: no weights; {SINGLE}, {INDEX}, {TORCH_SINGLE}, {TORCH_INDEX} or a GGUF file "
        f"must be next to {CONFIG}"
    )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a model's config.json, or of the settings of its GGUF file.

    Returns:
        The fields; none if the folder has neither.

    Raises:
        UserError: config.json is not a JSON object, or the GGUF file's settings are not complete.
    """
    fields = read_json(folder / CONFIG)
    if fields or not folder.is_dir() or not gguf_files(folder):
        return fields
    return GgufReader(folder).config


def open_adapter_weights(folder: Path) -> TensorReader:
    """Open the weights of an adapter folder: safetensors, or a file of PyTorch.

    Raises:
        UserError: no weights, or damaged ones.
    """
    if member(folder, ADAPTER_SAFETENSORS).exists():
        return SafetensorsReader(folder, single=ADAPTER_SAFETENSORS)
    if member(folder, ADAPTER_TORCH).exists():
        return TorchReader(folder, single=ADAPTER_TORCH)
    raise UserError(
        f"{folder}: no weights of an adapter; add {ADAPTER_SAFETENSORS} or {ADAPTER_TORCH}"
    )
