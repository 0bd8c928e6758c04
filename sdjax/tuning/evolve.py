"""Configurations of mergekit-evolve 0.1.5 (`genome` and `tasks`), with the same parameter space.

The genome has one number per group of layers, model, filter and parameter of the method:

* `layer_granularity` is the size of a group; 0 means one group. Groups switch from one layer to the
  next, or are interpolated with `smooth`.
* `filters` select kinds of tensors; the last set of numbers is for all others.
* Weights start at 1 / models and densities at 1. mergekit-evolve takes the absolute value of a
  weight unless `allow_negative_weights`, and limits densities to [0, 1]; here bounds do the same.

A genome over `slerp` also chooses its two models by the numbers (`evolve_slerp.py`). Sources:
mergekit/evo/genome.py and mergekit/evo/config.py of mergekit 0.1.5; Akiba et al., "Evolutionary
optimization of model merging recipes" (arXiv 2403.13187).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdjax.core.errors import UserError, did_you_mean
from sdjax.core.yaml import YamlDocument
from sdjax.merging.engine import default_slots
from sdjax.merging.method import Method
from sdjax.merging.methods.registry import methods
from sdjax.merging.recipe.tensor_roles import precedes_layers
from sdjax.models.tensor_names import parse_name
from sdjax.tuning.evolve_slerp import SlerpGenome
from sdjax.tuning.model_set import ModelSet, NamedMerge, short_names
from sdjax.tuning.patterns import Pattern, PatternedAlgorithm
from sdjax.tuning.recipe_text import dump_yaml
from sdjax.tuning.types import Parameter, Tunable

METHODS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("weight",),
}
"""Method to the parameters in its genome."""

MAX_NUMBERS = 20_000

# Prefix of a task's name in lm-evaluation-harness, and the task here.
_TASKS = {"gsm8k": "gsm8k", "minerva_math": "math", "hendrycks_math": "math", "svamp": "svamp"}
_GENOME_KEYS = (
    *("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize"),
    *("allow_negative_weights", "filters", "smooth"),
)
_OPTIONS = (
    *("limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template"),
    "fewshot_as_multiturn",
)


@dataclass(frozen=True, kw_only=True)
class Genome:
    """A genome as written.

    Attributes:
        name: name of its file.
        models: the models that have numbers, in order; without the base if it is subtracted.
        count: number of models that the file lists, which determines the initial weights.
        method: the merge method.
        base: the base model, if the method subtracts one.
        granularity: layers per group; 0 for a single group.
        normalize: whether weights are divided by their sum.
        negative: whether weights may be negative.
        filters: texts that select tensors by name.
        smooth: whether numbers are interpolated along the layers.
    """

    name: str
    models: tuple[str, ...]
    count: int
    method: Method
    base: str | None
    granularity: int
    normalize: bool
    negative: bool
    filters: tuple[str, ...]
    smooth: bool


def is_evolve_config(document: YamlDocument) -> bool:
    """Return whether a YAML document is a configuration of mergekit-evolve."""
    return isinstance(document.root, yaml.MappingNode) and any(
        getattr(key, "value", None) == "genome" for key, _ in document.root.value
    )


def read_evolve_config(document: YamlDocument, path: Path) -> NamedMerge:
    """Read a configuration of mergekit-evolve.

    Args:
        document: the parsed file.
        path: the file.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a genome that is not supported.
    """
    top = document.mapping(document.root, "the file", allowed=("genome", "tasks", *_OPTIONS))
    if "genome" not in top:
        raise document.fail(document.root, "the key 'genome' is empty")
    genome = _read_genome(document, top["genome"], path)
    ignored = [key for key in _OPTIONS if key in top]
    notes = (f"{path}: {', '.join(ignored)}: ignored; use the command's options",)
    return NamedMerge(
        base=genome.base,
        experts=dict(zip(default_slots(len(genome.models)), genome.models, strict=True)),
        folder=path.parent,
        open=lambda models: genome_tunable(genome, models),
        tasks=_read_tasks(document, top.get("tasks")),
        notes=notes if ignored else (),
    )


def genome_tunable(genome: Genome, models: ModelSet) -> Tunable:
    """Return a genome's numbers for models with so many layers.

    Raises:
        UserError: the number of layers is not a multiple of the granularity, or there are too many
            numbers.
    """
    num_layers, size = models.num_layers, genome.granularity
    if size > 0 and (not num_layers or num_layers % size):
        raise UserError(
            f"{genome.name}: the models have {num_layers} layers, which is not a multiple of "
            f"layer_granularity {size}; change it"
        )
    groups = num_layers // size if size > 0 else 1
    slots, filters = default_slots(len(genome.models)), (*genome.filters, None)
    keys = METHODS[genome.method.name]
    count = groups * len(slots) * len(filters) * len(keys)
    if count > MAX_NUMBERS:
        raise UserError(
            f"{genome.name}: the genome has {count:,} numbers; at most {MAX_NUMBERS:,} can be "
            "tuned, so raise layer_granularity or remove filters"
        )
    labels = short_names(genome.models)
    last = frozenset(
        name.spellings[-1]
        for name in map(parse_name, models.paths)
        if name.layer is None and not precedes_layers(name.spellings[-1])
    )
    if genome.method.name == "slerp":
        return SlerpGenome(
            name=genome.name,
            models=genome.models,
            labels=labels,
            layers=size,
            groups=groups,
            last=last,
            dtype=models.dtype,
        ).tunable()
    parameters: list[Parameter] = []
    index: dict[tuple[int, str, str | None, str], int] = {}
    for group in range(groups):
        for slot, label in zip(slots, labels, strict=True):
            for text in filters:
                for key in keys:
                    place = [label, f"group {group}" if groups > 1 else "", text or ""]
                    index[group, slot, text, key] = len(parameters)
                    parameters.append(_parameter(genome, key, ", ".join(filter(None, place))))

    def pattern(slot: str, key: str) -> Pattern:
        numbers = [[index[group, slot, text, key] for group in range(groups)] for text in filters]
        if groups == 1 or genome.smooth:
            return Pattern(numbers=tuple(map(tuple, numbers)), filters=filters)
        by_layer = (tuple(row[layer // size] for layer in range(num_layers)) for row in numbers)
        return Pattern(numbers=tuple(by_layer), filters=filters, step=True, last=last)

    per_expert = {key: [pattern(slot, key) for slot in slots] for key in keys}
    schema = genome.method.schema
    values = {
        p.name: schema.defaults.get(p.name, p.default)
        for p in genome.method.hyperparameters
        if p.name not in keys
    }
    algorithm = genome.method.bind(**values | {"normalize": genome.normalize})
    patterned = PatternedAlgorithm(algorithm=algorithm, per_expert=per_expert)

    def write(numbers: Any) -> str:
        data: dict[str, Any] = {"merge_method": genome.method.name}
        if groups == 1 or genome.smooth:
            data["models"] = [
                {
                    "model": model,
                    "parameters": {key: per_expert[key][i].yaml(numbers) for key in keys},
                }
                for i, model in enumerate(genome.models)
            ]
        else:
            data["slices"] = [
                _slice(genome, group, size, index, numbers) for group in range(groups)
            ]
        data["parameters"] = {"normalize": genome.normalize}
        if models.dtype is not None:
            data["dtype"] = models.dtype
        if genome.base is not None:
            data["base_model"] = genome.base
        return dump_yaml(data)

    return Tunable(
        name=genome.name,
        slots=slots,
        parameters=tuple(parameters),
        bind=patterned.bind,
        write=write,
        suffix=".yaml",
    )


def _slice(
    genome: Genome,
    group: int,
    size: int,
    index: Mapping[tuple[int, str, str | None, str], int],
    numbers: Any,
) -> dict[str, Any]:
    """Return a slice of the recipe: one group of layers."""
    layer_range = [group * size, (group + 1) * size]
    sources: list[dict[str, Any]] = []
    filters = (*genome.filters, None)
    for slot, model in zip(default_slots(len(genome.models)), genome.models, strict=True):
        own = {
            key: Pattern(
                numbers=tuple((index[group, slot, text, key],) for text in filters), filters=filters
            ).yaml(numbers)
            for key in METHODS[genome.method.name]
        }
        sources.append({"model": model, "layer_range": layer_range, "parameters": own})
    if genome.base is not None:
        sources.append({"model": genome.base, "layer_range": layer_range})
    return {"sources": sources}


def _parameter(genome: Genome, key: str, place: str) -> Parameter:
    name = f"{key}[{place}]"
    if key == "density":
        return Parameter(name=name, start=1.0, low=0.0, high=1.0)
    low = -2.0 if genome.negative else 0.01 if genome.normalize else 0.0
    return Parameter(name=name, start=1 / genome.count, low=low, high=2.0)


def _read_genome(document: YamlDocument, node: yaml.Node, path: Path) -> Genome:
    keys = document.mapping(node, "genome", allowed=_GENOME_KEYS)
    for key in ("models", "merge_method"):
        if key not in keys:
            raise document.fail(node, f"genome: the key {key!r} is missing")
    name = document.string(keys["merge_method"], "merge_method")
    if name not in METHODS:
        remedy = did_you_mean(name, METHODS, f"a genome can have {', '.join(METHODS)}")
        raise document.fail(keys["merge_method"], f"merge_method {name!r}: {remedy}")
    method = methods()[name]
    if "tokenizer_source" in keys and document.value(keys["tokenizer_source"]) != "base":
        raise document.fail(
            keys["tokenizer_source"],
            "tuning keeps the base's tokenizer; remove the key until the final merge",
        )
    items = document.items(keys["models"], "models must be a list of models")
    listed = tuple(document.string(item, "a model") for item in items)
    if len(set(listed)) < len(listed):
        raise document.fail(keys["models"], "a model is listed twice")
    base = document.string(keys["base_model"], "base_model") if "base_model" in keys else None
    if method.schema.base == "required" and base is None:
        raise document.fail(node, f"{name} needs base_model")
    if method.schema.base in ("plain", "first"):
        if base is not None and base not in listed:
            raise document.fail(
                keys["base_model"], f"{name} gives every model a weight; add {base} to models"
            )
        base = None
    if name == "slerp":
        if len(listed) < 2:
            raise document.fail(keys["models"], "slerp needs at least two models")
        for key in ("filters", "smooth"):
            if key in keys and document.value(keys[key]):
                raise document.fail(keys[key], f"{key}: a genome over slerp has none; remove it")
    models = tuple(model for model in listed if model != base)
    if not models:
        raise document.fail(keys["models"], "a genome needs a model besides base_model")
    filters: tuple[str, ...] = ()
    if "filters" in keys:
        texts = document.items(keys["filters"], "filters must be a list of strings")
        filters = tuple(document.string(text, "a filter") for text in texts)
    granularity = document.value(keys["layer_granularity"]) if "layer_granularity" in keys else 0
    if isinstance(granularity, bool) or not isinstance(granularity, int):
        raise document.fail(keys["layer_granularity"], "layer_granularity must be an integer")
    default = name in ("linear", "ties", "dare_ties")
    return Genome(
        name=path.name,
        models=models,
        count=len(listed),
        method=method,
        base=base,
        granularity=granularity,
        normalize=_switch(document, keys, "normalize", default),
        negative=_switch(document, keys, "allow_negative_weights", False),
        filters=filters,
        smooth=_switch(document, keys, "smooth", False),
    )


def _switch(document: YamlDocument, keys: Mapping[str, yaml.Node], key: str, default: bool) -> bool:
    if key not in keys:
        return default
    value = document.value(keys[key])
    if not isinstance(value, bool):
        raise document.fail(keys[key], f"{key} must be true or false, not {value!r:.60}")
    return value


def _read_tasks(document: YamlDocument, node: yaml.Node | None) -> tuple[str, ...]:
    if node is None:
        return ()
    names = []
    for item in document.items(node, "tasks must be a list of tasks"):
        name = item
        if isinstance(item, yaml.MappingNode):
            keys = document.mapping(item, "a task", allowed=("name", "weight", "metric"))
            if "name" not in keys:
                raise document.fail(item, "a task needs the key 'name'")
            name = keys["name"]
        names.append(_own_task(document.string(name, "a task")))
    return tuple(dict.fromkeys(names))


def _own_task(name: str) -> str:
    """Return the counterpart of a task of lm-evaluation-harness, or the name if it has none."""
    return next((task for prefix, task in _TASKS.items() if name.startswith(prefix)), name)
