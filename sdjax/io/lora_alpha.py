"""The scales of a LoRA adapter's modules, as its settings define them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.linear_regex import PatternList

MAX_ALPHA = 1e9


class LoraAlphas:
    """The alpha of each module: `lora_alpha`, or that of the first pattern that matches its name.

    PEFT's patterns are regular expressions, whose matches may take forever. Here they take linear
    time, and few constructs are not supported.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path):
        """Read the settings of an adapter. Raises UserError if they are invalid."""
        self._path = path
        self._default = settings.get("lora_alpha")
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._invalid(f"not {truncated_repr(patterns)}")
        self._values = list(patterns.values())
        try:
            self._patterns = PatternList(patterns)
        except ValueError as error:
            raise self._invalid(str(error)) from None

    def of(self, module: str, rank: int) -> float:
        """Return the alpha of a module; without any, it is the rank."""
        try:
            match = self._patterns.first_match(module)
        except ValueError as error:
            raise self._invalid(str(error)) from None
        alpha = self._default if match is None else self._values[match]
        alpha = rank if alpha is None else alpha
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not -MAX_ALPHA < alpha < MAX_ALPHA:  # NaN is refused too
            raise UserError(f"{self._path}: alpha must be a number, not {truncated_repr(alpha)}")
        return float(alpha)

    def _invalid(self, reason: str) -> UserError:
        return UserError(
            f"{self._path}: alpha_pattern must be a mapping of regular expressions to numbers "
            f"({reason}); merge the adapter with peft if you trust it"
        )
