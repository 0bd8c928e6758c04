"""Vocabularies of model folders, and tokenizers with additional tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.atomic_write import write_file
from sdjax.io.library_errors import library_errors
from sdjax.io.safetensors_reader import read_json
from sdjax.io.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    load_full_tokenizer,
    read_sentencepiece_tokenizer,
    read_tokenizer_json,
)
from sdjax.io.tokenizer_settings import check_settings

MAX_TOKEN_ID = 2**24  # real vocabularies have up to 300,000 tokens


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Return a dict from token to id, with added tokens.

    Raises:
        UserError: the folder has no tokenizer, or a token id is above `MAX_TOKEN_ID` (a merge
            allocates a row for each id).
    """
    tokens = _backend(folder).get_vocab(with_added_tokens=True)
    token = max(tokens, key=tokens.__getitem__, default="")
    if tokens.get(token, 0) > MAX_TOKEN_ID:
        raise UserError(
            f"{folder}: the tokenizer gives {truncated_repr(token)} the id {tokens[token]:,}; ids "
            f"may be at most {MAX_TOKEN_ID:,}; copy its files again"
        )
    return tokens


def added_tokens(folder: Path) -> dict[str, tokenizers.AddedToken]:
    """Return the added tokens of a folder's tokenizer by text, in order of id."""
    tokens = _backend(folder).get_added_tokens_decoder()
    return {token.content: token for _, token in sorted(tokens.items())}


def write_extended(
    folder: Path, new: Mapping[str, tokenizers.AddedToken], out: Path
) -> dict[str, int]:
    """Write a folder's tokenizer with additional tokens; existing tokens keep their ids.

    Args:
        folder: the folder of the original tokenizer.
        new: text to added token, in the order of the new ids.
        out: the file to write.

    Returns:
        Token to id of the extended tokenizer.
    """
    backend = _backend(folder)
    with library_errors(folder, "tokens cannot be added to its tokenizer"):
        backend.add_tokens(list(new.values()))
        text = backend.to_str(pretty=True)
    write_file(out, text)
    return backend.get_vocab(with_added_tokens=True)


def _backend(folder: Path) -> tokenizers.Tokenizer:
    if (folder / TOKENIZER_FILE).is_file():
        return read_tokenizer_json(folder)
    settings = read_json(folder / TOKENIZER_CONFIG)
    check_settings(settings, folder / TOKENIZER_CONFIG)
    if (pieces := read_sentencepiece_tokenizer(folder, settings)) is not None:
        return pieces
    backend = getattr(load_full_tokenizer(folder), "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UserError(
            f"{folder}: its tokenizer has no {TOKENIZER_FILE}; save it with transformers as a fast "
            "tokenizer"
        )
    return backend
