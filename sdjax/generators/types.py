"""What all generators have in common: requests for texts, and the texts."""

from __future__ import annotations

import collections.abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Request for one text.

    Attributes:
        number: number of the sample within its iteration, which determines its random numbers.
        prompt: the prompt as the generator reads it, in the chat template of its tokenizer if that
            has one; for an endpoint, the user's message.
    """

    number: int
    prompt: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """A text that a generator wrote; untrusted.

    Attributes:
        text: the text, without the prompt.
        source: source code of the program in the text; None if there is none.
        stopped: whether the text is complete, rather than cut at a token limit.
        tokens: its tokens in the vocabulary of a local model, without the stop token; empty if
            another program chose them.
    """

    text: str
    source: str | None
    stopped: bool
    tokens: tuple[int, ...] = ()


OnText = Callable[[int, GeneratedText], None]
"""Is called with the number of a request and its text, as soon as the text is complete."""


Texts = collections.abc.Generator[tuple[int, GeneratedText], None, None]
"""Yields numbers of requests and their texts."""


class Generator(Protocol):
    """Anything that writes programs."""

    def sample(self, requests: Sequence[GenerationRequest], *, on_text: OnText) -> None:
        """Write the texts of the requests, in any order.

        Args:
            requests: requests with different numbers.
            on_text: see `OnText`. It is not called for a request that the generator cannot serve,
                since its programs or its budget are used up.

        Raises:
            UserError: a text cannot be generated, and a resumed run would not do better unless
                something is changed.
            TransientError: the same, but a later attempt may succeed.
        """
        ...


class TextSource(Protocol):
    """A generator that only the main process has, since it reads a network."""

    def texts(self, requests: Sequence[GenerationRequest]) -> Texts:
        """Yield the number and the text of each request that can be served; see `Generator`."""
        ...
