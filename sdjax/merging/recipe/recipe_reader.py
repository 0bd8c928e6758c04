"""Reader of recipe files, with one recipe or several."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from sdjax.core.files import read_text
from sdjax.core.yaml import MAX_CHARACTERS
from sdjax.merging.recipe.recipe_document import CONTENTS, RecipeDocument
from sdjax.merging.recipe.schema import DEFAULT, Module, Recipe


def read_recipe(path: Path) -> Recipe:
    """Parse a recipe.

    Raises:
        UserError: an invalid recipe; the message names the key and the line.
    """
    return _parsed(RecipeDocument.read(path), path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Parse the text of a recipe.

    Args:
        text: the recipe.
        path: its file, which need not exist: names of models are relative to its folder.

    Raises:
        UserError: as in `read_recipe`.
    """
    return _parsed(RecipeDocument(text, str(path)), path)


def read_recipes(path: Path, folders: Mapping[str, str] | None = None) -> tuple[Recipe, ...]:
    """Parse a file with one or several recipes (YAML documents).

    Args:
        path: the file.
        folders: name of a recipe to the folder of its result, which the others may use.

    Raises:
        UserError: as in `read_recipe`.
    """
    recipes = [_parsed(document, path) for document in _documents(path, folders or {})]
    return tuple(dataclasses.replace(r, text=r.text.lstrip("\n")) for r in recipes)


def named_folders(path: Path) -> list[str | None]:
    """Return the names of the recipes of a file, None for one without a name.

    Raises:
        UserError: not valid YAML, a name that is not that of a folder, or one that occurs twice.
    """
    documents = _documents(path, {})
    names: list[str | None] = []
    for document in documents:
        top = document.entries(document.root, "a recipe")
        name = None
        if len(documents) > 1 and "name" in top:
            node = top["name"][1]
            name = document.string(node, "name")
            if not re.fullmatch(r"[\w-][\w.-]{0,199}", name):
                raise document.fail(node, f"name must be that of a folder, not {name!r}")
        if name in names:
            what = "has no name" if name is None else f"is also named {name!r}"
            message = f"another recipe {what}; give all but the last a name of their own"
            raise document.fail(document.root, message)
        names.append(name)
    return names


def _documents(path: Path, folders: Mapping[str, str]) -> list[RecipeDocument]:
    text = read_text(path, 4 * MAX_CHARACTERS)
    documents = _split_documents(text)
    if len(documents) <= 1:
        return [RecipeDocument(text, str(path))]
    return [RecipeDocument(document, str(path), folders=folders) for document in documents]


def _split_documents(text: str) -> list[str]:
    """Return the documents of a YAML text that are not empty, with their lines where they were."""
    lines = text.splitlines(keepends=True)
    starts = [0, *(i for i, line in enumerate(lines) if re.match(r"---(\s|$)", line))]
    documents = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        content = (line.partition("#")[0].strip() for line in lines[start:end])
        if any(line not in ("", "---", "...") and line[0] != "%" for line in content):
            documents.append("\n" * start + "".join(lines[start:end]))
    return documents


def _parsed(document: RecipeDocument, path: Path) -> Recipe:
    top = document.top()
    if "merge_method" not in top:
        raise document.fail(None, "the key 'merge_method' is missing")
    contents = [key for key in CONTENTS if key in top]
    if len(contents) != 1:
        found = " and ".join(contents) or "none of them"
        raise document.fail(
            None, f"exactly one of models, slices and modules is needed, found {found}"
        )
    if "tokenizer" in top and "tokenizer_source" in top:
        raise document.fail(
            top["tokenizer"], "tokenizer and tokenizer_source are mutually exclusive; remove one"
        )
    levels = (document.parameters(top.get("parameters")),)
    if "modules" in top:
        modules = document.modules(top["modules"], levels)
    else:
        node = top[contents[0]]
        slices = document.contents(top, levels)
        modules = (Module(name=DEFAULT, slices=slices, line=document.line(node)),)
    texts = {
        key: document.string(top[key], key)
        for key in ("merge_method", "chat_template", "name")
        if key in top
    }
    return Recipe(
        path=path,
        text=document.text,
        lines={key: document.line(value) for key, value in top.items()},
        merge_method=texts["merge_method"],
        base_model=document.model(top["base_model"], "base_model") if "base_model" in top else None,
        modules=modules,
        dtype=document.dtype(top, "dtype"),
        out_dtype=document.dtype(top, "out_dtype"),
        tokenizer=document.tokenizer(top),
        chat_template=texts.get("chat_template"),
        architectures=document.architectures,
        name=texts.get("name"),
        depends=tuple(document.depends),
        notes=tuple(document.notes),
    )
