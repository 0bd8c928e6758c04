"""The configuration of a run: a file, one that ships with the package, or what a store keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sdjax
from sdjax.core.config import dataclass_from, read_dataclass
from sdjax.core.errors import UserError
from sdjax.search.config import RunConfig

PACKAGED = Path(sdjax.__file__).parent / "configs"


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name that ships with the package.

    "configs/demo.yaml" and "demo" thus work from any folder. Raises UserError where neither is.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = PACKAGED / f"{path.stem}.yaml"
    if path.parent in (Path("."), Path("configs")) and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
    raise UserError(f"{path}: no such config; give a YAML file, or one that ships: {names}")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and validates the configuration of a run; see `find_config` and `read_dataclass`."""
    return read_dataclass(RunConfig, find_config(path), overrides)


def config_from(data: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration of plain data, such as a run's store keeps."""
    return dataclass_from(RunConfig, data, where)
