"""PEFT LoRA adapters: read and written, or added to a model's weights as those are read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.buffer_pool import Allocate, aligned_empty
from sdjax.io.safetensors_reader import TensorFolder, read_json
from sdjax.io.safetensors_writer import file_parts, sync_folder, write_bytes, write_text
from sdjax.models.config import ModelConfig
from sdjax.models.lora import ALL_PROJECTIONS, Adapter
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tree import flatten, unflatten

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

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray: ...


class PeftAdapter:
    """A PEFT adapter's folder, sorted.

    Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685. scale is
    alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv 2312.03732).

    Attributes:
        pairs: name of an adapted tensor to the names of its A and B, the scale of their product,
            and whether that is transposed.
        whole: name of a tensor that the adapter replaces (`modules_to_save`) to its name here.
    """

    def __init__(self, folder: Path):
        """Raises UserError for a folder that is no LoRA adapter, or of a kind not supported."""
        settings = read_json(folder / SETTINGS)
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{folder}: not a LoRA adapter; it needs {SETTINGS} of type LORA")
        for key in ("use_dora", "alora_invocation_tokens"):
            if settings.get(key):
                raise UserError(f"{folder / SETTINGS}: {key} is not supported; merge it with peft")
        self._settings = settings
        self.tensors = TensorFolder(folder, single=WEIGHTS)
        self.pairs: dict[str, tuple[str, str, float, bool]] = {}
        self.whole: dict[str, str] = {}
        for stored in self.tensors.names:
            self._sort_in(stored)
        if not self.pairs and not self.whole:
            raise UserError(f"{folder}: holds no tensor that adapts anything; copy it again")

    def check(self, names: Collection[str], model: Path) -> None:
        """Raises UserError where it adapts a tensor that a model with these names lacks."""
        if unknown := sorted({*self.pairs, *self.whole} - set(names)):
            raise UserError(
                f"{self.tensors.folder}: adapts {unknown[0]}, which {model} does not have; "
                "use the model that it was trained for"
            )

    def _sort_in(self, stored: str) -> None:
        name = stored.removeprefix(_PREFIX)
        for (first, second), turned in ((_LINEAR, False), (_EMBEDDING, True)):
            if name.endswith(first):
                module = name.removesuffix(first)
                other = self._partner(stored, first, second)
                turn = turned or bool(self._settings.get("fan_in_fan_out"))
                scale = self._scale(module, self._rank(stored, other))
                self.pairs[f"{module}.weight"] = (stored, other, scale, turn)
                return
            if name.endswith(second):
                self._partner(stored, second, first)
                return
        if "lora_" in name:
            raise UserError(f"{self.tensors.where(stored)} is of a kind that is not supported")
        self.whole[name.replace(".base_layer.", ".")] = stored

    def _partner(self, stored: str, own: str, others: str) -> str:
        other = stored.removesuffix(own) + others
        if other not in self.tensors.file_of:
            raise UserError(f"{self.tensors.where(stored)} has no partner {other}")
        return other

    def _rank(self, first: str, second: str) -> int:
        a, b = self.tensors.shape(first), self.tensors.shape(second)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise UserError(
                f"{self.tensors.where(first)} has shape {list(a)}, its partner {list(b)}: "
                "they make no product"
            )
        return a[0]

    def _scale(self, module: str, rank: int) -> float:
        try:
            alpha = _by_pattern(self._settings.get("alpha_pattern"), module)
        except (re.error, AttributeError):
            raise UserError(
                f"{self.tensors.folder / SETTINGS}: alpha_pattern must be a mapping of regular "
                "expressions to numbers; correct it"
            ) from None
        alpha = self._settings.get("lora_alpha", rank) if alpha is None else alpha
        if not isinstance(alpha, int | float):
            raise UserError(
                f"{self.tensors.folder / SETTINGS}: alpha is {alpha!r}; it must be a number"
            )
        return float(alpha) / (rank**0.5 if self._settings.get("use_rslora") else rank)


class AdaptedFolder:
    """As TensorFolder; an adapted tensor is W + scale B A, in float32, rounded once to W's dtype.

    Tensors that the adapter holds whole replace the model's.
    """

    def __init__(self, model: TensorFolder, adapter: Path):
        """Raises UserError for a folder that is no LoRA adapter, of a kind that is not supported,
        or for another model."""
        self.folder = model.folder
        self._model = model
        self._adapter = PeftAdapter(adapter)
        self._adapter.check(model.names, model.folder)

    @property
    def adapted(self) -> frozenset[str]:
        """The names of the tensors that the adapter changes or replaces."""
        return frozenset(self._adapter.pairs) | frozenset(self._adapter.whole)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The model's and the adapter's."""
        return (self.folder, self._adapter.tensors.folder)

    @property
    def names(self) -> tuple[str, ...]:
        return self._model.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._model.dtype(name)

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        if name not in self.adapted:
            return self._model.read(name, allocate)
        array = allocate(self.shape(name), self.dtype(name))
        array[...] = self.read_box(name, (slice(None),) * array.ndim)
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        adapter = self._adapter
        if name in adapter.whole:
            self._check_shape(adapter.whole[name], adapter.tensors.shape(adapter.whole[name]), name)
            part = adapter.tensors.read_box(adapter.whole[name], box).astype(self.dtype(name))
        else:
            part = self._model.read_box(name, box)
        if name not in adapter.pairs:
            return part
        first, second, scale, turned = adapter.pairs[name]
        a, b = (adapter.tensors.read(one).astype(np.float32) for one in (first, second))
        out_size, in_size = b.shape[0], a.shape[1]
        self._check_shape(first, (in_size, out_size) if turned else (out_size, in_size), name)
        rows, columns = reversed(box) if turned else box
        change = scale * (b[rows] @ a[:, columns])
        change = change.T if turned else change
        return (part.astype(np.float32) + change).astype(part.dtype)

    def where(self, name: str) -> str:
        """The file and the tensor, as the beginning of a sentence."""
        behind = f" with {self._adapter.tensors.folder}" if name in self.adapted else ""
        return self._model.where(name) + behind

    def _check_shape(self, stored: str, shape: tuple[int, ...], name: str) -> None:
        if shape != self.shape(name):
            raise UserError(
                f"{self._adapter.tensors.where(stored)} makes a change of shape {list(shape)}, "
                f"{name} has {list(self.shape(name))}; use the model that it was trained for"
            )


