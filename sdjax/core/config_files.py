"""Config files that ship with the package, in configs/ of the checkout."""

from __future__ import annotations

import os
from pathlib import Path

from sdjax.core.errors import UserError, did_you_mean

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"

# Configs of training jobs are named train-KIND or train-KIND-….yaml; all others configure a run.
_JOB_PREFIX = "train-"


def shipped_configs(job: str | None = None) -> dict[str, Path]:
    """Return a dict from name to file of the shipped configs.

    Args:
        job: kind of training job, such as "dpo"; None for runs.
    """
    files = sorted(CONFIG_FOLDER.glob("*.yaml" if job is None else f"{_JOB_PREFIX}{job}*.yaml"))
    return {
        file.stem: file
        for file in files
        if job is not None or not file.stem.startswith(_JOB_PREFIX)
    }


def find_config(path: str | Path, job: str | None = None) -> Path:
    """Return the config file at `path`, or the shipped config with that name.

    "configs/demo.yaml" and "demo" work from any folder.

    Args:
        path: a YAML file, or the name of a shipped config.
        job: kind of training job, such as "dpo"; None for runs.

    Raises:
        UserError: neither exists.
    """
    path = Path(path)
    if os.path.isfile(path):  # pathlib raises on invalid names
        return path
    shipped = shipped_configs(job)
    name = path.name.removesuffix(".yaml")
    is_name = path.parent in (Path("."), Path("configs"))
    if is_name and name in shipped:
        return shipped[name]
    is_other = is_name and os.path.isfile(CONFIG_FOLDER / f"{name}.yaml")
    problem = "a config for another command" if is_other else "config not found"
    advice = f"pass a YAML file or a shipped config: {', '.join(shipped)}"
    raise UserError(f"{path}: {problem}; {did_you_mean(path.stem, shipped, advice)}")
