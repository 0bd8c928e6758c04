"""PEFT LoRA adapters: read, written, or merged into a model's weights while reading them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes
from sdjax.core.linear_regex import PatternList
from sdjax.io.atomic_write import resolve_new_folder, staged_folder, write_file
from sdjax.io.safetensors_reader import SafetensorsReader, read_json
from sdjax.io.safetensors_writer import write_safetensors
from sdjax.models.config import ModelConfig
from sdjax.models.lora import ALL_PROJECTIONS, Adapter
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.xla.alignment import Allocate, aligned_empty

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_ALPHA = 1e9
# Suffixes of the tensor names of (A, B): of a linear layer, and of an embedding.
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPair:
    """The factors of one adapted tensor, whose change is scale * B @ A.

    Attributes:
        a: name of A, [rank, in], in the adapter's files.
        b: name of B, [out, rank], in the adapter's files.
        scale: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        transposed: whether the change is transposed before it is added.
    """

    a: str
    b: str
    scale: float
    transposed: bool


class PeftAdapter:
    """A PEFT adapter folder, with its tensors assigned to those of the model.

    Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685; `use_rslora`
    is arXiv 2312.03732.

    Attributes:
        reader: reads the adapter's tensors.
        pairs: name of an adapted tensor of the model to its factors.
        replacements: name of a replaced tensor of the model (`modules_to_save`) to the name of its
            replacement in the adapter's files.
    """

    def __init__(self, folder: Path):
        """Open a folder. Raises UserError if it is not a LoRA adapter of a supported kind."""
        settings = read_json(folder / ADAPTER_CONFIG)
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{folder}: not a LoRA adapter; {ADAPTER_CONFIG} must be of type LORA")
        for key in ("use_dora", "alora_invocation_tokens"):
            if settings.get(key):
                raise UserError(
                    f"{folder / ADAPTER_CONFIG}: {key} is not supported; merge it with peft"
                )
        for key in ("use_rslora", "fan_in_fan_out"):
            if not isinstance(settings.get(key), bool | None):
                shown = truncated_repr(settings[key])
                raise UserError(
                    f"{folder / ADAPTER_CONFIG}: {key} must be true or false, not {shown}"
                )
        self._settings = settings
        self._alphas = _Alphas(settings, folder / ADAPTER_CONFIG)
        self.reader = SafetensorsReader(folder, single=ADAPTER_WEIGHTS)
        self.pairs: dict[str, LoraPair] = {}
        self.replacements: dict[str, str] = {}
        for stored in self.reader.names:
            self._assign(stored)
        if not self.pairs and not self.replacements:
            raise UserError(f"{folder}: contains no adapter weights; copy the folder again")

    def check(self, names: Collection[str], model: Path) -> None:
        """Raise UserError if the adapter changes a tensor that the model does not have."""
        if unknown := sorted({*self.pairs, *self.replacements} - set(names)):
            raise UserError(
                f"{self.reader.folder}: adapts {unknown[0]}, which {model} does not have; "
                "use the model that it was trained for"
            )

    def read_factors(self, pair: LoraPair) -> tuple[np.ndarray, np.ndarray]:
        """Return (A [rank, in], B [out, rank]) in float32."""
        a, b = (self.reader.read(name).astype(np.float32) for name in (pair.a, pair.b))
        return a, b

    def _assign(self, stored: str) -> None:
        name = stored.removeprefix(_PREFIX)
        for (suffix_a, suffix_b), is_embedding in ((_LINEAR, False), (_EMBEDDING, True)):
            if name.endswith(suffix_a):
                module = name.removesuffix(suffix_a)
                b = self._partner(stored, suffix_a, suffix_b)
                self.pairs[f"{module}.weight"] = LoraPair(
                    a=stored,
                    b=b,
                    scale=self._scale(module, self._rank(stored, b)),
                    transposed=is_embedding or bool(self._settings.get("fan_in_fan_out")),
                )
                return
            if name.endswith(suffix_b):
                self._partner(stored, suffix_b, suffix_a)
                return
        if "lora_" in name:
            raise UserError(f"{self.reader.where(stored)} is not supported; merge it with peft")
        self.replacements[name.replace(".base_layer.", ".")] = stored

    def _partner(self, stored: str, suffix: str, partner_suffix: str) -> str:
        partner = stored.removesuffix(suffix) + partner_suffix
        if partner not in self.reader.file_of:
            raise UserError(
                f"{self.reader.where(stored)} has no matching tensor {partner}; "
                "copy the folder again"
            )
        return partner

    def _rank(self, a: str, b: str) -> int:
        shape_a, shape_b = self.reader.shape(a), self.reader.shape(b)
        two_dimensional = len(shape_a) == len(shape_b) == 2
        if not two_dimensional or shape_a[0] != shape_b[1] or not shape_a[0]:
            raise UserError(
                f"{self.reader.where(a)} has shape {list(shape_a)} but {b} has shape "
                f"{list(shape_b)}, so they cannot be multiplied; copy the folder again"
            )
        return shape_a[0]

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._alphas.of(module, rank)
        return alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)


class _Alphas:
    """The alpha of each module: `lora_alpha`, or that of the first pattern that matches its name.

    PEFT's patterns are regular expressions, whose matches may take forever. Here they take linear
    time, and few constructs are not supported.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path):
        self._path = path
        self._default = settings.get("lora_alpha")
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._invalid(f"not {truncated_repr(patterns)}")
        self._values = list(patterns.values())
        try:
            self._patterns = PatternList(patterns)
        except ValueError as error:
            raise self._invalid(str(error)) from None

    def of(self, module: str, rank: int) -> float:
        """Return the alpha of a module; without any, it is the rank."""
        try:
            match = self._patterns.first_match(module)
        except ValueError as error:
            raise self._invalid(str(error)) from None
        alpha = self._default if match is None else self._values[match]
        alpha = rank if alpha is None else alpha
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not -_MAX_ALPHA < alpha < _MAX_ALPHA:  # NaN is refused too
            raise UserError(f"{self._path}: alpha must be a number, not {truncated_repr(alpha)}")
        return float(alpha)

    def _invalid(self, reason: str) -> UserError:
        return UserError(
            f"{self._path}: alpha_pattern must be a mapping of regular expressions to numbers "
            f"({reason}); merge the adapter with peft if you trust it"
        )


