"""A model folder with a PEFT LoRA adapter added to its weights as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdjax.errors import UserError
from sdjax.io.tensor_folder import TensorFolder, read_json

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Part of a tensor's name in the adapter: (A, B) of a linear layer, (A, B) of an embedding.
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


class Tensors(Protocol):
    """What is read like a folder of tensors."""

    folder: Path

    @property
    def folders(self) -> tuple[Path, ...]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


class AdaptedFolder:
    """As TensorFolder; an adapted tensor is W + scale B A, in float32, rounded once to W's dtype.

    Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685. scale is
    alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv 2312.03732). Tensors that the
    adapter holds whole (`modules_to_save`) replace the model's.
    """

    def __init__(self, model: TensorFolder, adapter: Path):
        """Raises UserError for a folder that is no LoRA adapter, of a kind that is not supported,
        or for another model."""
        self.folder = model.folder
        self._model = model
        settings = read_json(adapter / SETTINGS)
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{adapter}: not a LoRA adapter; it needs {SETTINGS} of type LORA")
        for key in ("use_dora", "alora_invocation_tokens"):
            if settings.get(key):
                raise UserError(f"{adapter / SETTINGS}: {key} is not supported; merge it with peft")
        self._settings = settings
        self._adapter = TensorFolder(adapter, single=WEIGHTS)
        self._pairs: dict[str, tuple[str, str, float, bool]] = {}  # name -> (A, B, scale, turned)
        self._whole: dict[str, str] = {}
        for stored in self._adapter.names:
            self._sort_in(stored)
        if unknown := sorted({*self._pairs, *self._whole} - set(model.names)):
            raise UserError(
                f"{adapter}: adapts {unknown[0]}, which {model.folder} does not have; "
                "use the model that it was trained for"
            )

    @property
    def folders(self) -> tuple[Path, ...]:
        """The model's and the adapter's."""
        return (self.folder, self._adapter.folder)

    @property
    def names(self) -> tuple[str, ...]:
        return self._model.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._model.dtype(name)

    def read(self, name: str) -> np.ndarray:
        stored = self._model.read(name)
        if name in self._whole:
            stored = self._adapter.read(self._whole[name]).astype(stored.dtype)
        if name not in self._pairs:
            return stored
        first, second, scale, turned = self._pairs[name]
        a, b = (self._adapter.read(one).astype(np.float32) for one in (first, second))
        change = scale * (b @ a)
        change = change.T if turned else change
        if change.shape != stored.shape:
            raise UserError(
                f"{self._adapter.where(first)} makes a change of shape {list(change.shape)}, "
                f"{name} has {list(stored.shape)}; use the model that it was trained for"
            )
        return (stored.astype(np.float32) + change).astype(stored.dtype)

    def _sort_in(self, stored: str) -> None:
        name = stored.removeprefix(_PREFIX)
        for (first, second), turned in ((_LINEAR, False), (_EMBEDDING, True)):
            if name.endswith(first):
                module = name.removesuffix(first)
                other = stored.removesuffix(first) + second
                if other not in self._adapter.file_of:
                    raise UserError(f"{self._adapter.where(stored)} has no partner {other}")
                turn = turned or bool(self._settings.get("fan_in_fan_out"))
                scale = self._scale(module, self._adapter.shape(stored)[0])
                self._pairs[f"{module}.weight"] = (stored, other, scale, turn)
                return
            if name.endswith(second):
                return
        if "lora_" in name:
            raise UserError(f"{self._adapter.where(stored)} is of a kind that is not supported")
        self._whole[name.replace(".base_layer.", ".")] = stored

    def _scale(self, module: str, rank: int) -> float:
        alpha = _by_pattern(self._settings.get("alpha_pattern"), module)
        alpha = self._settings.get("lora_alpha", rank) if alpha is None else alpha
        return float(alpha) / (rank**0.5 if self._settings.get("use_rslora") else rank)


def _by_pattern(pattern: dict[str, Any] | None, module: str) -> Any:
    for name, value in (pattern or {}).items():
        if module == name or module.endswith(f".{name}"):
            return value
    return None
