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

from sdjax.core.errors import UserError
from sdjax.io.model_paths import locate
from sdjax.io.peft import AdaptedReader, TensorReader
from sdjax.io.safetensors_reader import CONFIG, SafetensorsReader, read_json
from sdjax.models.families import FAMILIES, Family
from sdjax.models.params import LAYER_TENSORS, OUTSIDE_TENSORS, layer_tensors

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
VOCABULARY_TENSORS = (EMBEDDING, OUTPUT)  # their first axis is the vocabulary
_LAYER = re.compile(r"(.*?\blayers\.)([0-9]{1,9})(\..+)")
# Buffers that old checkpoints of the Llama family carry; they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"

_IN_LAYER = {f".{hf_name}": name for name, (hf_name, _) in LAYER_TENSORS.items()}
_OUTSIDE = {hf_name: name for name, (hf_name, _) in OUTSIDE_TENSORS.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceModel:
    """A model of a recipe.

    name: as the recipe has it. outside: the names of the tensors outside the layers; of a model
    that ties its output matrix to its embedding, that matrix is not among them. layers: for each
    layer, the ends of its tensors' names. prefix: what stands before the number of a layer.
    """

    name: str
    folder: Path
    tensors: TensorReader
    config: Mapping[str, Any]
    outside: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    prefix: str

    def tensor(self, layer: int, end: str) -> str:
        """The name of a tensor within a layer."""
        return f"{self.prefix}{layer}{end}"


def open_source_model(name: str, beside: Path) -> SourceModel:
    """Open MODEL or MODEL+ADAPTER: a folder beside ``beside``, in the working directory, on
    Hugging Face, or zoo:NAME. Raises UserError that names the folder or the file.
    """
    folder, adapter = locate(name, relative_to=beside)
    tensors = SafetensorsReader(folder) if adapter is None else AdaptedReader(folder, adapter)
    config = read_json(folder / CONFIG)
    if not config:
        raise UserError(f"{folder / CONFIG}: not found; a model folder needs it")
    family = FAMILIES.get(str(config.get("model_type")))
    defaults = family.defaults if family else {}
    tied = bool({**defaults, **config}.get("tie_word_embeddings"))
    if tied and isinstance(tensors, AdaptedReader) and OUTPUT in tensors.adapted:
        raise UserError(
            f"{adapter}: adapts {OUTPUT}, which {folder} ties to its embedding; merge it with peft"
        )
    outside, layers, prefix = _structure(folder, tensors, tied)
    _check_count(folder, config, len(layers))
    if family and family.architecture in (config.get("architectures") or ()):
        _check_complete(folder, tensors, family, len(layers), tied)
    return SourceModel(
        name=name,
        folder=folder,
        tensors=tensors,
        config=config,
        outside=outside,
        layers=layers,
        prefix=prefix,
    )


def _structure(
    folder: Path, tensors: TensorReader, tied: bool
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
    prefix = prefixes.pop()
    for index in range(len(layers)):
        if index not in layers:
            raise UserError(
                f"{folder}: has {prefix}{max(layers)} but no {prefix}{index}; copy the model again"
            )
    return tuple(outside), tuple(tuple(sorted(layers[i])) for i in range(len(layers))), prefix


def _check_count(folder: Path, config: Mapping[str, Any], count: int) -> None:
    said = config.get("num_hidden_layers")
    # Layers that predict further tokens stand behind the others and are not counted.
    further = config.get("num_nextn_predict_layers")
    wanted = (
        (said, said + further) if isinstance(said, int) and isinstance(further, int) else (said,)
    )
    if said is not None and count not in wanted:
        raise UserError(
            f"{folder}: has {count} layers, {CONFIG} says num_hidden_layers {said!r}; copy "
            f"the model again, or correct {CONFIG}"
        )


def _check_complete(
    folder: Path, tensors: TensorReader, family: Family, count: int, tied: bool
) -> None:
    needed = [hf for name, (hf, _) in OUTSIDE_TENSORS.items() if name != "lm_head" or not tied]
    ends = [LAYER_TENSORS[name][0] for name in layer_tensors(family)]
    needed += [f"model.layers.{layer}.{end}" for layer in range(count) for end in ends]
    if missing := sorted(set(needed) - set(tensors.names)):
        raise UserError(
            f"{folder}: lacks tensor {missing[0]}, which every {family.architecture} has; "
            "copy the model again"
        )


@functools.cache
def tensor_path(name: str) -> str:
    """Our path of a tensor in Hugging Face's name; an unknown name is its own path."""
    match = _LAYER.fullmatch(name)
    if match and match[1] == "model.layers." and match[3] in _IN_LAYER:
        return f"layers/{match[2]}/{_IN_LAYER[match[3]]}"
    return _OUTSIDE.get(name, name)
