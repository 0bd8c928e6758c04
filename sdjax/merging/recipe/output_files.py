"""What a merged model's folder has beside its weights: config, tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tokenizers

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.atomic_write import write_file
from sdjax.io.hf_checkpoint import ASSETS
from sdjax.io.safetensors_reader import CONFIG, read_json
from sdjax.io.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILE
from sdjax.io.vocabulary import write_extended
from sdjax.merging.recipe.chat_templates import CHAT_TEMPLATES
from sdjax.merging.recipe.plan import MergePlan
from sdjax.merging.recipe.schema import Recipe
from sdjax.merging.recipe.source_models import OUTPUT, SourceModel

CARD = "README.md"
RECIPE = "recipe.yaml"
PROGRAM = "program.py"
_GENERATION = "generation_config.json"
# Lists of a config that have nothing to do with layers, even if there are as many.
_NOT_BY_LAYER = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")
# Beside tokenizer.json these say the same of the vocabulary, so that added tokens make them wrong.
_VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def write_config(
    folder: Path,
    plan: MergePlan,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    *,
    vocabulary: int | None,
) -> None:
    """The template's config.json with what the merge has changed.

    tensors: of the result. Its dtype is the one that most of the weights have.
    """
    template, fields = plan.template, dict(plan.template.config)
    have = len(template.layers)
    for key, value in fields.items():
        if isinstance(value, list) and len(value) == have and key not in _NOT_BY_LAYER:
            own = [(model.config.get(key, value), layer) for model, layer in plan.layers]
            if all(isinstance(each, list) and layer < len(each) for each, layer in own):
                fields[key] = [each[layer] for each, layer in own]
    if fields.get("num_hidden_layers") is not None:
        fields["num_hidden_layers"] += len(plan.layers) - have
    sizes: Counter[str] = Counter()
    for one in tensors.values():
        sizes[one.dtype.name] += one.size
    for key in [key for key in ("torch_dtype", "dtype") if key in fields] or ["dtype"]:
        fields[key] = sizes.most_common(1)[0][0]
    if vocabulary is not None:
        fields["vocab_size"] = vocabulary
    if "tie_word_embeddings" in fields:
        fields["tie_word_embeddings"] = OUTPUT not in tensors
    write_file(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def write_tokenizer(
    folder: Path,
    tokenizer: Path,
    generation: Path,
    *,
    new: Mapping[str, tokenizers.AddedToken],
    chat_template: str | None,
) -> None:
    """The files of a tokenizer, with new tokens and another chat template if they are given.

    tokenizer, generation: the folders to copy the tokenizer's files and generation_config.json of.
    """
    for name in ASSETS:
        source = (generation if name == _GENERATION else tokenizer) / name
        if source.is_file() and not (new and name in _VOCABULARY_FILES):
            shutil.copyfile(source, folder / name)
    if new:
        write_extended(tokenizer, new, folder / TOKENIZER_FILE)
    if chat_template is not None:
        settings = read_json(tokenizer / TOKENIZER_CONFIG)
        if settings.pop("chat_template", None) is not None:
            write_file(
                folder / TOKENIZER_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            )
        write_file(folder / CHAT_TEMPLATE, chat_template)


def resolve_chat_template(recipe: Recipe, models: Sequence[SourceModel]) -> str | None:
    """The template that a recipe's ``chat_template`` stands for, None where there is none.

    "auto" is the one that most models have, the first of them in a tie, and None if none has one;
    a known name is ours of that name; anything else is the template itself. Raises UserError for a
    name that is not known, and for what Jinja cannot parse.
    """
    choice = recipe.chat_template
    if choice is None:
        return None
    if choice == "auto":
        counted = Counter(filter(None, (_own_template(model.folder) for model in models)))
        return counted.most_common(1)[0][0] if counted else None
    if choice in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[choice]
    if "{" not in choice:
        raise recipe.fail(
            "chat_template",
            f"no chat_template {truncated_repr(choice)}; it must be auto, a Jinja template, or one "
            f"of {', '.join(CHAT_TEMPLATES)}",
        )
    import jinja2  # a fortieth of a second, which few recipes need

    try:
        jinja2.Environment().parse(choice)
    except jinja2.TemplateError as error:
        message = f"this chat_template is no Jinja template: {error.message}"
        raise recipe.fail("chat_template", message) from None
    return choice


def _own_template(folder: Path) -> str | None:
    if (folder / CHAT_TEMPLATE).is_file():
        try:
            return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(
                f"{folder / CHAT_TEMPLATE}: not UTF-8 ({error}); copy it again"
            ) from None
    found = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [each for each in found if isinstance(each, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return found if isinstance(found, str) else None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a model was made by: the method's name, and the recipe or program with its file name."""

    method: str
    file: str
    text: str


def write_model_card(
    folder: Path, name: str, *, origin: Provenance, models: Sequence[str], notes: Sequence[str]
) -> None:
    """The model card, which says how the model was made, and the recipe or program as it was."""
    sources = "\n".join(f"- {json.dumps(Path(one).name or one)}" for one in models)
    listed = "\n".join(f"- `{one}`" for one in models)
    told = "".join(f"\n{note}\n" for note in notes)
    language = "python" if origin.file.endswith(".py") else "yaml"
    text = (
        f"---\nbase_model:\n{sources}\nlibrary_name: transformers\ntags:\n- merge\n- sdjax\n---\n"
        f"# {name}\n\nMerged by sdjax with `{origin.method}` from:\n\n{listed}\n{told}\n"
        f"```{language}\n{origin.text.rstrip()}\n```\n"
    )
    write_file(folder / CARD, text)
    write_file(folder / origin.file, origin.text)


def file_stats(folder: Path) -> dict[str, Any]:
    """Size and age of all that is read of a folder, by which a merge knows its own inputs."""
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json") or path.name in ASSETS
    }
