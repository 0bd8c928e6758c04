"""Stop strings, which end a text independently of token boundaries."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from sdjax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopStrings:
    """Strings that end a text; the text is truncated at the first of them.

    Attributes:
        strings: stop strings, none of them empty.
        decode: converts token ids to text, like `Tokenizer.decode`.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise UserError(
                "stop strings must not be empty: an empty one would end every text immediately"
            )

    def truncate(self, tokens: Sequence[int]) -> tuple[int, str, bool]:
        """Truncate a sequence at the first stop string.

        Returns:
            The number of tokens up to and including the one that completes the stop string, their
            text without the stop string, and whether a stop string occurs.
        """
        text = self.decode(tokens)
        if self._find(text) < 0:
            return len(tokens), text, False
        count = bisect.bisect_left(
            range(len(tokens) + 1), True, key=lambda n: self._find(self.decode(tokens[:n])) >= 0
        )
        text = self.decode(tokens[:count])
        return count, text[: self._find(text)], True

    def _find(self, text: str) -> int:
        """Return the index of the first stop string, or -1."""
        return min((at for at in map(text.find, self.strings) if at >= 0), default=-1)
