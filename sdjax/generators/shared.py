"""Generators that only the main process has, with the same texts on every process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing, nullcontext

from sdjax.generators.types import GeneratedText, GenerationRequest, OnText, TextSource
from sdjax.sharding.multihost import broadcast_from_main


class SharedGenerator:
    """A generator whose texts the main process broadcasts to the others."""

    def __init__(self, source: TextSource | None) -> None:
        """Wrap a source of texts, which is None on all processes but the main one."""
        self._source = source

    def sample(self, requests: Sequence[GenerationRequest], *, on_text: OnText) -> None:
        """Pass on the texts of the source; see `sdjax.generators.types.Generator`."""
        with (
            nullcontext()
            if self._source is None
            else closing(self._source.texts(requests)) as texts
        ):

            def next_text() -> bytes:
                assert texts is not None  # only the main process calls this
                found = next(texts, None)
                fields = found and (found[0], dataclasses.asdict(found[1]))
                return json.dumps(fields).encode()

            while (fields := json.loads(broadcast_from_main(next_text))) is not None:
                number, text = fields
                on_text(number, GeneratedText(**text | {"tokens": tuple(text["tokens"])}))
