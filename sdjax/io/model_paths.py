"""Where models are: those of the zoo by name, others by their folder or on Hugging Face."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sdjax.core.errors import UserError, truncated_repr

ZOO = Path(__file__).parent.parent / "zoo" / "models"
# Beside the weights of a seed: what tells its own programs from remembered ones.
TRAINING_PROGRAMS = "training_programs.npy"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def zoo_models() -> dict[str, Path]:
    """Name to folder of every model that ships with the package, the seed first."""
    folders = sorted(path.parent for path in ZOO.glob("*/config.json"))
    return {path.name: path for path in sorted(folders, key=lambda p: (p.name != "seed", p.name))}


def locate(name: str, *, beside: Path | None = None) -> tuple[Path, Path | None]:
    """The folders of MODEL or MODEL+ADAPTER: the model's, and the PEFT adapter's or None.

    Either is named as for `model_folder`; a folder with + in its name is that folder.
    """
    model, _, adapter = name.partition("+")
    if not adapter or _existing(name, beside) is not None:
        return model_folder(name, beside=beside), None
    return model_folder(model, beside=beside), model_folder(adapter, beside=beside)


def model_folder(name: str, *, beside: Path | None = None) -> Path:
    """The folder of a model: `zoo:NAME`, a folder, or one fetched from Hugging Face.

    A name on Hugging Face is OWNER/MODEL or OWNER/MODEL@REVISION; a folder of that name goes first.
    What was fetched once stays in the cache of huggingface_hub, and is used without a network.

    Args:
        beside: a folder in which to look before the working directory.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    if name.startswith("zoo:"):
        models = zoo_models()
        if name[4:] not in models:
            raise UserError(f"{name}: no such model in the zoo; it has: {', '.join(models)}")
        return models[name[4:]]
    folder = _existing(name, beside)
    if folder is not None:
        return folder
    if HUB_NAME.fullmatch(name):
        return _fetch(name)
    told = name if name.isprintable() and len(name) <= 200 else truncated_repr(name)
    where = "" if beside is None else f" in {beside} or in {Path.cwd()}"
    raise UserError(
        f"{told}: no such model folder{where}; give a Hugging Face folder, a name OWNER/MODEL on "
        "Hugging Face, or zoo:NAME"
    )


def _existing(name: str, beside: Path | None) -> Path | None:
    folders = [Path(os.path.expanduser(name))]
    if beside is not None:
        folders.insert(0, beside / name)
    # Of os.path, because pathlib raises for a name that no folder can have.
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def _fetch(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"],
                # The same weights once more, as some repositories have them.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is none that you may see: correct the name, or log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}: correct that"
    except errors.LocalEntryNotFoundError:
        reason = (
            "it is not in the cache, and Hugging Face cannot be reached from here: copy the model "
            "into a folder"
        )
    except Exception as error:  # the client's own, the network's or the disk's
        reason = " ".join(str(error).split())[:200]
    raise UserError(f"{name}: no such model folder, and not fetched from Hugging Face; {reason}")
