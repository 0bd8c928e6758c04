"""Files with several recipes (YAML documents), which may use one another's results.

A recipe with a `name` is merged into a folder of that name, as mergekit-multi does; the others may
name it as a model. The recipe without a name gives the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.core.files import MAX_TEXT_BYTES, read_bytes
from sdjax.io.atomic_write import make_folder
from sdjax.io.links import member
from sdjax.io.safetensors_reader import CONFIG
from sdjax.merging.recipe.model_card import RECIPE
from sdjax.merging.recipe.recipe_reader import named_folders, read_recipes
from sdjax.merging.recipe.schema import Recipe


def recipe_targets(
    path: Path, out: Path, folder: Path | None = None
) -> Iterator[tuple[Recipe, Path]]:
    """Yield the recipes of a file with the folder of their result, in the order of merging.

    A recipe follows those whose results it uses. A named result that exists already is used as it
    is, if it has the same recipe.

    Args:
        path: the file, with one or several recipes.
        out: folder of the result of the recipe without a name.
        folder: folder of the folders of named results; by default `OUT.parts`, or `out` if every
            recipe has a name.

    Raises:
        UserError: invalid recipes, recipes that need one another, or an existing folder with
            another recipe.
    """
    names = named_folders(path)
    if len(names) == 1:
        yield from ((recipe, out) for recipe in read_recipes(path))
        return
    if folder is None:
        folder = out.with_name(f"{out.name}.parts") if None in names else out
    folders = {name: str((folder / name).absolute()) for name in names if name is not None}
    recipes = in_order(read_recipes(path, folders))
    make_folder(folder)
    merged: set[str | None] = set()
    for recipe in recipes:
        target = out if recipe.name is None else folder / recipe.name
        if recipe.name is not None and _is_result(target, recipe):
            if again := merged.intersection(recipe.depends):
                raise UserError(
                    f"{target}: was merged from an earlier {min(map(str, again))}; remove it, and "
                    "run the command again"
                )
            continue
        yield recipe, target
        merged.add(recipe.name)


def in_order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return recipes such that each follows those that it depends on, the unnamed one last.

    Raises:
        UserError: recipes that depend on one another.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    done: dict[str | None, Recipe] = {}

    def visit(recipe: Recipe, users: tuple[str | None, ...]) -> None:
        if recipe.name in users:
            raise recipe.fail("name", f"{recipe.name!r} needs its own result; change a model")
        if recipe.name not in done:
            for name in recipe.depends:
                visit(by_name[name], (*users, recipe.name))
            done[recipe.name] = recipe

    for recipe in sorted(recipes, key=lambda recipe: recipe.name is None):
        visit(recipe, ())
    return list(done.values())


def _is_result(folder: Path, recipe: Recipe) -> bool:
    """Return whether a folder has the result of a recipe; raise UserError if it has another."""
    if not (folder / CONFIG).is_file():
        return False
    written = member(folder, RECIPE)
    if written.is_file() and read_bytes(written, MAX_TEXT_BYTES) == recipe.text.encode():
        return True
    raise UserError(
        f"{folder}: exists, but was not merged by this recipe {recipe.name!r}; remove it or choose "
        "another --intermediate-dir"
    )
