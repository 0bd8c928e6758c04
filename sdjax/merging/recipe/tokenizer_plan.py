"""Which tokenizer a merged model gets, and which rows belong to its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken

from sdjax.core.errors import UserError
from sdjax.io.vocabulary import added_tokens, read_vocabulary
from sdjax.merging.recipe.schema import Recipe
from sdjax.merging.recipe.source_models import EMBEDDING, SourceModel
from sdjax.merging.recipe.vocabulary import Vocabulary, changes_nothing, describe, match_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerPlan:
    """The folder of the result's tokenizer, tokens to be added, and rows to match if any."""

    folder: Path
    new: Mapping[str, AddedToken]
    vocabulary: Vocabulary | None
    notes: tuple[str, ...] = ()


def plan_tokenizer(
    template: SourceModel,
    models: Sequence[SourceModel],
    recipe: Recipe,
    opened: Callable[[str], SourceModel],
) -> TokenizerPlan:
    """By a recipe's choice; without one the template's, and rows are matched only where the
    vocabularies are of different size.

    Raises UserError where a tokenizer that is needed cannot be read.
    """
    choice = recipe.tokenizer
    source, new = template, {}
    if choice is not None and choice.source not in ("base", "union"):
        try:
            source = opened(choice.source)
        except UserError as error:
            message = f"the tokenizer's source is base, union or a model: {error}"
            raise recipe.fail(choice.line, message) from None
    have = {
        model.name: model.tensors.shape(EMBEDDING)[0]
        for model in models
        if EMBEDDING in model.outside
    }
    if choice is None and len(set(have.values())) <= 1:
        return TokenizerPlan(folder=template.folder, new={}, vocabulary=None)
    try:
        own = {model.name: read_vocabulary(model.folder) for model in models}
        tokens = dict(read_vocabulary(source.folder))
    except UserError as error:
        line = choice.line if choice is not None else recipe.slices[0].line
        raise recipe.fail(line, f"rows are matched by token: {error}") from None
    if choice is not None and choice.source == "union":
        new = _new_tokens(models, own, tokens)
        tokens |= {token: max(tokens.values()) + 1 + i for i, token in enumerate(new)}
    multiple = 1 if choice is None else choice.pad_to_multiple_of
    for model in models:
        if model.name not in have and (own[model.name] != tokens or multiple > 1):
            assert choice is not None
            raise recipe.fail(
                choice.line,
                f"the rows of {model.name} cannot be matched by token, for it has no tensor "
                f"{EMBEDDING}; leave the tokenizer's source out, or give all models one tokenizer",
            )
    vocabulary = match_tokens(
        tokens,
        {name: (own[name], rows) for name, rows in have.items()},
        size=have[template.name] if choice is None else None,
        own_rows=template.name if choice is None else None,
        multiple=multiple,
    )
    notes = describe(vocabulary, models, own)
    if choice is None:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in have.items())
        notes = [
            f"vocabularies of different size ({sizes}): the result has {template.name}'s; "
            "tokenizer_source: union keeps all tokens",
            *notes,
        ]
    return TokenizerPlan(
        folder=source.folder,
        new=new,
        vocabulary=None if changes_nothing(vocabulary, have) else vocabulary,
        notes=tuple(notes),
    )


def _new_tokens(
    models: Sequence[SourceModel], own: Mapping[str, Mapping[str, int]], tokens: Mapping[str, int]
) -> dict[str, AddedToken]:
    """The tokens that the first tokenizer lacks: plain ones of all models, then added ones."""
    plain: dict[str, AddedToken] = {}
    added: dict[str, AddedToken] = {}
    for model in models:
        theirs = added_tokens(model.folder)
        added = {**theirs, **added}
        for token, _ in sorted(own[model.name].items(), key=lambda item: item[1]):
            if token not in theirs:
                plain.setdefault(token, AddedToken(token, normalized=True))
    return {token: value for token, value in {**plain, **added}.items() if token not in tokens}
