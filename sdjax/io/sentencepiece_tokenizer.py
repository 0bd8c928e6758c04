"""Tokenizers of folders that have only a SentencePiece model (`tokenizer.model`).

It becomes a tokenizer of the tokenizers library with the same ids, as transformers builds one if
the SentencePiece library is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.library_errors import library_errors
from sdjax.io.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)
from sdjax.io.tokenizer_settings import token_text

_SPACE = "▁"
# Tokenizer classes whose ids are those of the pieces, and types of models that have them.
_CLASSES = ("LlamaTokenizer", "GemmaTokenizer")
_MODEL_TYPES = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3")


def has_piece_ids(settings: Mapping[str, Any], model_config: Mapping[str, Any]) -> bool:
    """Return whether the ids of a tokenizer are those of its SentencePiece model.

    Args:
        settings: content of tokenizer_config.json.
        model_config: content of config.json.
    """
    name = settings.get("tokenizer_class")
    if name is None:
        return model_config.get("model_type") in _MODEL_TYPES
    return isinstance(name, str) and name.removesuffix("Fast") in _CLASSES


def build_tokenizer(path: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of a SentencePiece model.

    Args:
        path: the model.
        settings: content of tokenizer_config.json, after `check_settings`.

    Raises:
        UserError: the model is damaged, or of a kind that the tokenizers library does not have.
    """
    model = read_sentencepiece(path)
    if model.space_last or model.merge_spaces or model.model_type not in (UNIGRAM, BPE):
        raise UserError(
            f"{path}: a SentencePiece model of words or characters, or one that moves or merges "
            "spaces, is not supported; save the tokenizer with transformers as tokenizer.json"
        )
    with library_errors(path, "no tokenizer can be built from it"):
        tokenizer = tokenizers.Tokenizer(_algorithm(model))
        if model.charsmap:
            tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
        # With `legacy`, after each special token too.
        scheme = "always" if settings.get("legacy") is True else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme=scheme if model.add_prefix else "never", split=False
        )
        parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
        parts.append(decoders.Fuse())
        if model.add_prefix:
            parts.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(parts)
        for text, _, kind in model.pieces:
            if kind in (UNKNOWN, CONTROL, USER_DEFINED):
                _add(tokenizer, text, is_special=kind != USER_DEFINED)
        _add_declared(tokenizer, settings, path)
        _add_ends(tokenizer, settings)
    return tokenizer


def _algorithm(model: SentencePieceModel) -> models.Model:
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if model.model_type == UNIGRAM:
        scored = [(text, score) for text, score, _ in model.pieces]
        return models.Unigram(scored, unknown, model.byte_fallback)
    vocabulary = {text: index for index, (text, _, _) in enumerate(model.pieces)}
    return models.BPE(
        vocabulary,
        _merges(model),
        unk_token=None if unknown is None else model.pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return the pairs of pieces that are merged, the pair with the best result first.

    SentencePiece merges the two neighbors whose concatenation has the highest score.
    """
    normal = {text: index for index, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    merges = []
    for text, score, kind in model.pieces:
        if kind == NORMAL:
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in normal and right in normal:
                    merges.append((-score, normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add(tokenizer: tokenizers.Tokenizer, text: str, *, is_special: bool) -> None:
    token = tokenizers.AddedToken(text, normalized=False, special=is_special)
    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])


def _add_declared(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], path: Path) -> None:
    """Add the tokens of `added_tokens_decoder`, at the ids that it gives them."""
    declared = settings.get("added_tokens_decoder") or {}
    for number, token in sorted(declared.items(), key=lambda item: int(item[0])):
        text = token_text(token)
        assert text is not None  # checked with the other settings
        is_special = isinstance(token, Mapping) and bool(token.get("special"))
        _add(tokenizer, text, is_special=is_special)
        if (found := tokenizer.token_to_id(text)) != int(number):
            raise UserError(
                f"{path}: tokenizer_config.json gives {truncated_repr(text)} the id "
                f"{truncated_repr(number)}, but it is {found}; copy both files again"
            )


def _add_ends(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the start token to texts, and the end token if the settings say so."""
    ids: dict[str, int] = {}

    def end(name: str, *, default: bool) -> list[str]:
        text = token_text(settings.get(f"{name}_token"))
        number = None if text is None else tokenizer.token_to_id(text)
        wanted = settings.get(f"add_{name}_token")
        if text is None or number is None or not (default if wanted is None else wanted):
            return []
        ids[text] = number
        return [text]

    template = [*end("bos", default=True), "$A", *end("eos", default=False)]
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(ids.items())
        )
