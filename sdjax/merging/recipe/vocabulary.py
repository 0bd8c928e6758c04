"""Models of different vocabularies: their embeddings and output matrices, row by row, by token.

A row belongs to a token. Where a model lacks a token of the result, it is given the row of the one
model that has it, else of the base, else the mean of those that have it (mergekit's rule), so that
no task vector arises from what a model does not know.

Axes: v tokens of the result, d the embedding's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from sdjax.merging.recipe.source_models import SourceModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The result's vocabulary.

    tokens: of the result's tokenizer, to their ids. rows: model to int32 [v], its row of each id
    or -1. size: the number of rows of the result; those beyond v are filled with the mean row.
    """

    tokens: Mapping[str, int]
    rows: Mapping[str, np.ndarray]
    size: int


def match_tokens(
    tokens: Mapping[str, int],
    models: Mapping[str, tuple[Mapping[str, int], int]],
    *,
    size: int | None = None,
    own_rows: str | None = None,
    multiple: int = 1,
) -> Vocabulary:
    """Find each model's row of each token.

    tokens: of the result. models: name to (its tokens, the rows that its embedding has). size: of
    the result, by default as many as the ids need; then up to a multiple of ``multiple``.
    own_rows: a model whose rows are the result's, whether a token has them or not.
    """
    count = max(tokens.values()) + 1 if size is None else size
    rows = {}
    for name, (own, have) in models.items():
        found = np.full(count, -1, np.int32)
        for token, index in tokens.items():
            row = own.get(token, -1)
            if index < count and 0 <= row < have:
                found[index] = row
        if name == own_rows:
            found[: min(count, have)] = np.arange(min(count, have))
        rows[name] = found
    return Vocabulary(tokens=tokens, rows=rows, size=-(-count // multiple) * multiple)


def changes_nothing(vocabulary: Vocabulary, have: Mapping[str, int]) -> bool:
    """Whether every model has just the rows of the result, in its order."""
    return all(
        vocabulary.size == have[name] == len(rows) and np.array_equal(rows, np.arange(len(rows)))
        for name, rows in vocabulary.rows.items()
    )


def describe(
    vocabulary: Vocabulary, models: Sequence[SourceModel], own: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """A line for each model whose tokens are not the result's, with counts."""
    lines = []
    for model in models:
        theirs = own[model.name]
        dropped = len(theirs.keys() - vocabulary.tokens.keys())
        lacking = len(vocabulary.tokens.keys() - theirs.keys())
        if dropped or lacking:
            lines.append(
                f"{model.name}: {len(theirs):,} tokens where the result has "
                f"{len(vocabulary.tokens):,}, merged by token: {dropped:,} of its own are "
                f"dropped, {lacking:,} that it lacks are filled in from the others"
            )
    return lines


def align(
    arrays: Sequence[np.ndarray], rows: Sequence[np.ndarray], size: int, base: int | None
) -> list[np.ndarray]:
    """Each model's matrix with the result's rows: [size, d], of their common dtype.

    arrays: [rows of the model, d]. rows: int32 [v] for each. base: the place of the base.
    """
    dtype = jnp.result_type(*(array.dtype for array in arrays))
    has = np.stack([found >= 0 for found in rows])  # [model, v]
    lacking = np.flatnonzero(~has.all(axis=0))  # [those that some model lacks]
    fill = np.zeros((len(lacking), arrays[0].shape[1]), np.float32)
    donors = has[:, lacking].astype(np.float32)
    for array, found, weight in zip(arrays, rows, donors, strict=True):
        fill += weight[:, None] * array[np.maximum(found[lacking], 0)].astype(np.float32)
    fill /= np.maximum(donors.sum(axis=0), 1)[:, None]
    if base is not None:
        mine = has[base, lacking]
        fill[mine] = arrays[base][rows[base][lacking[mine]]].astype(np.float32)
    out = []
    for array, found, present in zip(arrays, rows, has, strict=True):
        aligned = np.empty((size, array.shape[1]), dtype)
        aligned[: len(found)] = array[np.maximum(found, 0)].astype(dtype, copy=False)
        absent = ~present[lacking]
        aligned[lacking[absent]] = fill[absent].astype(dtype)
        if size > len(found):
            aligned[len(found) :] = aligned[: len(found)].mean(axis=0, dtype=np.float32)
        out.append(aligned)
    return out
