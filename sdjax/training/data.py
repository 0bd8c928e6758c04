"""What to train on, as a user brings it: rows of text or of chat messages, made into tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.core.errors import UserError
from sdjax.io.jsonl import read_jsonl
from sdjax.io.tokenizer import Tokenizer
from sdjax.training.dpo import TokenPair
from sdjax.training.packing import Example

# A text, or chat messages.
Said = str | list[dict[str, Any]]

# Before the name of a data set of the `datasets` library.
DATASETS = "datasets:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a file, or one row of a data set. `where` names it in errors."""

    where: str
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """Examples that fit the length, one tuple a row, and what was done to make them.

    Attributes:
        cut: rows of which a prompt lost its beginning.
        dropped: rows of which an answer is too long; answers are never cut.
    """

    examples: tuple[tuple[Example, ...], ...]
    cut: int
    dropped: int

    def report(self, length: int) -> list[str]:
        """What a user should know, in lines."""
        whole = len(self.examples) + self.dropped
        said = []
        if self.cut:
            said.append(f"{self.cut} of {whole} rows: the prompt is cut from the left")
        if self.dropped:
            said.append(
                f"{self.dropped} of {whole} rows are left out: an answer is longer than {length} "
                "tokens; raise length, up to the model's context, to train on them"
            )
        return said


def read_rows(data: str, split: str) -> list[Row]:
    """The rows of a JSONL file, or of `datasets:NAME`, which may be a folder of such files.

    Raises:
        UserError: there is no such file or data set, it is damaged, or it has no row.
    """
    if data.startswith(DATASETS):
        rows = _of_datasets(data.removeprefix(DATASETS), split)
    else:
        rows = [
            Row(where=f"{data}, line {number}", fields=fields)
            for number, fields in read_jsonl(data, ())
        ]
    if not rows:
        raise UserError(f"{data}: holds no example")
    return rows


def _of_datasets(name: str, split: str) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's own, the network's or the disk's
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{DATASETS}{name}, split {split}: cannot be loaded ({line}); correct the name or the "
            "split, or copy the data set into a folder"
        ) from None
    return [
        Row(where=f"{DATASETS}{name}, row {number}", fields=fields)
        for number, fields in enumerate(loaded, 1)
    ]


def preference_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, length: int
) -> tuple[list[TokenPair], list[str]]:
    """Pairs of at most `length` tokens a side, of rows with prompt, chosen and rejected.

    A field is a text or a list of chat messages; without a prompt, that is what two conversations
    have in common.

    Raises:
        UserError: a row lacks a field, its two sides are equal, or no pair fits.
    """
    texts = []
    for row in rows:
        prompt, chosen, rejected = _preference(row)
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise UserError(f"{row.where}: one side is a text, the other is messages")
        sides = [_tokens(row, tokenizer, prompt, side) for side in (chosen, rejected)]
        if sides[0] == sides[1]:
            raise UserError(f"{row.where}: chosen and rejected are equal; remove the row")
        texts.append(sides)
    fitted = fit_length(texts, length)
    if not fitted.examples:
        raise UserError(
            f"{rows[0].where} and the rest: no pair fits into {length} tokens; raise length, up to "
            "the model's context"
        )
    pairs = [TokenPair(winner=winner, loser=loser) for winner, loser in fitted.examples]
    return pairs, fitted.report(length)


def texts_to_learn(
    rows: Sequence[Row], tokenizer: Tokenizer, length: int
) -> tuple[list[Example], list[str]]:
    """Examples of at most `length` tokens, of rows with prompt and completion, or with messages.

    Of `messages` the last one is learnt, behind all others.

    Raises:
        UserError: a row lacks a field, or no example fits.
    """
    texts = []
    for row in rows:
        fields = row.fields
        prompt: Said
        completion: Said
        if "messages" in fields:
            messages = _said(row, "messages", fields["messages"])
            if not isinstance(messages, list) or len(messages) < 2:
                raise UserError(f"{row.where}: messages must be a list of two or more")
            prompt, completion = messages[:-1], messages[-1:]
        else:
            prompt, completion = _field(row, "prompt"), _field(row, "completion")
        texts.append([_tokens(row, tokenizer, prompt, completion)])
    fitted = fit_length(texts, length)
    if not fitted.examples:
        raise UserError(
            f"{rows[0].where} and the rest: no example fits into {length} tokens; raise length, "
            "up to the model's context"
        )
    return [example for (example,) in fitted.examples], fitted.report(length)


def fit_length(rows: Sequence[Sequence[Example]], length: int) -> Fitted:
    """Cuts prompts from the left to `length`, the same for all sides of a row.

    A row is dropped where an answer leaves no room for one token of the prompt.
    """
    kept: list[tuple[Example, ...]] = []
    cut = 0
    for row in rows:
        room = length - max(len(example.target) for example in row)
        if room < 1:
            continue
        cut += any(len(example.prompt) > room for example in row)
        kept.append(tuple(dataclasses.replace(one, prompt=one.prompt[-room:]) for one in row))
    return Fitted(examples=tuple(kept), cut=cut, dropped=len(rows) - len(kept))


def _preference(row: Row) -> tuple[Said, Said, Said]:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if "prompt" in row.fields:
        return _field(row, "prompt"), chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise UserError(f"{row.where}: needs the field prompt")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise UserError(f"{row.where}: chosen and rejected are equal; remove the row")
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise UserError(
            f"{row.where}: without a prompt, conversations begin alike and go on differently"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _field(row: Row, name: str) -> Said:
    if name not in row.fields:
        raise UserError(f"{row.where}: needs the field {name}; it has {', '.join(row.fields)}")
    return _said(row, name, row.fields[name])


def _said(row: Row, name: str, value: Any) -> Said:
    """A text, or messages. UserError for anything else, which would be learnt as it is printed."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        spoken = [one for one in value if isinstance(one, dict)]
        if len(spoken) == len(value) and all(
            isinstance(one.get(key), str) for one in spoken for key in ("role", "content")
        ):
            return value
    raise UserError(
        f"{row.where}: {name} must be a text, or messages of role and content; it is "
        f"{json.dumps(value, default=str)[:60]}"
    )


def _tokens(row: Row, tokenizer: Tokenizer, prompt: Said, completion: Said) -> Example:
    """Prompt and completion as tokens, with the end token."""
    if isinstance(completion, list):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        before = tokenizer.render_chat(messages)
        whole = tokenizer.render_chat([*messages, *completion], add_generation_prompt=False)
        if not whole.startswith(before):
            raise UserError(
                f"{row.where}: the chat template writes the prompt differently before an answer; "
                "give prompt and answer as text"
            )
        head, text = tokenizer.encode(before, add_special=False), whole[len(before) :]
    elif isinstance(prompt, list):
        raise UserError(f"{row.where}: the prompt is messages, so the answer must be messages too")
    else:
        head, text = tokenizer.encode(prompt, add_special=True), completion
    target = tokenizer.encode(text, add_special=False)
    if not target:
        raise UserError(f"{row.where}: the answer is empty; remove the row")
    # A chat template ends an answer itself, perhaps with a line break behind the end token.
    ended = target[-2:] if isinstance(completion, list) else target[-1:]
    if not set(ended) & set(tokenizer.eos_ids):
        target = [*target, *tokenizer.eos_ids[:1]]
    if not head:
        raise UserError(f"{row.where}: the prompt is empty; remove the row")
    return Example(prompt=tuple(head), target=tuple(target))
