"""The tokenizer of a merged model, and how models with different vocabularies are aligned.

The rows of an embedding and of an output matrix belong to tokens. A model that lacks a token of the
result gets the row of the only model that has it, otherwise the base's row, otherwise the mean over
the models that have it (mergekit's rule), so that a missing token does not create a task vector.

Axes: v (tokens of the result), *d (width of the embedding; none of a bias).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.tensor_reader import common_dtype
from sdjax.io.vocabulary import added_tokens, read_vocabulary
from sdjax.merging.recipe.schema import Recipe, TokenRow
from sdjax.merging.recipe.source_models import SourceModel

ModelT = TypeVar("ModelT", str, int)  # the name or the index of a model


@dataclass(frozen=True, kw_only=True)
class RowOverride(Generic[ModelT]):
    """Row that a recipe chooses for one token.

    Attributes:
        token_id: the token's id in the result.
        model: the model that has the row; None for zeros.
        row: the row in that model.
        force: replace the rows of all models, rather than only missing ones.
    """

    token_id: int
    model: ModelT | None
    row: int
    force: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyMap:
    """Mapping from rows of the source models to rows of the result.

    Attributes:
        tokens: token to id in the result's tokenizer.
        rows: model to int32 [v], its row for each id, or -1.
        size: number of rows of the result; rows beyond v are filled with the mean row.
        overrides: rows that the recipe chooses, which have an effect.
    """

    tokens: Mapping[str, int]
    rows: Mapping[str, np.ndarray]
    size: int
    overrides: tuple[RowOverride[str], ...] = ()

    def alignment(self, models: Sequence[str], base: str | None) -> RowAlignment:
        """Return how the rows of some of the models are aligned.

        Args:
            models: the models that have the tensor.
            base: the model whose rows fill in for missing ones, if it is among them.

        Raises:
            ValueError: a chosen row is that of another model.
        """
        indices = {name: index for index, name in enumerate(models)}
        for override in self.overrides:
            if override.model is not None and override.model not in indices:
                raise ValueError(override.model)
        return RowAlignment(
            rows=tuple(self.rows[name] for name in models),
            size=self.size,
            fallback=indices.get(base or ""),
            overrides=tuple(
                RowOverride(
                    token_id=override.token_id,
                    model=None if override.model is None else indices[override.model],
                    row=override.row,
                    force=override.force,
                )
                for override in self.overrides
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RowAlignment:
    """How the rows of one tensor of several models become those of the result.

    Attributes:
        rows: int32 [v] per model, its row for each token, or -1.
        size: number of rows of the result.
        fallback: index of the model whose rows fill in for missing ones, if it has them.
        overrides: chosen rows, by index of the model.
    """

    rows: tuple[np.ndarray, ...]
    size: int
    fallback: int | None = None
    overrides: tuple[RowOverride[int], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerPlan:
    """The tokenizer of a merged model.

    Attributes:
        folder: folder of the tokenizer to copy.
        new_tokens: tokens to add to it.
        vocabulary: how rows are aligned, or None if all models have the result's rows.
        notes: remarks for the user.
    """

    folder: Path
    new_tokens: Mapping[str, AddedToken]
    vocabulary: VocabularyMap | None
    notes: tuple[str, ...] = ()


def plan_tokenizer(
    template: SourceModel,
    models: Sequence[SourceModel],
    recipe: Recipe,
    open_model: Callable[[str], SourceModel],
) -> TokenizerPlan:
    """Choose the tokenizer and align the vocabularies.

    Without a choice in the recipe the result has the template's tokenizer, and rows are aligned
    only if the vocabularies have different sizes.

    Args:
        template: the model whose config and tokenizer the result gets by default.
        models: all models of the recipe.
        recipe: the recipe.
        open_model: opens a model by name.

    Raises:
        UserError: a required tokenizer cannot be read, or rows cannot be aligned.
    """
    choice = recipe.tokenizer
    source = template
    new_tokens: dict[str, AddedToken] = {}
    if choice is not None and choice.source not in ("base", "union"):
        try:
            source = open_model(choice.source)
        except UserError as error:
            message = f"the tokenizer's source must be base, union or a model: {error}"
            raise recipe.fail(choice.line, message) from None
    num_rows = {model.name: model.num_rows for model in models if model.num_rows is not None}
    if choice is None and len(set(num_rows.values())) <= 1:
        return TokenizerPlan(folder=template.folder, new_tokens={}, vocabulary=None)
    try:
        vocabularies = {model.name: read_vocabulary(model.folder) for model in models}
        tokens = dict(read_vocabulary(source.folder))
    except UserError as error:
        line = choice.line if choice is not None else recipe.slices[0].line
        raise recipe.fail(line, f"rows are matched by token: {error}") from None
    if choice is not None:
        if choice.source == "union":
            new_tokens = _find_new_tokens(models, vocabularies, tokens)
        for token in choice.tokens:
            if token not in tokens:
                new_tokens.setdefault(token, AddedToken(token, normalized=True))
        first = max(tokens.values()) + 1
        tokens |= {token: first + i for i, token in enumerate(new_tokens)}
    multiple = 1 if choice is None else choice.pad_to_multiple_of
    for model in models:
        if model.name not in num_rows and (vocabularies[model.name] != tokens or multiple > 1):
            assert choice is not None
            raise recipe.fail(
                choice.line,
                f"the rows of {model.name} cannot be matched by token, since none of its "
                "tensors is known as the token embedding; remove the tokenizer's source, or use "
                "models with one tokenizer",
            )
    vocabulary = match_tokens(
        tokens,
        {name: (vocabularies[name], rows) for name, rows in num_rows.items()},
        size=num_rows[template.name] if choice is None else None,
        identity_model=template.name if choice is None else None,
        multiple=multiple,
    )
    if choice is not None and choice.tokens:
        overrides = _find_overrides(recipe, choice.tokens, vocabulary, vocabularies, num_rows)
        vocabulary = dataclasses.replace(vocabulary, overrides=overrides)
    notes = _describe(vocabulary, models, vocabularies)
    if choice is None:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in num_rows.items())
        notes.insert(
            0,
            f"the vocabulary sizes differ ({sizes}): the result has that of {template.name}; "
            "tokenizer_source: union keeps all tokens",
        )
    return TokenizerPlan(
        folder=source.folder,
        new_tokens=new_tokens,
        vocabulary=None if is_identity(vocabulary, num_rows) else vocabulary,
        notes=tuple(notes),
    )


def match_tokens(
    tokens: Mapping[str, int],
    models: Mapping[str, tuple[Mapping[str, int], int]],
    *,
    size: int | None = None,
    identity_model: str | None = None,
    multiple: int = 1,
) -> VocabularyMap:
    """Find each model's row for each token.

    Args:
        tokens: token to id in the result.
        models: name to (token to id, number of rows of the embedding).
        size: number of rows of the result before padding; by default the highest id plus one.
        identity_model: a model whose row i becomes row i of the result, even without a token.
        multiple: the number of rows is padded to a multiple of this.
    """
    count = max(tokens.values()) + 1 if size is None else size
    rows = {}
    for name, (ids, num_rows) in models.items():
        row_of_id = np.full(count, -1, np.int32)
        for token, index in tokens.items():
            row = ids.get(token, -1)
            if index < count and 0 <= row < num_rows:
                row_of_id[index] = row
        if name == identity_model:
            row_of_id[: min(count, num_rows)] = np.arange(min(count, num_rows))
        rows[name] = row_of_id
    return VocabularyMap(tokens=tokens, rows=rows, size=-(-count // multiple) * multiple)


def is_identity(vocabulary: VocabularyMap, num_rows: Mapping[str, int]) -> bool:
    """Return whether every model already has the rows of the result, in the same order."""
    return not vocabulary.overrides and all(
        vocabulary.size == num_rows[name] == len(rows)
        and np.array_equal(rows, np.arange(len(rows)))
        for name, rows in vocabulary.rows.items()
    )


def align_rows(
    matrices: Sequence[Float[np.ndarray, "_ ..."]], alignment: RowAlignment
) -> list[Float[np.ndarray, "size ..."]]:
    """Return each model's matrix or bias with the rows of the result, in the common dtype.

    Args:
        matrices: [rows of the model, *d] per model.
        alignment: the rows of the result.
    """
    rows, size, fallback = alignment.rows, alignment.size, alignment.fallback
    dtype = common_dtype(matrix.dtype for matrix in matrices)
    present = np.stack([row_of_id >= 0 for row_of_id in rows])  # [model, v]
    incomplete = np.flatnonzero(~present.all(axis=0))  # ids that some model lacks
    fill = np.zeros((len(incomplete), *matrices[0].shape[1:]), np.float32)
    donors = present[:, incomplete].astype(np.float32)
    column = (-1,) + (1,) * (matrices[0].ndim - 1)
    for matrix, row_of_id, weight in zip(matrices, rows, donors, strict=True):
        donated = matrix[np.maximum(row_of_id[incomplete], 0)].astype(np.float32)
        fill += weight.reshape(column) * donated
    fill /= np.maximum(donors.sum(axis=0), 1).reshape(column)
    if fallback is not None:
        has_row = present[fallback, incomplete]
        fill[has_row] = matrices[fallback][rows[fallback][incomplete[has_row]]].astype(np.float32)
    aligned = []
    for matrix, row_of_id, has_row in zip(matrices, rows, present, strict=True):
        out = np.empty((size, *matrix.shape[1:]), dtype)
        out[: len(row_of_id)] = matrix[np.maximum(row_of_id, 0)].astype(dtype, copy=False)
        absent = ~has_row[incomplete]
        out[incomplete[absent]] = fill[absent].astype(dtype)
        for override in alignment.overrides:
            if override.force or not has_row[override.token_id]:
                chosen = None if override.model is None else matrices[override.model][override.row]
                out[override.token_id] = 0 if chosen is None else chosen.astype(dtype)
        if size > len(row_of_id):
            out[len(row_of_id) :] = out[: len(row_of_id)].mean(axis=0, dtype=np.float32)
        aligned.append(out)
    return aligned


def _find_new_tokens(
    models: Sequence[SourceModel],
    vocabularies: Mapping[str, Mapping[str, int]],
    tokens: Mapping[str, int],
) -> dict[str, AddedToken]:
    """Return the tokens that the first tokenizer lacks: ordinary ones, then added ones."""
    ordinary: dict[str, AddedToken] = {}
    added: dict[str, AddedToken] = {}
    for model in models:
        model_added = added_tokens(model.folder)
        added = {**model_added, **added}
        for token, _ in sorted(vocabularies[model.name].items(), key=lambda item: item[1]):
            if token not in model_added:
                ordinary.setdefault(token, AddedToken(token, normalized=True))
    return {token: value for token, value in {**ordinary, **added}.items() if token not in tokens}


def _find_overrides(
    recipe: Recipe,
    chosen: Mapping[str, TokenRow],
    vocabulary: VocabularyMap,
    vocabularies: Mapping[str, Mapping[str, int]],
    num_rows: Mapping[str, int],
) -> tuple[RowOverride[str], ...]:
    """Return the rows that a recipe chooses, without those of tokens that every model has.

    Raises:
        UserError: a model that is not merged, or that does not have the row.
    """
    overrides = []
    for token, choice in chosen.items():
        token_id, shown = vocabulary.tokens[token], truncated_repr(token)
        if not choice.force and all(rows[token_id] >= 0 for rows in vocabulary.rows.values()):
            continue
        row = -1
        if choice.model is not None:
            if choice.model not in num_rows:
                message = f"the source of {shown}, {choice.model}, is not one of the merged models"
                raise recipe.fail(choice.line, message)
            if choice.token is None:
                row = int(vocabulary.rows[choice.model][token_id])
            elif isinstance(choice.token, int):
                row = choice.token
            else:
                row = vocabularies[choice.model].get(choice.token, -1)
            if not 0 <= row < num_rows[choice.model]:
                other = token if choice.token is None else choice.token
                message = f"{choice.model} has no row for the token {truncated_repr(other)}"
                raise recipe.fail(choice.line, message)
        overrides.append(
            RowOverride(token_id=token_id, model=choice.model, row=row, force=choice.force)
        )
    return tuple(overrides)


def _describe(
    vocabulary: VocabularyMap,
    models: Sequence[SourceModel],
    vocabularies: Mapping[str, Mapping[str, int]],
) -> list[str]:
    """Return a note for each model whose tokens are not those of the result."""
    notes = []
    for model in models:
        own = vocabularies[model.name]
        dropped = len(own.keys() - vocabulary.tokens.keys())
        lacking = len(vocabulary.tokens.keys() - own.keys())
        if dropped or lacking:
            notes.append(
                f"{model.name}: {len(own):,} tokens, the result has {len(vocabulary.tokens):,}; "
                f"merged by token: {dropped:,} are dropped, {lacking:,} are filled in from the "
                "other models"
            )
    return notes
