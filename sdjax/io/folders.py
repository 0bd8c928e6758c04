"""Where models are: those of the zoo by name, all others by their folder."""

from __future__ import annotations

from pathlib import Path

from sdjax.errors import UserError

ZOO = Path(__file__).parent.parent / "zoo" / "models"
# Beside the weights of a seed: what tells its own programs from remembered ones.
TRAINING_PROGRAMS = "training_programs.npy"


def zoo_models() -> dict[str, Path]:
    """Name to folder of every model that ships with the package, the seed first."""
    folders = sorted(path.parent for path in ZOO.glob("*/config.json"))
    return {path.name: path for path in sorted(folders, key=lambda p: (p.name != "seed", p.name))}


def model_folder(name: str) -> Path:
    """The folder of `zoo:NAME`, or the folder itself.

    Raises:
        UserError: there is no such model.
    """
    if name.startswith("zoo:"):
        models = zoo_models()
        if name[4:] not in models:
            raise UserError(f"{name}: no such model in the zoo; it has: {', '.join(models)}")
        return models[name[4:]]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name}: no such model folder; give a Hugging Face folder or zoo:NAME")
    return folder
