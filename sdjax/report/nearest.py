"""The training program that a discovered one resembles most, by its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Attributes: text: of the training program; similarity: from 0 to 1, at which texts agree."""

    text: str
    similarity: float


def nearest_texts(sources: Mapping[str, str], training: Sequence[str]) -> dict[str, Nearest]:
    """Of each named source its nearest training text: most shared runs of three tokens.

    Similarity is Jaccard's: shared runs over all runs of both; comments and layout count for
    nothing.
    """
    known = [_runs(text) for text in training]
    found = {}
    for name, source in sources.items():
        own = _runs(source)
        scores = [len(own & other) / max(len(own | other), 1) for other in known]
        best = max(range(len(scores)), key=scores.__getitem__, default=None)
        if best is not None:
            found[name] = Nearest(text=training[best], similarity=scores[best])
    return found


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    tokens = _TOKEN.findall(re.sub(r"#.*", "", text))
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))
