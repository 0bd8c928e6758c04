"""Kinds: configs of runs and training jobs, and recipes of merges."""

import functools
from pathlib import Path
from typing import Any

from tests.fuzzing import inputs, mutations
from tests.fuzzing.kinds import Kind

EVOLVE = b"""\
genome:
  models: [math, code]
  merge_method: ties
  base_model: base
  layer_granularity: 2
  filters: [mlp]
  normalize: true
tasks: [{name: gsm8k_train, weight: 1.0}]
limit: 100
"""


def run_config() -> Kind:
    """Config of a run."""
    folder = inputs.PACKAGE / "configs"
    return Kind(
        folders=[{"run.yaml": (folder / "demo.yaml").read_bytes()}],
        donors=[{"run.yaml": (folder / "paper-mistral-7b.yaml").read_bytes()}],
        formats={"run.yaml": mutations.mutate_yaml},
        loaders=[(read_run_config, 1), (plan_run_config, 200)],
        words=inputs.words("search/config.py", "decoding/config.py", "sandbox/config.py")
        + inputs.words("training/config.py", "evaluation/tasks", "sharding/config.py"),
    )


def read_run_config(folder: Path) -> None:
    from sdjax.search.announcement import tuned_method_count
    from sdjax.search.config import config_from, prompt_template, read_config
    from sdjax.search.grids import check_methods

    config = read_config(folder / "run.yaml")
    check_methods(config)
    tuned_method_count(config)
    prompt_template(config).render(
        slots=config.slots, descriptions={s: e.description for s, e in config.experts.items()}
    )
    assert config_from(config.to_json(), "stored") == config


def plan_run_config(folder: Path) -> None:
    from sdjax.search.announcement import announce
    from sdjax.search.config import read_config
    from sdjax.search.plan import plan_run

    announce(plan_run(read_config(folder / "run.yaml")))


def train_config() -> Kind:
    """Config of a training job."""
    folder = inputs.PACKAGE / "configs"
    kinds = ("sft", "dpo", "warmstart")
    texts = {kind: (folder / f"train-{kind}.yaml").read_bytes() for kind in kinds}
    return Kind(
        folders=[{f"{kind}.yaml": text} for kind, text in texts.items()],
        formats={f"{kind}.yaml": mutations.mutate_yaml for kind in texts},
        loaders=[(read_train_config, 1)],
        words=inputs.words("training/config.py", "models/lora.py"),
        shared={path.name: path.read_bytes() for path in folder.glob("*.jsonl")},
    )


def read_train_config(folder: Path) -> None:
    from sdjax.cli.train import _rows
    from sdjax.core.config import read_dataclass
    from sdjax.training.config import JOBS, WarmstartJob

    path = next(folder.iterdir(), folder / "sft.yaml")
    job = read_dataclass(JOBS[path.stem], path)
    job.mesh.make(default_axis="fsdp")
    if not isinstance(job, WarmstartJob):
        _rows(job)


def recipe() -> Kind:
    """Recipe of a merge."""
    texts = [path.read_bytes() for path in sorted(inputs.RECIPES.glob("recipes/*.yaml"))]
    return Kind(
        folders=[{"recipe.yaml": text} for text in texts],
        formats={"recipe.yaml": mutations.mutate_yaml},
        loaders=[(plan_recipe_file, 1), (merge_recipe_file, 200)],
        words=inputs.words("merging/recipe", "merging/methods"),
        shared=inputs.read(inputs.RECIPES / "models"),
    )


def tunable() -> Kind:
    """Recipe whose numbers are tuned, and configuration of mergekit-evolve."""
    recipes = [inputs.RECIPES / "recipes" / f"{name}.yaml" for name in ("task_arithmetic", "ties")]
    texts = [EVOLVE, *(path.read_bytes() for path in recipes)]
    return Kind(
        folders=[{"recipe.yaml": text} for text in texts],
        formats={"recipe.yaml": mutations.mutate_yaml},
        loaders=[(read_tunable, 1)],
        words=inputs.words(
            "tuning/evolve.py", "tuning/recipes.py", "merging/recipe/recipe_document.py"
        ),
    )


def read_tunable(folder: Path) -> None:
    from sdjax.tuning.model_set import ModelSet
    from sdjax.tuning.open_tunable import read_named_merge

    named = read_named_merge(str(folder / "recipe.yaml"))
    assert named is not None
    layers = [f"layers/{n}/mlp/up_proj" for n in range(4)]
    models = ModelSet(base=named.base, experts=named.experts, paths=("embed", *layers))
    tunable = named.open(models)
    tunable.write(tunable.start)


def plan_recipe_file(folder: Path) -> None:
    plan_files(folder / "recipe.yaml")


def merge_recipe_file(folder: Path) -> None:
    from sdjax.merging.recipe.pipeline import merge_recipe

    merge_recipe(folder / "recipe.yaml", folder.parent / "merged")


def plan_files(path: Path, *, allow_crimes: bool = False) -> Any:
    """Return the plan of a recipe, and write all files of the result except the tensors."""
    from sdjax.merging.recipe import output_files
    from sdjax.merging.recipe.model_card import RECIPE, Provenance, write_model_card
    from sdjax.merging.recipe.pipeline import _fingerprint
    from sdjax.merging.recipe.recipe_method import find_method
    from sdjax.merging.recipe.recipe_plan import plan_recipe
    from sdjax.merging.recipe.recipe_reader import read_recipe
    from sdjax.merging.recipe.source_models import open_source_model

    parsed = read_recipe(path)
    open_model = functools.cache(lambda name: open_source_model(name, path.parent))
    method, program = find_method(parsed, open_model)
    plan = plan_recipe(parsed, method, open_model, 0, allow_crimes=allow_crimes)
    template = output_files.resolve_chat_template(parsed, plan.models)
    provenance = Provenance(
        method=parsed.merge_method, file=RECIPE, text=parsed.text, seed=0, program=program
    )
    _fingerprint(plan, provenance, template)
    out = path.parent.parent / "out"
    out.mkdir(exist_ok=True)
    output_files.write_config(out, plan, {step.name: step.spec for step in plan.steps})
    output_files.write_tokenizer(out, plan.tokenizer, plan.template.folder, template)
    write_model_card(out, "out", plan, provenance)
    return plan
