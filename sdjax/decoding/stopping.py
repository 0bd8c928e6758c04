"""Strings that end a text, wherever the tokens are cut."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from sdjax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopStrings:
    """Text from the first of these strings on is dropped.

    Attributes:
        strings: any of them ends a text; none may be empty.
        text_of: the text of tokens, such as `Tokenizer.decode`.
    """

    strings: tuple[str, ...]
    text_of: Callable[[Sequence[int]], str]

    def __post_init__(self):
        if "" in self.strings:
            raise UserError("a stop string is empty; it would end every text at once")

    def cut(self, tokens: Sequence[int]) -> tuple[int, str, bool]:
        """How many tokens count, their text without the string, and whether there was one.

        The token that completes the string is the last one that counts.
        """
        text = self.text_of(tokens)
        if self._first(text) < 0:
            return len(tokens), text, False
        count = bisect.bisect_left(
            range(len(tokens) + 1), True, key=lambda n: self._first(self.text_of(tokens[:n])) >= 0
        )
        text = self.text_of(tokens[:count])
        return count, text[: self._first(text)], True

    def _first(self, text: str) -> int:
        return min((at for at in map(text.find, self.strings) if at >= 0), default=-1)
