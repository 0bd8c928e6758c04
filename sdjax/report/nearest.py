"""Search for the training program that is most similar to a discovered program."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """A training program and its similarity, from 0 to 1 (identical tokens)."""

    text: str
    similarity: float


def nearest_texts(sources: Mapping[str, str], training: Sequence[str]) -> dict[str, Nearest]:
    """Return the most similar training program of each source.

    Similarity is the Jaccard index of the sets of token trigrams, without comments.

    Args:
        sources: source code by name.
        training: source code of the training programs.
    """
    training_runs = [_runs(text) for text in training]
    nearest = {}
    for name, source in sources.items():
        runs = _runs(source)
        scores = [len(runs & other) / max(len(runs | other), 1) for other in training_runs]
        best = max(range(len(scores)), key=scores.__getitem__, default=None)
        if best is not None:
            nearest[name] = Nearest(text=training[best], similarity=scores[best])
    return nearest


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    tokens = _TOKEN.findall(re.sub(r"#.*", "", text))
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))
