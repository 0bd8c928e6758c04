"""The model card of a merged model, and the recipe or program that it shows."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from sdjax import __version__
from sdjax.core.visible import escape
from sdjax.io.atomic_write import write_file
from sdjax.io.model_paths import HubModel, hub_model
from sdjax.merging.recipe.plan import MergePlan
from sdjax.merging.recipe.source_models import SourceModel

MODEL_CARD = "README.md"
RECIPE = "recipe.yaml"
PROGRAM = "program.py"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of a merged model.

    Attributes:
        method: name of the method.
        file: name under which the recipe or program is written.
        text: the recipe or program.
        seed: random seed; the card shows it if the method is random.
        parameters: hyperparameters that were set, besides those in the recipe.
        program: the program, if a recipe's method is a program file.
    """

    method: str
    file: str
    text: str
    seed: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    program: str | None = None


def write_model_card(folder: Path, name: str, plan: MergePlan, provenance: Provenance) -> None:
    """Write the model card, and the recipe or program unchanged.

    Args:
        folder: folder of the result.
        name: title of the card.
        plan: the plan of the merge.
        provenance: origin of the model.
    """
    roles = [""] * len(plan.models)
    if plan.slots is not None:
        roles = ["base: ", *(f"{slot}: " for slot in plan.slots)]
    sources = [f"- {role}{_source(m)}" for role, m in zip(roles, plan.models, strict=True)]
    facts = [f"- Tensors: {_one_line(plan.coverage)}"]
    if provenance.parameters:
        values = ", ".join(f"{name}={value}" for name, value in provenance.parameters.items())
        facts.append(f"- Hyperparameters: {_code(values)}")
    if plan.key is not None:
        facts.append(f"- Random seed: {provenance.seed}")
    versions = {"sdjax": __version__, "jax": jax.__version__, "python": platform.python_version()}
    facts.append(f"- Versions: {', '.join(f'{name} {v}' for name, v in versions.items())}")
    facts += [f"- Note: {_one_line(note)}" for note in plan.notes]
    language = "python" if provenance.file.endswith(".py") else "yaml"
    text = "\n".join(
        [
            *_front_matter(plan.models),
            f"# {_one_line(name)}",
            "",
            f"Merged by sdjax with {_code(provenance.method)} from:",
            "",
            *sources,
            "",
            *facts,
            "",
            _fenced(provenance.text.rstrip(), language),
            "",
        ]
    )
    if provenance.program is not None:
        text += f"\n{_fenced(provenance.program.rstrip(), 'python')}\n"
        write_file(folder / PROGRAM, provenance.program)
    write_file(folder / MODEL_CARD, text)
    write_file(folder / provenance.file, provenance.text)


def _front_matter(models: Iterable[SourceModel]) -> list[str]:
    """Return the metadata; `base_model` has the models that are known on Hugging Face."""
    on_hub = {hub.repository: None for model in models for hub in _hub_models(model)}
    base_models = [f"- {json.dumps(repository)}" for repository in on_hub]
    return [
        "---",
        *(["base_model:", *base_models] if base_models else []),
        "library_name: transformers",
        "tags:",
        "- merge",
        "- sdjax",
        "---",
    ]


def _hub_models(model: SourceModel) -> list[HubModel]:
    """Return the model, and its adapter if it has one, as far as they are on Hugging Face."""
    return [hub for folder in model.reader.folders if (hub := hub_model(folder))]


def _source(model: SourceModel) -> str:
    """Return a model's name, with the revisions that were read."""
    known = [f"{_code(hub.repository)} at {_code(hub.revision)}" for hub in _hub_models(model)]
    # A path into the cache says the same in an unreadable way.
    if len(known) == len(model.reader.folders):
        return " + ".join(known)
    return _code(model.name) + (f" ({', '.join(known)})" if known else "")


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _code(text: str) -> str:
    """Return a Markdown code span, whatever the text contains."""
    text = _one_line(text)
    ticks = "`" * (1 + _longest_run(text))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _fenced(text: str, language: str) -> str:
    """Return a Markdown code block, whatever the text contains."""
    text = escape(text)
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
