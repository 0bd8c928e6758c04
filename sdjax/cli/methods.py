"""`sdjax methods`: list the merge methods, or describe one."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from sdjax.cli.group import echo, examples
from sdjax.core.errors import UserError, did_you_mean, truncated_repr

if TYPE_CHECKING:
    from sdjax.merging.method import Hyperparameter, Method

_WIDTH = 80
_INDENT = "  "
_TYPES = {
    "float": "number",
    "per_expert": "number, or one per expert",
    "bool": "true or false",
    "int": "integer",
    "str": "string",
}
_BASES = {
    "required": "required; the task vectors are relative to it",
    "optional": "optional; if given, the task vectors are relative to it",
    "first": "required; the first of the models, nothing is subtracted",
    "plain": "optional; a model like any other, nothing is subtracted",
}


@click.command(epilog=examples("sdjax methods", "sdjax methods ties"))
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the human-designed merge methods, or describe the method NAME.

    The description has the formula, the hyperparameters with their defaults, and the keys that a
    recipe may set.
    """
    from sdjax.merging.methods.registry import methods as all_methods

    available = all_methods()
    if name is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        echo("\n".join(list_methods(available.values(), width)))
        echo("\n`sdjax methods NAME` describes one: formula, hyperparameters, recipe keys.")
    elif name in available:
        echo("\n".join(describe_method(available[name])))
    else:
        hint = did_you_mean(name, available, f"available: {', '.join(available)}")
        raise UserError(f"no merge method {truncated_repr(name)}; {hint}")


def list_methods(methods: Iterable[Method], width: int | None) -> list[str]:
    """Return one line per method: its name and its summary.

    Args:
        methods: the methods.
        width: maximum length of a line; None for summaries in full.
    """
    methods = tuple(methods)
    name_width = max(len(method.name) for method in methods) + len(_INDENT)
    lines = []
    for method in methods:
        summary = _title_and_summary(method)[1]
        if width is not None:
            summary = textwrap.shorten(summary, max(width - name_width, 8), placeholder=" …")
        lines.append(f"{method.name:<{name_width}}{summary}")
    return lines


def _title_and_summary(method: Method) -> tuple[str, str]:
    """Split "TIES: trim each task vector" into the method's full name and its summary."""
    title, colon, summary = method.summary.partition(": ")
    return (title, summary) if colon else ("", method.summary)


def describe_method(method: Method) -> list[str]:
    """Return the lines that describe one method in full, at most 80 columns wide."""
    title, summary = _title_and_summary(method)
    repeated = title.lower().replace(" ", "_") in ("", method.name)
    heading = method.name if repeated else f"{method.name} ({title})"
    paragraphs = [f"{heading}: {summary}", *method.description.split("\n\n")]
    if method.caution:
        paragraphs.append(f"Caution: {method.caution}.")
    lines = []
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(" ".join(paragraph.split()), _WIDTH), ""]
    lines += ["Formula:", *_wrapped(method.formula), ""]
    if method.hyperparameters:
        rows = [(p.name, _default(p.default), _TYPES[p.type]) for p in method.hyperparameters]
        lines += [
            "Hyperparameters, with the paper's defaults (Python, search configs):",
            *_table(rows),
            "",
        ]
    lines += ["In a recipe, with mergekit's defaults:", *_table(_recipe_rows(method))]
    return lines


def _recipe_rows(method: Method) -> list[tuple[str, str, str]]:
    """Return (key, default, meaning) of everything that a recipe may set for a method."""
    schema = method.schema
    extra = " in addition to base_model" if schema.base in ("required", "optional") else ""
    if schema.max_models is None:
        count = f"{schema.min_models} or more{extra}"
    elif schema.min_models == schema.max_models:
        count = f"exactly {schema.min_models}{extra}"
    else:
        count = f"{schema.min_models} to {schema.max_models}{extra}"
    rows = [("base_model", "", _BASES[schema.base]), ("models", "", count)]
    for parameter in method.hyperparameters:
        default = schema.defaults.get(parameter.name, parameter.default)
        required = parameter.name in schema.required
        rows.append(
            (
                schema.recipe_key(parameter.name),
                "required" if required else _default(default),
                _recipe_type(method, parameter),
            )
        )
    return rows


def _recipe_type(method: Method, parameter: Hyperparameter) -> str:
    schema = method.schema
    key = schema.recipe_key(parameter.name)
    choices = schema.choices.get(parameter.name, {})
    described = _TYPES[parameter.type]
    if choices:
        described = f"one of {', '.join(map(_default, choices))}"
    elif parameter.name in schema.unit_interval:
        described = "number from 0 to 1"
    elif parameter.type == "per_expert":
        described = "number"
    if parameter.type == "per_expert":
        described += ", for all models or for each"
    return described if key == parameter.name else f"{described}; {parameter.name} above"


def _table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return rows of (name, default, meaning); a long meaning continues on indented lines."""
    rows = tuple(rows)
    widths = [max(len(row[column]) for row in rows) + len(_INDENT) for column in (0, 1)]
    lines = []
    for name, default, meaning in rows:
        head = f"{_INDENT}{name:<{widths[0]}}{default:<{widths[1]}}"
        lines += textwrap.wrap(
            meaning, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)
        )
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT * 2)


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