class AdaptedReader(SafetensorsReader):
    """Reader of a model's tensors with an adapter merged in.

    An adapted tensor is W + scale * B @ A, computed in float32 and rounded once to W's dtype.
    """

    def __init__(self, folder: str | Path, adapter: Path):
        """Open a model folder and an adapter for it.

        Raises:
            UserError: a damaged model, or an adapter that is not a LoRA adapter, not supported or
                for another model.
        """
        super().__init__(folder)
        self._adapter = PeftAdapter(adapter)
        self._adapter.check(self.names, self.folder)

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes or replaces."""
        return frozenset(self._adapter.pairs) | frozenset(self._adapter.replacements)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the model and of the adapter."""
        return (self.folder, self._adapter.reader.folder)

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor, as `SafetensorsReader.read` does."""
        if name not in self.adapted:
            return super().read(name, allocate)
        array = allocate(self.shape(name), self.dtype(name))
        array[...] = self.read_box(name, (slice(None),) * array.ndim)
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis."""
        adapter = self._adapter
        if name in adapter.replacements:
            stored = adapter.replacements[name]
            self._check_shape(stored, adapter.reader.shape(stored), name)
            weights = adapter.reader.read_box(stored, box).astype(self.dtype(name))
        else:
            weights = super().read_box(name, box)
        if name not in adapter.pairs:
            return weights
        pair = adapter.pairs[name]
        a, b = adapter.read_factors(pair)
        out_size, in_size = b.shape[0], a.shape[1]
        shape = (in_size, out_size) if pair.transposed else (out_size, in_size)
        self._check_shape(pair.a, shape, name)
        rows, columns = reversed(box) if pair.transposed else box
        change = pair.scale * (b[rows] @ a[:, columns])
        change = change.T if pair.transposed else change
        return (weights.astype(np.float32) + change).astype(weights.dtype)

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        adapter = f" with {self._adapter.reader.folder}" if name in self.adapted else ""
        return super().where(name) + adapter

    def _check_shape(self, stored: str, shape: tuple[int, ...], name: str) -> None:
        if shape != self.shape(name):
            raise UserError(
                f"{self._adapter.reader.where(stored)} has an update of shape {list(shape)}, but "
                f"{name} has shape {list(self.shape(name))}; use the model that it was trained for"
            )


