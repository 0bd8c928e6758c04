"""Quantized weights: formats that are read, and formats that are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.tensor_reader import TensorInfo

# Sections of config.json that describe quantized weights.
QUANTIZATION = ("quantization_config", "compression_config")
_ORIGINAL = "use the model that was quantized"
_DEQUANTIZE = f"{_ORIGINAL}, or save what transformers' model.dequantize() returns"
# Tensors that only packed weights have: the format, and what to do.
_PACKED = (
    (r"(.*[._])?(absmax|quant_map|nested_absmax)|.*\.quant_state\..*|.*\.SCB", "bitsandbytes",
     _DEQUANTIZE),
    (r"(.*\.)?g_idx", "GPTQ", _ORIGINAL),
    (r"(.*\.)?qzeros", "GPTQ or AWQ", _ORIGINAL),
    (r"(.*\.)?weight_packed", "compressed-tensors", _ORIGINAL),
    (r"(.*\.)?q_(weight|perm|scale_max)", "EXL2", _ORIGINAL),
    (r".*_proj_(blocks|scales)", "MXFP4", _DEQUANTIZE),
)  # fmt: skip
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ"}


def check_not_packed(
    folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> None:
    """Raise UserError if weights are packed into integers, which must not be taken for buffers.

    Args:
        folder: the model's folder.
        config: content of its config.json.
        infos: shape and dtype of all tensors.
    """
    method = quantization_method(config)
    for pattern, form, advice in _PACKED:
        found = next((name for name in infos if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise _refused(folder, _NAMES.get(method or "", form), found, advice)
    if method is None:
        return
    for name, info in infos.items():
        # Position ids are int64, and other buffers are vectors.
        if info.dtype.kind in "iu" and info.dtype != np.int64 and len(info.shape) > 1:
            advice = _DEQUANTIZE if method == "bitsandbytes" else _ORIGINAL
            raise _refused(folder, _NAMES.get(method, method), name, advice)


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Return the `quant_method` of a config.json, or None if it declares no quantization."""
    for key in QUANTIZATION:
        if settings := config.get(key):
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            return method if isinstance(method, str) else key
    return None


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the sizes of the blocks that share a scale, or None if a config.json has none."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    found = [settings.get("weight_block_size")]
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    for value in found:
        match value:
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
    return None


def _refused(folder: Path, form: str, name: str, advice: str) -> UserError:
    shown = form if form.isprintable() and len(form) < 30 else "an unknown method"
    return UserError(
        f"{folder}: the weights are quantized by {shown} ({name}), which is not supported; {advice}"
    )
