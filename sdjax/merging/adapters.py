"""LoRA adapters: extracted from the difference of two models, and merged with one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.atomic_write import resolve_new_folder
from sdjax.io.hf_checkpoint import ModelReader
from sdjax.io.model_paths import adapter_folder, locate
from sdjax.io.peft import LoraPair, PeftAdapter
from sdjax.io.peft_writer import write_factors
from sdjax.merging.operations.low_rank import (
    compressed_factors,
    low_rank_factors,
    relative_error,
)
from sdjax.models.lora import ALL_PROJECTIONS
from sdjax.models.params import kind_of
from sdjax.sharding.memory import exhaustion_reported

_REMEDY = "use more devices (--mesh)"


@dataclass(frozen=True, kw_only=True)
class AdaptedTensor:
    """One tensor of an adapter that has been written.

    Attributes:
        name: Hugging Face's name of its module.
        rank: rank of its factors.
        error: norm of what the factors lack of the change, relative to the change; 0 if they are
            exact.
    """

    name: str
    rank: int
    error: float


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """An adapter that has been written: its folder, its tensors, and remarks for the user."""

    folder: Path
    tensors: tuple[AdaptedTensor, ...]
    notes: tuple[str, ...] = ()


def extract_lora(
    base: str,
    model: str,
    out: Path,
    *,
    rank: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    on_tensor: Callable[[], None] | None = None,
) -> AdapterResult:
    """Write the difference of two models as a LoRA adapter of the first.

    Args:
        base: the model that the adapter is for, a name as in `sdjax.load_model`.
        model: the model that the adapter approximates, also MODEL+ADAPTER.
        out: folder of the adapter, in PEFT's format.
        rank: maximum rank of the factors.
        seed: seed of the random directions (see `low_rank_factors`).
        mesh: mesh to shard tensors and computations over.
        on_tensor: called after each tensor that was compared.

    Raises:
        UserError: a model cannot be read, they have different architectures, nothing differs in a
            projection, or `out` exists.
    """
    if rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    resolve_new_folder(out)
    (base_folder, base_adapter), (folder, adapter) = locate(base), locate(model)
    first = ModelReader(base_folder, adapter=base_adapter)
    second = ModelReader(folder, adapter=adapter)
    if {p: s.shape for p, s in first.specs.items()} != {
        p: s.shape for p, s in second.specs.items()
    }:
        raise UserError(f"{model}: not of the architecture and size of {base}")
    factors: dict[str, tuple[Any, Any]] = {}
    tensors, others = [], []
    key = jax.random.key(seed)
    for number, (path, spec) in enumerate(first.specs.items()):
        with exhaustion_reported("extracting the adapter", remedy=_REMEDY):
            old, new = (reader.read(path, mesh=mesh) for reader in (first, second))
            if not bool(jnp.array_equal(old, new)):
                if kind_of(path) in ALL_PROJECTIONS:
                    own = min(rank, *spec.shape)
                    a, b, error = _factors(old, new, jax.random.fold_in(key, number), rank=own)
                    name = spec.hf_name.removesuffix(".weight")
                    factors[name] = _to_host(a), _to_host(b)
                    tensors.append(AdaptedTensor(name=name, rank=own, error=float(error)))
                else:
                    others.append(spec.hf_name)
        if on_tensor is not None:
            on_tensor()
    if not factors:
        raise UserError(f"{model}: no projection differs from that of {base}; nothing to extract")
    write_factors(out, factors, scale=1.0, base=base)
    notes = []
    if others:
        count = f"{len(others)} tensor{'s' * (len(others) > 1)} that LoRA does not adapt"
        notes.append(
            f"{count} differ{'s' * (len(others) == 1)} too (such as {others[0]}): left out"
        )
    return AdapterResult(folder=out, tensors=tuple(tensors), notes=tuple(notes))


def merge_adapters(
    adapters: Mapping[str, float], out: Path, *, rank: int | None = None
) -> AdapterResult:
    """Write the weighted sum of the changes of LoRA adapters of one model as an adapter.

    The model is not needed. Without `rank` the result is exact, and its rank the sum of theirs.

    Args:
        adapters: folder, or name on Hugging Face, of each adapter to its weight.
        out: folder of the adapter, in PEFT's format.
        rank: maximum rank, to which the sum is compressed as well as possible.

    Raises:
        UserError: an adapter that cannot be read, or is not the product of two factors for each
            tensor (DoRA, embeddings, replaced modules); adapters of different models; or `out`
            exists.
    """
    if not adapters:
        raise UserError("merge-lora requires at least one --adapter ADAPTER=WEIGHT")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    resolve_new_folder(out)
    opened = {name: PeftAdapter(adapter_folder(name)) for name in adapters}
    for name, adapter in opened.items():
        _check_plain(name, adapter)
    bases = [adapter.base for adapter in opened.values() if adapter.base]
    factors: dict[str, tuple[Any, Any]] = {}
    tensors = []
    for tensor in sorted({tensor for adapter in opened.values() for tensor in adapter.pairs}):
        parts = [
            _read_pair(adapter, adapter.pairs[tensor], adapters[name])
            for name, adapter in opened.items()
            if tensor in adapter.pairs
        ]
        shapes = {(b.shape[0], a.shape[1]) for a, b in parts}
        if len(shapes) > 1:
            raise UserError(
                f"{', '.join(adapters)}: {tensor} has different shapes, "
                f"{' and '.join(str(list(shape)) for shape in sorted(shapes))}; use adapters of "
                "one model"
            )
        a, b = np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts], axis=1)
        error = 0.0
        if rank is not None and rank < len(a):
            full = jnp.matmul(b, a, precision="highest")
            a, b = map(np.asarray, compressed_factors(jnp.asarray(a), jnp.asarray(b), rank))
            error = float(relative_error(full, jnp.asarray(a), jnp.asarray(b)))
        module = tensor.removesuffix(".weight")
        factors[module] = a, b
        tensors.append(AdaptedTensor(name=module, rank=len(a), error=error))
    write_factors(out, factors, scale=1.0, base=next(iter(bases), ""))
    # Only a note: a folder may be a copy of a model that another adapter names as on Hugging Face.
    distinct = sorted({os.path.realpath(base) if os.path.isdir(base) else base for base in bases})
    notes = []
    if len(distinct) > 1:
        notes.append(
            f"the adapters are for different models ({', '.join(map(_quoted, distinct))}); unless "
            "these are the same, the sum fits none of them"
        )
    return AdapterResult(folder=out, tensors=tuple(tensors), notes=tuple(notes))


@partial(jax.jit, static_argnames="rank")
def _factors(
    old: jax.Array, new: jax.Array, key: jax.Array, *, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    change = new.astype(jnp.float32) - old.astype(jnp.float32)
    a, b = low_rank_factors(change, rank, key)
    return a, b, relative_error(change, a, b)


def _to_host(array: jax.Array) -> Any:
    """Return an array on the host, unless it is spread over several processes."""
    return np.asarray(array) if array.is_fully_addressable else array


def _quoted(base: str) -> str:
    """Return a name from an adapter's file for a message."""
    return truncated_repr(base, 200).strip("'")


def _check_plain(name: str, adapter: PeftAdapter) -> None:
    """Raise UserError unless every change is a product of two factors of a linear layer."""
    problem = "replaces modules" if adapter.replacements else ""
    if adapter.parameters or any(pair.experts is not None for pair in adapter.pairs.values()):
        problem = "adapts parameters of experts"
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        problem = "is a DoRA adapter, whose change depends on the model"
    if any(pair.transposed for pair in adapter.pairs.values()):
        problem = "adapts embeddings or transposed layers"
    if problem:
        raise UserError(f"{name}: {problem}; merge it into its model (MODEL+ADAPTER) instead")


def _read_pair(
    adapter: PeftAdapter, pair: LoraPair, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors in float32, with scale and weight in the left one."""
    a, b = (adapter.reader.read(name).astype(np.float32) for name in (pair.a, pair.b))
    return a, np.float32(pair.scale * weight) * b
