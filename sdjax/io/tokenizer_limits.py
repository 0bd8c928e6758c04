"""Limits on tokenizer.json of others, with which a short text could explode.

Regular expressions need no limit: the tokenizers library panics (`library_errors`) when one takes
more than ten million steps (0.3 s) on a text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from sdjax.core.errors import UserError

MAX_GROWTH = 1_000  # of a text by normalizers or decoders; real ones grow it by 18 at most
MAX_TOKEN_LENGTH = 10_000  # characters


def check_growth(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Raise UserError if a tokenizer could turn a short text or a few tokens into a huge text.

    Args:
        tokenizer: the tokenizer.
        path: its file, for the error message.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(tokenizer, name)
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MAX_GROWTH:
            raise UserError(
                f"{path}: the {name} may make a text {growth:,.0f} times as long; use another "
                "tokenizer"
            )
    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0)
    if longest > MAX_TOKEN_LENGTH:
        raise UserError(f"{path}: a token of {longest:,} characters; use another tokenizer")


def _growth(part: Any) -> float:
    """Return by what factor a component, or the components in it, can make a text longer."""
    growth = 1.0
    if isinstance(part, Mapping):
        growth = _own_growth(part)
        part = list(part.values())
    for item in part if isinstance(part, list) else ():
        growth *= _growth(item)
    return growth


def _own_growth(part: Mapping[str, Any]) -> float:
    match part:
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(content)}:
            return max(1.0, len(content) / max(1, len(found)))
        case {"type": "Replace", "content": str(content)}:  # a regular expression may match nothing
            return 1.0 + len(content)
        case {"type": "Prepend", "prepend": str(content)}:
            return 1.0 + len(content)
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)} if encoded:
            charsmap = base64.b64decode(encoded)
            # The length of a trie, the trie, and the replacements of characters.
            replacements = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
            return float(max(1, *map(len, replacements.split(b"\0"))))
    return 1.0
