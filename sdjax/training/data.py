"""What to train on, as a user brings it: rows of text or of chat messages, made into tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.errors import UserError
from sdjax.io.json_lines import read_json_lines
from sdjax.io.tokenizer import Tokenizer
from sdjax.training.dpo import TokenPair
from sdjax.training.packing import Example

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
                "tokens; raise length to train on them"
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
            for number, fields in read_json_lines(data, ())
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
        if chosen == rejected:
            raise UserError(f"{row.where}: chosen and rejected are equal; remove the row")
        texts.append([_tokens(row, tokenizer, prompt, side) for side in (chosen, rejected)])
    fitted = fit_length(texts, length)
    if not fitted.examples:
        raise UserError(
            f"{rows[0].where} and the rest: no pair fits into {length} tokens; raise length"
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
        if "messages" in fields:
            prompt, completion = list(fields["messages"][:-1]), list(fields["messages"][-1:])
        else:
            prompt, completion = _field(row, "prompt"), _field(row, "completion")
        texts.append([_tokens(row, tokenizer, prompt, completion)])
    fitted = fit_length(texts, length)
    if not fitted.examples:
        raise UserError(
            f"{rows[0].where} and the rest: no example fits into {length} tokens; raise length"
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


def _preference(row: Row) -> tuple[Any, Any, Any]:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if "prompt" in row.fields:
        return row.fields["prompt"], chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise UserError(f"{row.where}: needs the field prompt")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _field(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise UserError(f"{row.where}: needs the field {name}; it has {', '.join(row.fields)}")
    return row.fields[name]


def _tokens(row: Row, tokenizer: Tokenizer, prompt: Any, completion: Any) -> Example:
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
    else:
        head, text = tokenizer.encode(str(prompt), add_special=True), str(completion)
    target = tokenizer.encode(text, add_special=False)
    # A chat template ends an answer itself, perhaps with a line break behind the end token.
    if not set(target[-2:]) & set(tokenizer.eos_ids):
        target = [*target, *tokenizer.eos_ids[:1]]
    if not head or not target:
        raise UserError(f"{row.where}: prompt or answer is empty; remove the row")
    return Example(prompt=tuple(head), target=tuple(target))
