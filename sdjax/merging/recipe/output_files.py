"""Files of a merged model other than its weights: config and tokenizer."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sdjax.core.errors import truncated_repr
from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes, read_text
from sdjax.io.atomic_write import write_file
from sdjax.io.links import member
from sdjax.io.model_files import dropped_files, other_files, tokenizer_files
from sdjax.io.quantization import QUANTIZATION
from sdjax.io.safetensors_reader import CONFIG, read_json
from sdjax.io.safetensors_writer import DTYPES
from sdjax.io.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILE
from sdjax.io.vocabulary import write_extended
from sdjax.io.weights import WEIGHTS_SUFFIXES
from sdjax.merging.recipe.chat_templates import CHAT_TEMPLATES
from sdjax.merging.recipe.layer_config import set_layers
from sdjax.merging.recipe.plan import MergePlan
from sdjax.merging.recipe.schema import Recipe
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.merging.recipe.tensor_roles import (
    TIE,
    is_output_matrix,
    text_sections,
)
from sdjax.merging.recipe.tokenizer_plan import TokenizerPlan
from sdjax.models.tensor_names import parse_name


def write_config(
    folder: Path, plan: MergePlan, tensors: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Write the template's config.json with the fields that the merge changes.

    Args:
        folder: folder of the result.
        plan: the plan of the merge.
        tensors: name to shape and dtype; the config gets the dtype of most weights.
    """
    fields = copy.deepcopy(dict(plan.template.config))
    for section in text_sections(fields):
        for key in QUANTIZATION:  # its weights are dequantized
            section.pop(key, None)
    for stack in plan.stacks:
        if stack:
            set_layers(fields, plan.template, stack)
    sizes: Counter[str] = Counter()
    for spec in tensors.values():
        if spec.dtype in DTYPES.values():
            sizes[spec.dtype.name] += spec.size
    for key in [key for key in ("torch_dtype", "dtype") if key in fields] or ["dtype"]:
        fields[key] = sizes.most_common(1)[0][0]
    if plan.tokenizer.vocabulary is not None:
        sections = list(text_sections(fields))
        keyed = [section for section in sections if "vocab_size" in section]
        for section in keyed or [fields]:
            section["vocab_size"] = plan.tokenizer.vocabulary.size
    # A bias has no say: BERT ties its output matrix and has a bias of its own.
    weights = (n for n in tensors if n.endswith(".weight") and parse_name(n).layer is None)
    _set_tie(fields, plan, has_output=any(map(is_output_matrix, weights)))
    write_file(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def _set_tie(fields: dict[str, Any], plan: MergePlan, *, has_output: bool) -> None:
    """Say in a config whether the output matrix is the embedding."""
    sections = list(text_sections(fields))
    keyed = [section for section in sections if section.get(TIE) is not None]
    if has_output:
        # Many families tie by default, so the key must be there.
        for section in keyed or sections:
            section[TIE] = False
    elif plan.last.tied is not None and keyed:
        for section in keyed:
            section[TIE] = plan.last.tied


def write_tokenizer(
    folder: Path, tokenizer: TokenizerPlan, template: Path, chat_template: str | None
) -> None:
    """Write the files of the tokenizer, the processors, generation_config.json and custom code.

    Args:
        folder: folder of the result.
        tokenizer: the tokenizer to copy, and tokens to add to it.
        template: folder to copy all files from that are not the tokenizer's.
        chat_template: replaces the tokenizer's chat template.
    """
    new_tokens = tokenizer.new_tokens
    own = tokenizer_files(
        # Once tokens are added, the vocabularies next to tokenizer.json are wrong.
        tokenizer.folder,
        vocabulary=not new_tokens,
        chat_templates=chat_template is None,
    )
    for source, names in ((tokenizer.folder, own), (template, other_files(template))):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            content = read_bytes(member(source, name), MAX_VOCABULARY_BYTES)
            write_file(folder / name, content)
    if new_tokens:
        write_extended(tokenizer.folder, new_tokens, folder / TOKENIZER_FILE)
    if chat_template is not None:
        settings = read_json(tokenizer.folder / TOKENIZER_CONFIG)
        if settings.pop("chat_template", None) is not None:
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            write_file(folder / TOKENIZER_CONFIG, text)
        write_file(folder / CHAT_TEMPLATE, chat_template)


def dropped(plan: MergePlan, chat_template: str | None) -> list[str]:
    """Return a note for each model with files that the result lacks.

    Args:
        plan: the plan of the merge.
        chat_template: replaces the tokenizer's chat template.
    """
    tokenizer, template = plan.tokenizer.folder, plan.template.folder
    copied = {*tokenizer_files(tokenizer), *other_files(template)}
    if chat_template is not None:
        copied.add(CHAT_TEMPLATE)
    notes = []
    for model in plan.models:
        names = dropped_files(model.folder, copied, known=model.folder != template)
        if names:
            several = f"{len(names)} files ({names[0]}, …) are"
            such = f"{names[0]} is" if len(names) == 1 else several
            notes.append(f"{model.name}: {such} not copied")
    return notes


def resolve_chat_template(recipe: Recipe, models: Sequence[SourceModel]) -> str | None:
    """Return the text of a recipe's `chat_template`, or None.

    "auto" is the template that most models have (the first one in a tie). Otherwise it is the name
    of a built-in template, or a Jinja template.

    Raises:
        UserError: an unknown name, or invalid Jinja.
    """
    choice = recipe.chat_template
    if choice is None:
        return None
    if choice == "auto":
        counts = Counter(filter(None, (_read_chat_template(model.folder) for model in models)))
        return counts.most_common(1)[0][0] if counts else None
    if choice in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[choice]
    if "{" not in choice:
        raise recipe.fail(
            "chat_template",
            f"no chat_template {truncated_repr(choice)}; use auto, a Jinja template, or one of "
            f"{', '.join(CHAT_TEMPLATES)}",
        )
    import jinja2  # takes 25 ms, and few recipes need it

    try:
        jinja2.Environment().parse(choice)
    except (jinja2.TemplateError, RecursionError) as error:
        reason = getattr(error, "message", "nested too deeply")
        raise recipe.fail("chat_template", f"chat_template is not valid Jinja: {reason}") from None
    return choice


def file_stats(folder: Path) -> dict[str, Any]:
    """Return the size and modification time of every file that a merge may read."""
    names = {*tokenizer_files(folder), *other_files(folder)}
    paths = (path for path in folder.iterdir() if path.suffix in (*WEIGHTS_SUFFIXES, ".json"))
    names |= {path.name for path in paths if path.is_file()}
    stats = {name: (folder / name).stat() for name in sorted(names)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _read_chat_template(folder: Path) -> str | None:
    path = member(folder, CHAT_TEMPLATE)
    if path.is_file():
        return read_text(path)
    template = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, by name
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None
