"""PEFT adapter folders written from the LoRA factors of each module."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax

from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes
from sdjax.io.atomic_write import resolve_new_folder, staged_folder, write_file
from sdjax.io.safetensors_writer import write_safetensors
from sdjax.io.weights import ADAPTER_SAFETENSORS

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# Suffixes of the tensor names of (A, B) of a linear layer.
LINEAR = (".lora_A.weight", ".lora_B.weight")


def write_factors(
    folder: Path,
    factors: Mapping[str, tuple[Any, Any]],
    *,
    scale: float,
    base: str,
    extra_files: Iterable[Path] = (),
) -> None:
    """Write an adapter that PEFT can load; the folder appears only when it is complete.

    With several processes, all of them must call this; the first one writes.

    Args:
        folder: must not exist, or must be empty.
        factors: Hugging Face's name of a module to its factors (A [rank, in], B [out, rank]).
        scale: factor of all changes, scale * B @ A.
        base: the model that the adapter is for, a folder or a name.
        extra_files: files to copy into the folder.

    Raises:
        UserError: the folder is not empty, or a factor is not finite.
    """
    resolve_new_folder(folder)
    tensors = {
        f"{PREFIX}{module}{suffix}": factor
        for module, pair in factors.items()
        for suffix, factor in zip(LINEAR, pair, strict=True)
    }
    ranks = {module: a.shape[0] for module, (a, _) in factors.items()}
    rank = max(ranks.values())
    smaller = {module: own for module, own in ranks.items() if own != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": smaller,
        "alpha_pattern": {module: scale * own for module, own in smaller.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({module.split(".")[-1] for module in ranks}),
    }
    with staged_folder(folder) if jax.process_index() == 0 else nullcontext() as staged:
        write_safetensors(None if staged is None else staged / ADAPTER_SAFETENSORS, tensors)
        if staged is not None:
            write_file(staged / ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
            for file in extra_files:
                write_file(staged / file.name, read_bytes(file, MAX_VOCABULARY_BYTES))
