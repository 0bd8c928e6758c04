"""Append-only JSONL file of a computation that can be killed at any point and resumed.

settings.json   everything that the lines depend on, which must be the same when the computation
                resumes; the versions that it was started with, and accepted changes of them
NAME.jsonl      one line per finished step; an incomplete last line is dropped
NAME.lock       lock file held by the process that writes to the folder
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import read_bytes
from sdjax.core.storage_errors import storage_errors
from sdjax.core.versions import version_differences
from sdjax.io.atomic_write import partial_path, write_file
from sdjax.io.lock import lock_folder
from sdjax.io.safetensors_reader import read_json

SETTINGS = "settings.json"
_MAX_BYTES = 2_000_000_000  # of all lines
_VERSIONS, _ACCEPTED = "versions", "accepted"
_DIGEST = re.compile("[0-9a-f]{16,}")  # says nothing to a user

logger = logging.getLogger(__name__)


class ResumableLog:
    """A locked folder with the settings of a computation and a line per finished step.

    Attributes:
        folder: the folder.
        lines: the complete lines of an interrupted computation.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        file: str,
        lock: str,
        content: str,
        versions: Mapping[str, str] | None = None,
        accept_versions: bool = False,
    ) -> None:
        """Open or create the folder.

        Args:
            folder: the folder.
            settings: everything that the lines depend on, JSON-compatible.
            file: name of the JSONL file.
            lock: name of the lock file.
            content: what the folder contains, for error messages, such as "evaluation".
            versions: versions of packages, which `check_versions` compares with those of the
                folder.
            accept_versions: continue although versions differ, and record the difference.

        Raises:
            UserError: the folder contains something else or a computation with different settings,
                or another process is writing to it.
        """
        self.folder = folder
        self.lines: list[str] = []
        self.path = folder / file
        self._settings = dict(settings)
        self._versions = dict(versions or {})
        self._accept_versions = accept_versions
        self._stored: dict[str, Any] = {_VERSIONS: self._versions, _ACCEPTED: []}
        with contextlib.ExitStack() as resources, storage_errors(folder):
            if not _is_usable(folder, lock):
                raise UserError(
                    f"{folder}: contains other files, but no {content}; choose another --out"
                )
            folder.mkdir(parents=True, exist_ok=True)
            resources.callback(lock_folder(folder, lock).release)
            if (folder / SETTINGS).is_file():
                stored = read_json(folder / SETTINGS)
                stored_versions = {  # sdjax 0.2 stored no versions
                    _VERSIONS: _checked(stored.pop(_VERSIONS, {}), dict, folder),
                    _ACCEPTED: _checked(stored.pop(_ACCEPTED, []), list, folder),
                }
                self.lines = _complete_lines(self.path)
                # Without a line, nothing depends on the settings, if they are of the same kind.
                if self.lines or stored.keys() != self._settings.keys():
                    self._stored = stored_versions
                    self._check_settings(stored, content)
            self._write_settings()
            self.rewrite(self.lines)
            self._file: IO[str] = resources.enter_context(self.path.open("a", encoding="utf-8"))
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release the lock."""
        with storage_errors(self.folder):
            self._resources.close()

    def append(self, line: str) -> None:
        """Append a line, which survives the death of this process."""
        with storage_errors(self.folder):
            os.stat(self.path)  # writing to a removed file does not fail
            print(line, file=self._file, flush=True)

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace all lines, atomically; nothing can be appended afterward."""
        write_file(self.path, "".join(f"{line}\n" for line in lines))

    def check_versions(self) -> None:
        """Compare the versions before a computation resumes.

        Raises:
            UserError: versions differ from those of the folder and are not accepted.
        """
        changes = version_differences(self._stored[_VERSIONS], self._versions)
        if not changes:
            return
        if not self._accept_versions:
            raise UserError(
                f"{self.folder}: started differently: {', '.join(changes)}; so its results may "
                "differ from those to come; go back to what it was started with, accept this with "
                "--accept-versions, or choose another --out"
            )
        logger.warning("resuming with other versions: %s", ", ".join(changes))
        accepted = [*self._stored[_ACCEPTED], *changes]
        self._stored = {_VERSIONS: self._versions, _ACCEPTED: accepted}
        self._write_settings()

    def _check_settings(self, stored: Mapping[str, Any], content: str) -> None:
        for key in stored:  # version 0.2.0 stored no dtype
            if stored[key] != self._settings.get(key):
                article = "an" if content[0] in "aeiou" else "a"
                difference = _difference(key, stored[key], self._settings.get(key))
                raise UserError(
                    f"{self.folder}: contains {article} {content} {difference}; choose another "
                    "--out"
                )

    def _write_settings(self) -> None:
        with storage_errors(self.folder):
            content = json.dumps(self._settings | self._stored, indent=2)
            write_file(self.folder / SETTINGS, f"{content}\n")


def _is_usable(folder: Path, lock: str) -> bool:
    """Return whether the folder is missing, empty, or has settings."""
    if not folder.is_dir():
        return not folder.exists()
    # Files left by a computation that was killed during startup.
    leftovers = {lock, partial_path(folder / SETTINGS).name}
    return (folder / SETTINGS).is_file() or {path.name for path in folder.iterdir()} <= leftovers


def _checked(value: Any, kind: type, folder: Path) -> Any:
    """Return a stored collection of strings of this kind; raise UserError if it is not one."""
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(value, kind) and all(isinstance(item, str) for item in items):
        return value
    raise UserError(
        f"{folder / SETTINGS}: {truncated_repr(value)} is not a list of versions; choose another "
        "--out"
    )


def _difference(name: str, stored: Any, new: Any) -> str:
    """Return how a stored setting differs from the new one."""
    name = _name(name)
    if isinstance(stored, dict) and isinstance(new, dict):
        names = [key for key in dict.fromkeys((*new, *stored)) if stored.get(key) != new.get(key)]
        shown = ", ".join(map(_name, names[:8])) + (", …" if len(names) > 8 else "")
        return f"that differs in the {name} of {shown}"
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (stored, new)):
        return f"that differs in the {name}"
    return f"with {name} = {truncated_repr(stored)}, not {truncated_repr(new)}"


def _name(key: str) -> str:
    return key if key.isidentifier() else truncated_repr(key)


def _complete_lines(path: Path) -> list[str]:
    """Return the lines of a file whose last line may be incomplete."""
    content = read_bytes(path, _MAX_BYTES) if path.exists() else b""
    return [line.decode("utf-8", "replace") for line in content.split(b"\n")[:-1]]
