"""Roles of the tensors outside the layers, and of config fields, in any family of models.

Families name their input and output matrices differently; these are the names in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sdjax.models.families import FAMILIES

TIE = "tie_word_embeddings"
# Sections of the language model in the config of a model with several parts.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
# Parts that read images or sound: a word in the names of their tensors and of their section of the
# config, and the keys that count their layers.
_PART_COUNTS = {
    "vis": ("num_hidden_layers", "depth", "num_layers", "layers", "n_layers"),
    "audio": ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers"),
}
# Parts of tensor names that differ between versions of transformers.
_MOVED = ("model", "language_model", "transformer", "bert", "roberta")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_OUTPUT = re.compile(
    r"(.*\.)?(lm_head(\.decoder)?|embed_out|output|cls\.predictions(\.decoder)?|vocab_projector"
    r"|shared_head\.head)\.(weight|bias)"
)
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
    return bool(_TOKENS.fullmatch(name)) and not is_other_part(name.replace("mtp.", ""))


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


def is_coder(prefix: str) -> bool:
    """Return whether a stack of layers is that of an encoder or a decoder."""
    return bool(re.search(r"(^|\.)(encoder|decoder)\.", prefix))


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


def layer_counts(config: Any) -> Iterator[tuple[Any, str]]:
    """Yield each section and key with the number of layers of the language model."""
    for section in text_sections(config):
        for key in _LAYER_COUNTS:
            if section.get(key) is not None:
                yield section, key


def stack_counts(config: Any, prefix: str) -> list[tuple[Any, str]]:
    """Return each section and key with the number of layers of a stack.

    Args:
        config: the model's config.
        prefix: the part of a tensor's name before the number of its layer.
    """
    for part, keys in _PART_COUNTS.items():
        if re.search(rf"(^|[._]){part}", prefix):
            sections = [v for k, v in config.items() if part in k and isinstance(v, Mapping)]
            return [(s, key) for s in sections for key in keys if s.get(key) is not None]
    coder = re.search(r"(^|\.)(encoder|decoder)\.", prefix)
    if coder is not None:
        own = [config.get(coder[2]), config.get(f"{coder[2]}_config"), config]
        names = (f"{coder[2]}_layers", f"num_{coder[2]}_layers")
        for section in own:
            keys = _LAYER_COUNTS if section is not config else names
            found = [k for k in keys if isinstance(section, Mapping) and section.get(k) is not None]
            if found:
                return [(section, key) for key in found]
        # T5 counts the layers of its encoder by `num_layers`, and those of its decoder too unless
        # `num_decoder_layers` is given.
        if config.get("is_encoder_decoder") and (
            coder[2] == "decoder" or config.get("num_decoder_layers") is None
        ):
            return []
    return list(layer_counts(config))


def core_name(name: str) -> str:
    """Return a tensor's name without the parts that versions of transformers move or omit.

    Examples:
        >>> core_name("language_model.model.norm.weight")
        'norm.weight'
        >>> core_name("model.language_model.norm.weight")
        'norm.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _MOVED) or name