def write_adapter(
    folder: Path,
    config: ModelConfig,
    adapter: Adapter,
    *,
    base: str,
    extra_files: Iterable[Path] = (),
) -> None:
    """Write an adapter that PEFT can load; the folder appears only when it is complete.

    With several processes, all of them must call this; the first one writes.

    Args:
        folder: must not exist, or must be empty.
        config: config of the model that the adapter is for.
        adapter: the LoRA factors.
        base: the model that the adapter is for, a folder or a name.
        extra_files: files to copy into the folder.

    Raises:
        UserError: the folder is not empty.
    """
    resolve_new_folder(folder)
    specs = param_specs(config)
    factors = flatten(adapter.factors)

    def module(path: str) -> str:
        return specs[path].hf_name.removesuffix(".weight")

    tensors, ranks = {}, {}
    for path, leaf in factors.items():
        projection, factor = path.rsplit("/", 1)
        tensors[f"{_PREFIX}{module(projection)}{_LINEAR[factor == 'b']}"] = leaf
        if factor == "a":
            ranks[module(projection)] = leaf.shape[0]
    rank = max(ranks.values())
    smaller = {name: own_rank for name, own_rank in ranks.items() if own_rank != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "rank_pattern": smaller,
        "alpha_pattern": {name: adapter.scale * own_rank for name, own_rank in smaller.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.split(".")[-1] for name in ranks}),
    }
    with staged_folder(folder) if jax.process_index() == 0 else nullcontext() as staged:
        write_safetensors(None if staged is None else staged / ADAPTER_WEIGHTS, tensors)
        if staged is not None:
            write_file(staged / ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
            for file in extra_files:
                write_file(staged / file.name, read_bytes(file, MAX_VOCABULARY_BYTES))


def read_adapter(folder: Path, config: ModelConfig, *, model: Path) -> Adapter:
    """Read a PEFT adapter as LoRA factors in float32 on the default device.

    Args:
        folder: the adapter's folder.
        config: config of the model that the adapter is for.
        model: folder of that model, for error messages.

    Raises:
        UserError: not a LoRA adapter, for another model, or not representable as an `Adapter`: it
            changes tensors other than projections, or has several scales.
    """
    stored = PeftAdapter(folder)
    specs = param_specs(config)
    paths = {spec.hf_name: path for path, spec in specs.items()}
    stored.check(paths, model)
    if (problem := _unlike_factors(stored, paths)) is not None:
        raise UserError(f"{folder}: {problem}; merge it with peft")
    factors = {}
    for name, pair in stored.pairs.items():
        a, b = stored.read_factors(pair)
        shape, expected = (b.shape[0], a.shape[1]), specs[paths[name]].shape
        if shape != expected:
            raise UserError(
                f"{stored.reader.where(pair.a)} has an update of shape {list(shape)}, but {name} "
                f"has shape {list(expected)}; use the model that it was trained for"
            )
        factors[f"{paths[name]}/a"], factors[f"{paths[name]}/b"] = jnp.asarray(a), jnp.asarray(b)
    scale = next(iter(stored.pairs.values())).scale
    return Adapter(factors=unflatten(factors), scale=scale)


def has_plain_factors(folder: Path, config: ModelConfig) -> bool:
    """Return whether `read_adapter` can represent an adapter, which any reader can merge.

    Args:
        folder: the adapter's folder.
        config: config of the model that the adapter is for.
    """
    paths = {spec.hf_name: path for path, spec in param_specs(config).items()}
    stored = PeftAdapter(folder)
    return stored.pairs.keys() <= paths.keys() and _unlike_factors(stored, paths) is None


def _unlike_factors(stored: PeftAdapter, paths: Mapping[str, str]) -> str | None:
    """Return why an adapter cannot be an `Adapter`, or None; `paths` has the path of each name."""
    if stored.replacements or any(
        pair.transposed or kind_of(paths[name]) not in ALL_PROJECTIONS
        for name, pair in stored.pairs.items()
    ):
        return "adapts tensors that are not projections"
    if len({pair.scale for pair in stored.pairs.values()}) != 1:
        return (
            f"{ADAPTER_CONFIG}: rank_pattern and alpha_pattern result in several scales, which is "
            "not supported"
        )
    return None
