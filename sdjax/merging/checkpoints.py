"""The models of a recipe: where they lie, and what they are made of.

A tensor's name is Hugging Face's: either within a layer (``model.layers.3.mlp.up_proj.weight``) or
outside the layers. Nothing else about the family is assumed here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.errors import UserError
from sdjax.io.folders import locate
from sdjax.io.peft_adapter import AdaptedFolder, Tensors
from sdjax.io.tensor_folder import CONFIG, TensorFolder, read_json
from sdjax.models.spec import LAYER_TENSORS, OUTSIDE_TENSORS

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
VOCABULARY_TENSORS = (EMBEDDING, OUTPUT)  # their first axis is the vocabulary
_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..+)")
# Buffers that old checkpoints of the Llama family carry; they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"

_IN_LAYER = {f".{hf_name}": name for name, (hf_name, _) in LAYER_TENSORS.items()}
_OUTSIDE = {hf_name: name for name, (hf_name, _) in OUTSIDE_TENSORS.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model of a recipe.

    name: as the recipe has it. outside: the names of the tensors outside the layers; of a model
    that ties its output matrix to its embedding, that matrix is not among them. layers: for each
    layer, the ends of its tensors' names. prefix: what stands before the number of a layer.
    """

    name: str
    folder: Path
    tensors: Tensors
    config: Mapping[str, Any]
    outside: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    prefix: str

    def tensor(self, layer: int, end: str) -> str:
        """The name of a tensor within a layer."""
        return f"{self.prefix}{layer}{end}"


def open_checkpoint(name: str, beside: Path) -> Checkpoint:
    """Open MODEL or MODEL+ADAPTER: a folder beside ``beside``, in the working directory, on
    Hugging Face, or zoo:NAME. Raises UserError that names the folder or the file."""
    folder, adapter = locate(name, beside=beside)
    model = TensorFolder(folder)
    tensors: Tensors = model if adapter is None else AdaptedFolder(model, adapter)
    config = read_json(folder / CONFIG)
    if not config:
        raise UserError(f"{folder / CONFIG}: not found; a model folder needs it")
    outside, layers, prefix = _structure(folder, tensors, bool(config.get("tie_word_embeddings")))
    return Checkpoint(
        name=name,
        folder=folder,
        tensors=tensors,
        config=config,
        outside=outside,
        layers=layers,
        prefix=prefix,
    )


def _structure(
    folder: Path, tensors: Tensors, tied: bool
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    outside: list[str] = []
    layers: dict[int, list[str]] = {}
    prefixes: set[str] = set()
    for name in tensors.names:
        if name.endswith(_IGNORED_SUFFIX) or (tied and name == OUTPUT):
            continue
        match = _LAYER.fullmatch(name)
        if match is None:
            outside.append(name)
        else:
            prefixes.add(match[1])
            layers.setdefault(int(match[2]), []).append(match[3])
    if len(prefixes) != 1:
        raise UserError(f"{folder}: its tensors do not make up one stack of layers")
    ends = tuple(tuple(sorted(layers.get(index, ()))) for index in range(max(layers) + 1))
    return tuple(outside), ends, prefixes.pop()


@functools.cache
def tensor_path(name: str) -> str:
    """Our path of a tensor in Hugging Face's name; an unknown name is its own path."""
    match = _LAYER.fullmatch(name)
    if match and match[1] == "model.layers." and match[3] in _IN_LAYER:
        return f"layers/{match[2]}/{_IN_LAYER[match[3]]}"
    return _OUTSIDE.get(name, name)