def write_adapter(
    folder: Path, config: ModelConfig, adapter: Adapter, *, base: str, more: Iterable[Path] = ()
) -> None:
    """Writes an adapter as PEFT loads it; the folder appears whole or not at all.

    On several processes every one calls this, and the first one writes.

    Args:
        base: the model that it belongs to, a folder or a name.
        more: files that are copied beside it.

    Raises:
        UserError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already holds something; give a new folder or remove it")
    specs = param_specs(config)
    leaves = flatten(adapter.factors)
    tensors = {}
    for path, leaf in leaves.items():
        projection, factor = path.rsplit("/", 1)
        module = specs[projection].hf_name.removesuffix(".weight")
        tensors[f"{_PREFIX}{module}{_LINEAR[factor == 'b']}"] = leaf
    ranks = {
        specs[path.removesuffix("/a")].hf_name.removesuffix(".weight"): leaf.shape[0]
        for path, leaf in leaves.items()
        if path.endswith("/a")
    }
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {module: adapter.scale * own for module, own in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({module.split(".")[-1] for module in ranks}),
    }
    parts = file_parts(tensors)
    if jax.process_index() != 0:
        for _ in parts:  # takes part in gathering
            pass
        return
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_bytes(partial / WEIGHTS, parts)
        write_text(partial / SETTINGS, json.dumps(settings, indent=2) + "\n")
        for file in more:
            write_bytes(partial / file.name, [file.read_bytes()])
        sync_folder(partial)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_adapter(folder: Path, config: ModelConfig, *, model: Path) -> Adapter:
    """The adapter of a PEFT folder, in float32, on the default device.

    Args:
        model: the folder of the model with this config, for errors.

    Raises:
        UserError: no LoRA adapter, one for another model, or one that our `Adapter` cannot hold:
            other tensors than projections, or several scales.
    """
    stored = PeftAdapter(folder)
    specs = param_specs(config)
    paths = {spec.hf_name: path for path, spec in specs.items()}
    stored.check(paths, model)
    scales = {scale for _, _, scale, _ in stored.pairs.values()}
    odd = [name for name in stored.pairs if kind_of(paths[name]) not in ALL_PROJECTIONS]
    if stored.whole or odd or any(one[3] for one in stored.pairs.values()):
        raise UserError(f"{folder}: adapts more than projections; merge it with peft")
    if len(scales) != 1:
        raise UserError(
            f"{folder / SETTINGS}: rank_pattern and alpha_pattern give projections several scales, "
            "which is not supported; merge it with peft"
        )
    factors = {}
    for name, (first, second, _, _) in stored.pairs.items():
        a, b = (stored.tensors.read(one).astype(np.float32) for one in (first, second))
        found, wanted = (b.shape[0], a.shape[1]), specs[paths[name]].shape
        if found != wanted:
            raise UserError(
                f"{stored.tensors.where(first)} makes a change of shape {list(found)}, {name} has "
                f"{list(wanted)}; use the model that it was trained for"
            )
        factors[f"{paths[name]}/a"], factors[f"{paths[name]}/b"] = jnp.asarray(a), jnp.asarray(b)
    return Adapter(factors=unflatten(factors), scale=scales.pop())


def _by_pattern(pattern: dict[str, Any] | None, module: str) -> Any:
    """As PEFT reads `alpha_pattern`: a key is the regular expression of a name or of its end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None
