"""Where models are: those of the zoo by name, others by their folder or on Hugging Face."""

from __future__ import annotations

import re
from pathlib import Path

from sdjax.errors import UserError

ZOO = Path(__file__).parent.parent / "zoo" / "models"
# Beside the weights of a seed: what tells its own programs from remembered ones.
TRAINING_PROGRAMS = "training_programs.npy"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def zoo_models() -> dict[str, Path]:
    """Name to folder of every model that ships with the package, the seed first."""
    folders = sorted(path.parent for path in ZOO.glob("*/config.json"))
    return {path.name: path for path in sorted(folders, key=lambda p: (p.name != "seed", p.name))}


def model_folder(name: str) -> Path:
    """The folder of a model: `zoo:NAME`, a folder, or one fetched from Hugging Face.

    A name on Hugging Face is OWNER/MODEL or OWNER/MODEL@REVISION; a folder of that name goes first.
    What was fetched once stays in the cache of huggingface_hub, and is used without a network.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    if name.startswith("zoo:"):
        models = zoo_models()
        if name[4:] not in models:
            raise UserError(f"{name}: no such model in the zoo; it has: {', '.join(models)}")
        return models[name[4:]]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if HUB_NAME.fullmatch(name):
        return _fetch(name)
    raise UserError(
        f"{name}: no such model folder; give a Hugging Face folder, a name OWNER/MODEL on Hugging "
        "Face, or zoo:NAME"
    )


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
