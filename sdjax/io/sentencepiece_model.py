"""SentencePiece models (Kudo and Richardson, arXiv 1808.06226), read without the library.

The file is a protocol buffer (sentencepiece_model.proto) with the pieces, their scores and how
texts are normalized.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes

MAX_PIECES = 1_000_000
MAX_CHARACTERS = 3_000_000  # of all pieces
_MAX_PIECE = 1_000  # characters
# Algorithms, and types of pieces.
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@dataclass(kw_only=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        pieces: text, score and type of each token, in order of the ids.
        model_type: number of the algorithm.
        byte_fallback: whether unknown characters become bytes.
        charsmap: compiled rules for the normalization of characters.
        add_prefix: whether a space is put before a text.
        merge_spaces: whether spaces are removed at the ends, and merged elsewhere.
        space_last: whether spaces are at the ends of pieces instead of their beginnings.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_prefix: bool = True
    merge_spaces: bool = True
    space_last: bool = False


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model.

    Raises:
        UserError: it is damaged, too large, or another kind of file.
    """
    content = memoryview(read_bytes(path, MAX_VOCABULARY_BYTES))
    try:
        return _parse(content)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not a SentencePiece model ({error}); copy the file again, or save the "
            "tokenizer with transformers as tokenizer.json"
        ) from None


def _parse(content: memoryview) -> SentencePieceModel:
    model, seen, characters = SentencePieceModel(), set(), 0
    for number, value in _fields(content):
        if number == 1 and isinstance(value, memoryview):
            piece = _parse_piece(value)
            characters += len(piece[0])
            if len(model.pieces) >= MAX_PIECES or characters > MAX_CHARACTERS:
                raise ValueError(f"more than {len(model.pieces):,} pieces")
            if piece[0] in seen:
                raise ValueError(f"the piece {truncated_repr(piece[0])} is there twice")
            seen.add(piece[0])
            model.pieces.append(piece)
        elif number == 2 and isinstance(value, memoryview):
            trainer = dict(_fields(value))
            model.model_type = _integer(trainer.get(3, UNIGRAM))
            model.byte_fallback = bool(_integer(trainer.get(35, 0)))
            model.space_last = bool(_integer(trainer.get(24, 0)))
        elif number == 3 and isinstance(value, memoryview):
            rules = dict(_fields(value))
            charsmap = rules.get(2)
            model.charsmap = bytes(charsmap) if isinstance(charsmap, memoryview) else b""
            model.add_prefix = bool(_integer(rules.get(3, 1)))
            model.merge_spaces = bool(_integer(rules.get(4, 1)))
    if not model.pieces:
        raise ValueError("it has no pieces")
    return model


def _parse_piece(content: memoryview) -> tuple[str, float, int]:
    fields = dict(_fields(content))
    text, score, kind = fields.get(1), fields.get(2, 0.0), fields.get(3, NORMAL)
    if not isinstance(text, memoryview) or not isinstance(score, float) or type(kind) is not int:
        raise ValueError("a piece is damaged")
    decoded = bytes(text).decode()
    if not 0 < len(decoded) <= _MAX_PIECE or not math.isfinite(score):
        raise ValueError(f"a piece of {len(decoded):,} characters and the score {score}")
    return decoded, score, kind


def _integer(value: int | float | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a setting is not an integer")
    return value


def _fields(content: memoryview) -> Iterator[tuple[int, int | float | memoryview]]:
    """Yield number and value of each field of a message."""
    position = 0

    def integer() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(content) or shift > 63:
                raise ValueError("a message ends too early")
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def part(size: int) -> memoryview:
        nonlocal position
        if size > len(content) - position:
            raise ValueError("a message ends too early")
        position += size
        return content[position - size : position]

    while position < len(content):
        key = integer()
        match key & 7:
            case 0:
                yield key >> 3, integer()
            case 1:
                yield key >> 3, part(8)
            case 2:
                yield key >> 3, part(integer())
            case 5:
                yield key >> 3, struct.unpack("<f", part(4))[0]
            case wire_type:
                raise ValueError(f"a field of type {wire_type}")
