"""Roles of the tensors outside the layers, and of config fields, in any family of models.

Families name their input and output matrices differently; these are the names in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdjax.models.families import FAMILIES

TIE = "tie_word_embeddings"
# Sections of the language model in the config of a model with several parts.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_OUTPUT = re.compile(r"(.*\.)?(lm_head|embed_out|output|cls\.predictions\.decoder)\.(weight|bias)")
_TOKENS = re.compile(
    r"(.*\.)?(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embeddings|shared)\.weight"
)
_BEFORE = re.compile(
    r"(.*[._])?(embed\w*|w[tp]e|per_layer\w*|vis\w+|image\w*|patch\w*|audio\w*|\w*projector)\..*"
    r"|.*_embeddings?\w*\..*"
)


def is_output_matrix(name: str) -> bool:
    """Return whether a tensor outside the layers maps hidden states to logits (or is its bias)."""
    return bool(_OUTPUT.fullmatch(name)) and not is_other_part(name)


def is_token_embedding(name: str) -> bool:
    """Return whether a tensor outside the layers has a row for each input token."""
    return bool(_TOKENS.fullmatch(name)) and not is_other_part(name)


def precedes_layers(name: str) -> bool:
    """Return whether a tensor outside the layers is used before the first layer.

    These are embeddings and the parts of a model that read images and sound. All others, such as
    the last norm and the output matrix, follow the last layer.
    """
    return not is_output_matrix(name) and bool(_BEFORE.fullmatch(name))


def is_other_part(name: str) -> bool:
    """Return whether a tensor or stack belongs to a part other than the language model.

    Such parts read images and sound, or predict several tokens.
    """
    return bool(re.search(r"(^|[._])(vis\w+|image\w*|audio\w*|mtp)\.", name))


def text_sections(config: Any) -> Iterable[Any]:
    """Yield the config, then its sections of the language model."""
    yield config
    for key in _TEXT_SECTIONS:
        if isinstance(config.get(key), Mapping):
            yield from text_sections(config[key])


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Return whether the output matrix is the embedding; None if the config does not say so."""
    for section in text_sections(config):
        if section.get(TIE) is not None:
            return bool(section[TIE])
    for section in text_sections(config):
        family = FAMILIES.get(str(section.get("model_type")))
        if family is not None:
            return bool(family.defaults.get(TIE, False))
    return None


def layer_count(config: Any) -> tuple[Any, str] | None:
    """Return the section and the key with the number of layers, or None."""
    for section in text_sections(config):
        for key in _LAYER_COUNTS:
            if section.get(key) is not None:
                return section, key
    return None
