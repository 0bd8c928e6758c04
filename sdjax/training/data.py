"""Training data from the user: JSONL files and datasets, converted to tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sdjax.core.errors import UserError
from sdjax.io.hub import HubError, load_dataset
from sdjax.io.jsonl import read_jsonl
from sdjax.io.tokenizer import Tokenizer
from sdjax.training.dpo import TokenPair
from sdjax.training.packing import Example

logger = logging.getLogger(__name__)

# A string, or chat messages with role and content.
TextOrMessages: TypeAlias = str | list[dict[str, Any]]

# Prefix of names of datasets of the `datasets` library.
DATASETS = "datasets:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One row of training data.

    Attributes:
        where: file and line, or dataset and row, for error messages.
        fields: name to value.
    """

    where: str
    fields: Mapping[str, Any]


def number_rows(source: str, fields: Iterable[Mapping[str, Any]]) -> list[TrainingRow]:
    """Return rows with locations "SOURCE, row 1", "SOURCE, row 2", ... for error messages."""
    return [
        TrainingRow(where=f"{source}, row {number}", fields=row)
        for number, row in enumerate(fields, 1)
    ]


def fingerprint(rows: Sequence[TrainingRow]) -> str:
    """Return a hexadecimal digest of the rows' fields."""
    text = json.dumps([row.fields for row in rows], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(data: str, split: str) -> list[TrainingRow]:
    """Read the rows of a JSONL file, or of `datasets:NAME`, where NAME may be a folder.

    Args:
        data: path of the file, or "datasets:" and the name of a dataset.
        split: split of the dataset; unused for a file.

    Raises:
        UserError: the file or dataset does not exist, is damaged, or has no rows.
    """
    if data.startswith(DATASETS):
        rows = number_rows(data, _load_dataset(data.removeprefix(DATASETS), split))
    else:
        rows = [
            TrainingRow(where=f"{data}, line {number}", fields=fields)
            for number, fields in read_jsonl(data, ())
        ]
    if not rows:
        raise UserError(f"{data}: no examples; add at least one row")
    return rows


def _load_dataset(name: str, split: str) -> Iterable[dict[str, Any]]:
    try:
        return load_dataset(name, split=split)
    except HubError as error:
        raise UserError(
            f"{DATASETS}{name}, split {split}: cannot be loaded ({error}); check the name and the "
            "split, or copy the dataset to a folder"
        ) from None


def tokenize_pairs(
    rows: Sequence[TrainingRow], tokenizer: Tokenizer, max_length: int
) -> list[TokenPair]:
    """Return preference pairs of at most `max_length` tokens per side.

    Rows have the fields prompt, chosen and rejected, each a string or a list of chat messages. The
    prompt may be omitted if the other two are conversations; it is then their common prefix.

    Args:
        rows: rows of training data.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of prompt plus completion; see `truncate_prompts`.

    Raises:
        UserError: a row lacks a field or has equal completions, or no pair fits.
    """
    sides = []
    for row in rows:
        prompt, chosen, rejected = _preference(row)
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise UserError(
                f"{row.where}: chosen and rejected must both be strings or both be messages"
            )
        pair = [_tokenize(row, tokenizer, prompt, side) for side in (chosen, rejected)]
        if pair[0] == pair[1]:
            raise UserError(f"{row.where}: chosen and rejected are equal; remove the row")
        sides.append(pair)
    fitting = truncate_prompts(sides, max_length)
    if not fitting:
        raise UserError(f"{rows[0].where} and all other rows: no pair{_does_not_fit(max_length)}")
    return [TokenPair(chosen=chosen, rejected=rejected) for chosen, rejected in fitting]


def tokenize_examples(
    rows: Sequence[TrainingRow], tokenizer: Tokenizer, max_length: int
) -> list[Example]:
    """Return examples of at most `max_length` tokens.

    Rows have the fields prompt and completion, or the field messages, whose last message is the
    target.

    Args:
        rows: rows of training data.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of prompt plus completion; see `truncate_prompts`.

    Raises:
        UserError: a row lacks a field, or no example fits.
    """
    examples = []
    for row in rows:
        prompt: TextOrMessages
        completion: TextOrMessages
        if "messages" in row.fields:
            messages = _text_or_messages(row, "messages", row.fields["messages"])
            if not isinstance(messages, list) or len(messages) < 2:
                raise UserError(f"{row.where}: messages must be a list of at least two messages")
            prompt, completion = messages[:-1], messages[-1:]
        else:
            prompt, completion = _field(row, "prompt"), _field(row, "completion")
        examples.append([_tokenize(row, tokenizer, prompt, completion)])
    fitting = truncate_prompts(examples, max_length)
    if not fitting:
        raise UserError(
            f"{rows[0].where} and all other rows: no example{_does_not_fit(max_length)}"
        )
    return [example for (example,) in fitting]


def _does_not_fit(max_length: int) -> str:
    return (
        f" fits into {max_length} tokens; raise max_length, up to the model's maximum sequence "
        "length"
    )


def truncate_prompts(
    rows: Sequence[Sequence[Example]], max_length: int
) -> list[tuple[Example, ...]]:
    """Truncate prompts from the left to `max_length`, equally for all examples of a row.

    Completions are never truncated: a row is dropped if a completion leaves no room for a single
    token of the prompt. The numbers of truncated and dropped rows are logged.

    Args:
        rows: groups of examples that share a prompt.
        max_length: maximum tokens of prompt plus completion.
    """
    kept: list[tuple[Example, ...]] = []
    truncated = 0
    for row in rows:
        room = max_length - max(len(example.target) for example in row)
        if room < 1:
            continue
        truncated += any(len(example.prompt) > room for example in row)
        kept.append(
            tuple(dataclasses.replace(example, prompt=example.prompt[-room:]) for example in row)
        )
    if truncated:
        logger.warning("%d of %d prompts were truncated from the left", truncated, len(rows))
    if dropped := len(rows) - len(kept):
        logger.warning(
            "%d of %d rows were dropped because a completion does not fit into %d tokens; to train "
            "on them, raise max_length, up to the model's maximum sequence length",
            dropped,
            len(rows),
            max_length,
        )
    return kept


def _preference(row: TrainingRow) -> tuple[TextOrMessages, TextOrMessages, TextOrMessages]:
    """Return (prompt, chosen, rejected)."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if "prompt" in row.fields:
        return _field(row, "prompt"), chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise UserError(
            f"{row.where}: missing field prompt; it is optional only if chosen and rejected are "
            "conversations"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise UserError(f"{row.where}: chosen and rejected are equal; remove the row")
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise UserError(
            f"{row.where}: without a prompt, chosen and rejected must share their first messages "
            "and differ in the rest"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _field(row: TrainingRow, name: str) -> TextOrMessages:
    if name not in row.fields:
        raise UserError(
            f"{row.where}: missing field {name}; the fields are {', '.join(row.fields)}"
        )
    return _text_or_messages(row, name, row.fields[name])


def _text_or_messages(row: TrainingRow, name: str, value: Any) -> TextOrMessages:
    """Return `value` if it is a string or messages; raise UserError otherwise."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        messages = [message for message in value if isinstance(message, dict)]
        if len(messages) == len(value) and all(
            isinstance(message.get(key), str) for message in messages for key in ("role", "content")
        ):
            return value
    raise UserError(
        f"{row.where}: {name} must be a string, or messages with role and content, not "
        f"{json.dumps(value, default=str)[:60]}"
    )


def _tokenize(
    row: TrainingRow, tokenizer: Tokenizer, prompt: TextOrMessages, completion: TextOrMessages
) -> Example:
    """Tokenize prompt and completion, and append the end-of-sequence token."""
    if isinstance(completion, list):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        prompt_text = tokenizer.render_chat(messages)
        full_text = tokenizer.render_chat([*messages, *completion], add_generation_prompt=False)
        if not full_text.startswith(prompt_text):
            raise UserError(
                f"{row.where}: the chat template renders the prompt differently if an answer "
                "follows; provide prompt and completion as strings"
            )
        prompt_tokens = tokenizer.encode(prompt_text, add_special=False)
        text = full_text[len(prompt_text) :]
    elif isinstance(prompt, list):
        raise UserError(
            f"{row.where}: the prompt is a list of messages, so the completion must be one too"
        )
    else:
        prompt_tokens, text = tokenizer.encode(prompt, add_special=True), completion
    target = tokenizer.encode(text, add_special=False)
    if not target:
        raise UserError(f"{row.where}: the completion is empty; remove the row")
    # A chat template ends the completion itself, sometimes with a newline after the end token.
    last_tokens = target[-2:] if isinstance(completion, list) else target[-1:]
    if not set(last_tokens) & set(tokenizer.eos_ids):
        target = [*target, *tokenizer.eos_ids[:1]]
    if not prompt_tokens:
        raise UserError(f"{row.where}: the prompt is empty; remove the row")
    return Example(prompt=tuple(prompt_tokens), target=tuple(target))
