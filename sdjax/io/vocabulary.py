"""Vocabularies of model folders: which token has which id, and tokenizers with tokens added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from sdjax.io.tokenizer import FILE, load_full_tokenizer, read_file


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token to id, added tokens included. Raises UserError where there is no tokenizer."""
    return _backend(folder).get_vocab(with_added_tokens=True)


def added_tokens(folder: Path) -> dict[str, tokenizers.AddedToken]:
    """The added tokens of a folder's tokenizer by their text, in order of id."""
    found = _backend(folder).get_added_tokens_decoder()
    return {token.content: token for _, token in sorted(found.items())}


def write_extended(
    folder: Path, new: Mapping[str, tokenizers.AddedToken], out: Path
) -> dict[str, int]:
    """Write a folder's tokenizer with further tokens, in their order; the vocabulary that it has.

    What is in the tokenizer already keeps its id.
    """
    backend = _backend(folder)
    backend.add_tokens(list(new.values()))
    backend.save(str(out))
    return backend.get_vocab(with_added_tokens=True)


def _backend(folder: Path) -> tokenizers.Tokenizer:
    if (folder / FILE).is_file():
        return read_file(folder)
    return load_full_tokenizer(folder).backend_tokenizer
