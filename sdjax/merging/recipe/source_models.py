"""Source models of a recipe: their folders, tensors and layers.

Tensors have Hugging Face names, either within a layer (`model.layers.3.mlp.up_proj.weight`) or
outside the layers. Nothing else is assumed about the model family.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.adapted_reader import open_weights
from sdjax.io.model_paths import locate
from sdjax.io.safetensors_reader import CONFIG
from sdjax.io.safetensors_writer import DTYPES
from sdjax.io.tensor_reader import TensorInfo, TensorReader
from sdjax.io.weights import read_model_config
from sdjax.merging.recipe.tensor_roles import (
    core_name,
    is_coder,
    is_other_part,
    is_output_matrix,
    is_token_embedding,
    layer_counts,
    precedes_layers,
    ties_embeddings,
)
from sdjax.models.families import FAMILIES, Family
from sdjax.models.params import LAYER_TENSORS, OUTSIDE_TENSORS, layer_tensors
from sdjax.models.tensor_names import layer_depths, parse_name

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# A tensor in a layer, of the outermost stack: what precedes the layer's number, and what follows.
_LAYER = re.compile(r"((?:.*?\.)?(?:layers?|blocks?|h)\.)([0-9]{1,9})(\..+)")
_PREDICTION = (".embed_tokens.weight", ".shared_head.head.weight")
# Buffers in old checkpoints of the Llama family, which follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceModel:
    """One of the models to merge.

    Attributes:
        name: its name in the recipe.
        folder: its folder.
        reader: reads its tensors, with an adapter merged into them if there is one.
        info: shape and dtype of its tensors.
        config: its config.json.
        tied: whether the output matrix is the embedding; None if the config does not say so.
        outside: names of the tensors outside the layers, excluding an output matrix that is tied to
            the embedding.
        layers: for each layer of the language model, the suffixes of its tensors' names; empty for
            a model that is not one stack of layers, such as an encoder with a decoder.
        prefix: the part of a tensor's name before the layer index.
        notes: remarks on tensors that are left out.
    """

    name: str
    folder: Path
    reader: TensorReader
    info: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    tied: bool | None
    outside: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    prefix: str
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def vocabulary_tensors(self) -> frozenset[str]:
        """Names of the tensors whose first axis is the vocabulary.

        In a layer, these are the embedding and the output matrix of multi-token prediction.
        """
        outside = [
            name
            for name in self.outside
            if parse_name(name).layer is None
            and (is_token_embedding(name) or is_output_matrix(name))
        ]
        inside = (
            f"{self.prefix}{index}{suffix}"
            for index, suffixes in enumerate(self.layers)
            for suffix in suffixes
            if suffix in _PREDICTION
        )
        return frozenset((*outside, *inside))

    @functools.cached_property
    def num_rows(self) -> int | None:
        """Number of rows of the token embedding, or None if no tensor is known to be one."""
        names = (n for n in self.outside if parse_name(n).layer is None)
        embeddings = [name for name in names if is_token_embedding(name)]
        return self.info[embeddings[0]].shape[0] if embeddings else None

    def counterpart(self, name: str) -> str | None:
        """Return the name of a tensor of another model in this one, or None if it has none.

        Names may differ in parts that versions of transformers move or omit, such as `model.`.
        """
        if name in self.info:
            return name
        return self._by_core_name.get(core_name(name))

    @functools.cached_property
    def _by_core_name(self) -> Mapping[str, str]:
        names: dict[str, str] = {}
        for name in self.info:
            core = core_name(name)
            if core in names:  # ambiguous
                return {}
            names[core] = name
        return names

    def depth(self, name: str) -> float:
        """Return the depth in [0, 1] of a tensor outside these layers that has a layer of its own.

        An example is a layer of a vision tower. All others are at -1.
        """
        return self._depths.get(parse_name(name).path, -1.0)

    @functools.cached_property
    def _depths(self) -> Mapping[str, float]:
        return layer_depths(map(parse_name, self.outside))

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors: what precedes the layers, the layers, the others."""
        in_layers = [
            f"{self.prefix}{i}{end}" for i, suffixes in enumerate(self.layers) for end in suffixes
        ]
        first = [name for name in self.outside if precedes_layers(name)]
        return [*first, *in_layers, *(name for name in self.outside if name not in first)]


