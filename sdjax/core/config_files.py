"""Config files that ship with the package, in configs/ of the checkout."""

from __future__ import annotations

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
    if path.is_file():
        return path
    shipped = shipped_configs(job)
    if path.parent in (Path("."), Path("configs")) and path.stem in shipped:
        return shipped[path.stem]
    raise UserError(
        f"{path}: config not found; {did_you_mean(path.stem, shipped)}pass a YAML file or a "
        f"shipped config: {', '.join(shipped)}"
    )
