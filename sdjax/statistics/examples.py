"""The examples that statistics are computed from, as batches of equal shape.

Axes: batch (examples of a batch), time (tokens of the longest of them, rounded up).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.jsonl import read_jsonl
from sdjax.io.tokenizer import Tokenizer
from sdjax.training.data import TrainingRow, tokenize_examples
from sdjax.training.packing import Example, bucket_size
from sdjax.training.types import Batch

_FIELDS = "text, or prompt and completion, or messages"


def read_texts(
    path: str, tokenizer: Tokenizer, max_length: int, limit: int | None
) -> list[Example]:
    """Read the examples of a JSONL file.

    A row has the field text, all of whose tokens but the first are targets, or the fields of
    training data: prompt and completion, or messages.

    Args:
        path: the file.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of an example.
        limit: maximum number of rows.

    Raises:
        UserError: no such file, a row without these fields or with an empty text, or no rows.
    """
    examples: list[Example] = []
    others = []
    for number, fields in read_jsonl(path, ())[:limit]:
        where = f"{path}, line {number}"
        if "text" not in fields:
            if not fields.keys() & {"prompt", "messages"}:
                found = ", ".join(fields)[:200] or "none"
                raise UserError(f"{where}: needs the field {_FIELDS}; found: {found}")
            others.append(TrainingRow(where=where, fields=fields))
        elif not isinstance(fields["text"], str):
            raise UserError(f"{where}: text must be a string")
        else:
            ids = tokenizer.encode(fields["text"], add_special=True)
            tokens = [*ids, *tokenizer.eos_ids[:1]][:max_length]
            if len(tokens) < 2:
                raise UserError(f"{where}: the text has no tokens to predict; remove the row")
            examples.append(Example(prompt=(tokens[0],), target=tuple(tokens[1:])))
    if others:
        examples += tokenize_examples(others, tokenizer, max_length)
    if not examples:
        raise UserError(f"{path}: no examples; add at least one row")
    return examples


def batches(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Yield batches of examples of similar lengths, in the same order every time.

    Args:
        examples: the examples.
        size: examples per batch; the last batch is filled up with empty ones.

    Yields:
        `tokens` [batch, time] int32, padded at the end; `lengths` and `prompts` [batch] int32, the
        numbers of all tokens and of those before the targets; `index` [batch] int32, the numbers of
        the examples.
    """
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        time = bucket_size(max(len(examples[row]) for row in rows))
        batch = {name: np.zeros(size, np.int32) for name in ("lengths", "prompts", "index")}
        batch["tokens"] = np.zeros((size, time), np.int32)
        for position, row in enumerate(rows):
            tokens = examples[row].prompt + examples[row].target
            batch["tokens"][position, : len(tokens)] = tokens
            batch["lengths"][position] = len(tokens)
            batch["prompts"][position] = len(examples[row].prompt)
            batch["index"][position] = row
        yield batch


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a digest of the tokens of examples."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([len(example.prompt), -1, *example.prompt], np.int64).tobytes())
        digest.update(np.array([len(example.target), -1, *example.target], np.int64).tobytes())
    return digest.hexdigest()
