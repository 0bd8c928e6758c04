"""The grid points of the human-designed methods, as entries of a run."""

from __future__ import annotations

from typing import Any, Literal

from sdjax.core.config import errors_at
from sdjax.merging.methods.registry import algorithm
from sdjax.search.config import RunConfig, method_entry

GRIDS: tuple[Literal["paper", "fine"], ...] = ("paper", "fine")


def grid_methods(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return a mapping from entry name to method, hyperparameters and grids of each grid point."""
    methods: dict[str, dict[str, Any]] = {}
    for grid in GRIDS:
        for method, hyperparameters in config.baselines.combinations(grid):
            name = method_entry(method, hyperparameters)
            detail = {"method": method, "hyperparameters": hyperparameters, "grids": []}
            methods.setdefault(name, detail)["grids"].append(grid)
    return methods


def check_methods(config: RunConfig) -> None:
    """Raise UserError if a grid names an unknown method or hyperparameter."""
    for grid in GRIDS:
        for method, hyperparameters in config.baselines.combinations(grid):
            with errors_at(config, f"baselines.{grid}.{method}"):
                algorithm(method, **hyperparameters)
