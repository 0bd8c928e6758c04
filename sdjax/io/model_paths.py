"""Names of models resolved to folders: `zoo:NAME`, a folder, or a model on Hugging Face."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from sdjax.core.errors import UserError, did_you_mean, truncated_repr
from sdjax.io.hub import HubError, cached_model, download_model

ZOO = Path(__file__).parent.parent / "zoo" / "models"
# Identities of the candidates that a model was trained on, next to its weights.
TRAINING_PROGRAMS = "training_programs.npy"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


# Cache folder of a model on Hugging Face: models--OWNER--NAME/snapshots/REVISION.
_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]+)(/|$)")


class HubModel(NamedTuple):
    """A revision of a model on Hugging Face: OWNER/NAME and the commit."""

    repository: str
    revision: str


def hub_model(folder: Path) -> HubModel | None:
    """Return the model on Hugging Face of a folder in huggingface_hub's cache, or None.

    Examples:
        >>> hub_model(Path("/cache/models--org--model/snapshots/0a1b"))
        HubModel(repository='org/model', revision='0a1b')
    """
    match = _SNAPSHOT.search(folder.absolute().as_posix())
    return HubModel(match[1].replace("--", "/"), match[2]) if match else None


def zoo_models() -> dict[str, Path]:
    """Return a dict from name to folder of the models in the package, the seed first."""
    folders = sorted(path.parent for path in ZOO.glob("*/config.json"))
    return {path.name: path for path in sorted(folders, key=lambda p: (p.name != "seed", p.name))}


def locate(name: str, *, relative_to: Path | None = None) -> tuple[Path, Path | None]:
    """Return the folder of a model, and that of its PEFT adapter or None.

    Args:
        name: MODEL or MODEL+ADAPTER, both as in `model_folder`; an existing folder with `+` in its
            name is that folder. Of several `+`, the one between two existing models separates them,
            or else the last.
        relative_to: folder that is searched before the working directory.

    Raises:
        UserError: there is no such model or adapter, or it cannot be downloaded.
    """
    model, adapter = _split(name, relative_to)
    if not adapter or _existing_folder(name, relative_to) is not None:
        return model_folder(name, relative_to=relative_to), None
    folder = model_folder(model, relative_to=relative_to)
    return folder, adapter_folder(adapter, relative_to=relative_to)


def _split(name: str, relative_to: Path | None) -> tuple[str, str]:
    """Return MODEL and ADAPTER of a name; ADAPTER is "" if there is none."""
    splits = [(name[: plus.start()], name[plus.end() :]) for plus in re.finditer(r"\+", name)]
    for model, adapter in splits:
        if _may_exist(model, relative_to) and _may_exist(adapter, relative_to):
            return model, adapter
    return splits[-1] if splits else (name, "")


def _may_exist(name: str, relative_to: Path | None) -> bool:
    """Return whether a name is that of a folder or of the zoo, or may be one on Hugging Face."""
    is_remote = HUB_NAME.fullmatch(name) is not None
    is_zoo = name.startswith("zoo:") and name[4:] in zoo_models()
    return is_remote or is_zoo or bool(name and _existing_folder(name, relative_to))


def model_folder(name: str, *, relative_to: Path | None = None) -> Path:
    """Return the folder of a model, downloading it if necessary.

    Args:
        name: `zoo:NAME`, a folder, or OWNER/MODEL or OWNER/MODEL@REVISION on Hugging Face. An
            existing folder takes precedence. Downloads are cached by huggingface_hub and need no
            network when they are used again.
        relative_to: folder that is searched before the working directory.

    Raises:
        UserError: there is no such model, or it cannot be downloaded.
    """
    return _folder(name, relative_to, "model")


def adapter_folder(name: str, *, relative_to: Path | None = None) -> Path:
    """Return the folder of a PEFT adapter, downloading it if necessary; see `model_folder`."""
    return _folder(name, relative_to, "adapter")


def _folder(name: str, relative_to: Path | None, kind: Literal["model", "adapter"]) -> Path:
    if name.startswith("zoo:"):
        models = zoo_models()
        if name[4:] not in models:
            hint = did_you_mean(name[4:], models, f"available: {', '.join(models)}")
            raise UserError(f"{name}: no such model in the zoo; {hint}")
        return models[name[4:]]
    folder = _existing_folder(name, relative_to)
    if folder is not None:
        return folder
    if os.path.isfile(name):
        raise UserError(f"{name}: a file; give the folder that contains it")
    if HUB_NAME.fullmatch(name):
        try:
            return download_model(name)
        except HubError as error:
            raise UserError(
                f"{name}: no such {kind} folder, and not downloaded from Hugging Face: {error}"
            ) from None
    printable = name if name.isprintable() and len(name) <= 200 else truncated_repr(name)
    searched = [] if relative_to is None else [relative_to.resolve(), Path.cwd()]
    if os.path.isabs(os.path.expanduser(name)):
        searched = []
    where = f" in {' or in '.join(dict.fromkeys(map(str, searched)))}" if searched else ""
    remedy = {
        "model": "give a Hugging Face folder, OWNER/MODEL on Hugging Face, or zoo:NAME",
        "adapter": "give the folder of a PEFT adapter, or OWNER/ADAPTER on Hugging Face",
    }
    raise UserError(f"{printable}: no such {kind} folder{where}; {remedy[kind]}")


def _existing_folder(name: str, relative_to: Path | None) -> Path | None:
    folders = [Path(os.path.expanduser(name))]
    if relative_to is not None:
        folders.insert(0, relative_to / name)
    # os.path, since pathlib raises on invalid names.
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def local_model_folder(name: str) -> Path | None:
    """Return the folder of a model if it is on this machine, without a download; else None.

    Args:
        name: a name as in `model_folder`.
    """
    if HUB_NAME.fullmatch(name) and _existing_folder(name, None) is None:
        return cached_model(name)
    try:
        return model_folder(name)
    except UserError:
        return None