def open_source_model(
    name: str, relative_to: Path, *, architecture: str | None = None
) -> SourceModel:
    """Open a model and check that it is complete.

    Args:
        name: MODEL or MODEL+ADAPTER: a folder, OWNER/NAME on Hugging Face, or zoo:NAME.
        relative_to: folder that paths are relative to, before the working directory.
        architecture: replaces the architectures that its config names.

    Raises:
        UserError: a missing or damaged file, or a missing layer.
    """
    folder, adapter = locate(name, relative_to=relative_to)
    reader = open_weights(folder, adapter)
    config = read_model_config(folder)
    if not config:
        raise UserError(f"{folder / CONFIG}: not found; a model folder needs it")
    if architecture is not None:
        config = {**config, "architectures": [architecture]}
    architectures = _read_fields(folder, config)
    family = FAMILIES.get(str(config.get("model_type")))
    tied = ties_embeddings(config)
    if tied and OUTPUT in reader.adapted:
        raise UserError(
            f"{adapter}: adapts {OUTPUT}, which {folder} ties to its embedding; merge the adapter "
            "with peft first"
        )
    names = [
        name
        for name in reader.names
        if not (name.endswith(_IGNORED_SUFFIX) or (tied and name == OUTPUT))
    ]
    infos = reader.infos(names)
    info = {name: infos[name] for name in names}  # the reader adds others
    prefix, layers, outside = main_stack(names, config, folder)
    if layers:
        _check_num_layers(folder, config, len(layers))
    notes = [f"{name}: {note}" for note in reader.notes]
    if any(info[n].dtype == np.float64 for n in names):
        notes.append(f"{name}: has float64 tensors, which are merged in float32 like all others")
    if tied and not _is_embedding(reader, OUTPUT):
        notes.append(
            f"{name}: {OUTPUT} differs from the embedding, to which {CONFIG} ties it: left out, as "
            "transformers does"
        )
    if family and family.architecture in architectures:
        _check_complete(folder, reader, family, len(layers), bool(tied))
        known = {hf_name for hf_name, _ in OUTSIDE_TENSORS.values()}
        extra = [n for n in outside if n not in known and info[n].dtype in DTYPES.values()]
        if extra:
            notes.append(
                f"{name}: {len(extra)} tensor{'s' * (len(extra) > 1)} that a "
                f"{family.architecture} does not have (such as {extra[0]}): left out"
            )
            outside = tuple(n for n in outside if n not in extra)
            info = {n: value for n, value in info.items() if n not in extra}
    return SourceModel(
        name=name,
        folder=folder,
        reader=reader,
        info=info,
        config=config,
        tied=tied,
        outside=outside,
        layers=layers,
        prefix=prefix,
        notes=tuple(notes),
    )


def _read_fields(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Check the fields that a merge reads of any family's config; return its architectures."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        shown = truncated_repr(architectures)
        raise UserError(f"{folder / CONFIG}: architectures must be a list of names, not {shown}")
    for section, key in layer_counts(config):
        if isinstance(section[key], bool) or not isinstance(section[key], int):
            shown = truncated_repr(section[key])
            raise UserError(f"{folder / CONFIG}: {key} must be an integer, not {shown}")
    return architectures


def _is_embedding(reader: TensorReader, output: str) -> bool:
    """Return whether the output matrix equals the embedding; True if one of them is not stored."""
    if output not in reader.names or EMBEDDING not in reader.names:
        return True
    first, second = (reader.read(name) for name in (EMBEDDING, output))
    return first.dtype == second.dtype and np.array_equal(
        first.view(np.uint8), second.view(np.uint8)
    )


Layers = tuple[tuple[str, ...], ...]


def main_stack(
    names: Iterable[str], config: Mapping[str, Any], folder: Path, *, parts: bool = False
) -> tuple[str, Layers, tuple[str, ...]]:
    """Find the layers among the tensors of a model, or of a part of one.

    Args:
        names: names of the tensors.
        config: the model's config.
        folder: the model's folder, for error messages.
        parts: whether layers that read images or sound may be the stack.

    Returns:
        The part of a tensor's name before the number of its layer, the suffixes of each layer's
        names, and the names outside the layers. The first two are empty if there is not exactly
        one stack of layers.

    Raises:
        UserError: a layer is missing.
    """
    names = tuple(names)
    stacks: dict[str, dict[int, list[str]]] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        stacks.setdefault(match[1], {}).setdefault(int(match[2]), []).append(match[3])
    candidates = [prefix for prefix in stacks if parts or not is_other_part(prefix)]
    if len(candidates) > 1 and not any(map(is_coder, candidates)):
        counts = {section[key] for section, key in layer_counts(config)}
        candidates = [prefix for prefix in candidates if len(stacks[prefix]) in counts]
    if len(candidates) != 1:
        return "", (), names
    (prefix,) = candidates
    layers = stacks[prefix]
    for index in range(len(layers)):
        if index not in layers:
            raise UserError(
                f"{folder}: has {prefix}{max(layers)} but no {prefix}{index}; copy the model again"
            )
    suffixes = tuple(tuple(sorted(layers[i])) for i in range(len(layers)))
    return prefix, suffixes, tuple(n for n in names if not n.startswith(prefix))


def _check_num_layers(folder: Path, config: Mapping[str, Any], count: int) -> None:
    counts = list(layer_counts(config))
    allowed = [section[key] for section, key in counts]
    # Layers for multi-token prediction follow the others and are not counted.
    extra = [section.get("num_nextn_predict_layers") for section, _ in counts]
    allowed += [
        number + more for number, more in zip(allowed, extra, strict=True) if type(more) is int
    ]
    if allowed and count not in allowed:
        raise UserError(
            f"{folder}: has {count} layers, but {counts[0][1]} in {CONFIG} is {allowed[0]!r}; "
            f"copy the model again, or correct {CONFIG}"
        )


def _check_complete(
    folder: Path, reader: TensorReader, family: Family, num_layers: int, tied: bool
) -> None:
    required = [hf for name, (hf, _) in OUTSIDE_TENSORS.items() if name != "lm_head" or not tied]
    suffixes = [LAYER_TENSORS[name][0] for name in layer_tensors(family)]
    required += [f"model.layers.{i}.{suffix}" for i in range(num_layers) for suffix in suffixes]
    if missing := sorted(set(required) - set(reader.names)):
        raise UserError(
            f"{folder}: lacks tensor {missing[0]}, which every {family.architecture} has; "
            "copy the model again"
        )
