"""Symbolic links in folders that may come from someone else.

Followed without a check, a link in a downloaded model copies any file of the user's into a result,
and one in a run folder changes or removes files elsewhere. Links are therefore followed only from a
model in huggingface_hub's cache to the files of the same model there. The folder that a user names
may itself be a link.

The folder is not expected to change while it is used: whoever can write it while a command runs can
replace its contents anyway.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from sdjax.core.errors import UserError, truncated_repr

# A model's cache has its files under their hashes in blobs/, and links to them in snapshots/.
_SNAPSHOT = re.compile(r"(.*/(?:models|datasets)--[^/]+)/snapshots/[^/]+(?:/.*)?")


def member(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, which may not exist.

    Args:
        folder: a folder of a model, an adapter or a tokenizer.
        name: name of the file, relative to the folder.

    Raises:
        UserError: the name leads out of the folder, as does `../x` or an absolute path, or is not
            printable; a part of it is a link that leads out; or it is a device, a pipe or the like.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or not name.isprintable():
        raise UserError(
            f"{folder}: {truncated_repr(name)} is not the name of a file in this folder; "
            "copy the folder again from a source that you trust"
        )
    path, real_folder = folder / name, os.path.realpath(folder)
    target = os.path.realpath(path)
    if target != os.path.join(real_folder, *parts) and not _is_blob(real_folder, target):
        raise _refused_link(path, target)
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        raise _special(path)
    return path


def check_own_folder(folder: Path) -> None:
    """Raise UserError if a folder that sdjax writes is a link or contains one, at any depth.

    Args:
        folder: a folder of sdjax's own files; it need not exist.
    """
    if os.path.islink(folder):
        raise _refused_link(folder, os.path.realpath(folder))
    pending = [folder] if os.path.isdir(folder) else []
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise _refused_link(Path(entry.path), os.path.realpath(entry.path))
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise _special(Path(entry.path))


def create_file(path: Path) -> int:
    """Return the descriptor of a new file, open for writing; an existing file or link is replaced.

    The target of a link, and other names of the same file, keep their content.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _is_blob(real_folder: str, target: str) -> bool:
    match = _SNAPSHOT.fullmatch(real_folder)
    return match is not None and os.path.dirname(target) == f"{match[1]}/blobs"


def _refused_link(path: Path, target: str) -> UserError:
    return UserError(
        f"{path}: leads to {target} by a symbolic link, which is not followed since the folder may "
        "come from someone else; replace the link with a copy of the file"
    )


def _special(path: Path) -> UserError:
    return UserError(f"{path}: neither a file nor a folder; remove it")
