"""Jitted functions that are shared by several rounds of training."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax


class JitCache:
    """Jitted functions, found by the value of the function and the options of `jax.jit`.

    `jax.jit` compiles again for each function object. The functions of training are frozen
    dataclasses, which are equal if their settings are. Rounds of training that share a cache
    therefore compile each function once per shape of its arguments.
    """

    def __init__(self) -> None:
        """Create an empty cache."""
        self._jitted: dict[Hashable, Callable[..., Any]] = {}

    def jit(
        self,
        function: Callable[..., Any],
        *,
        out_shardings: Any = None,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Return the jitted function, the same for equal functions and options.

        Args:
            function: hashable function to compile.
            out_shardings: pytree of shardings of the results; None leaves them to the compiler.
            donate_argnums: positions of the arguments whose buffers are donated.
        """
        leaves, structure = jax.tree.flatten(out_shardings, is_leaf=lambda leaf: leaf is None)
        key = (function, tuple(leaves), structure, donate_argnums)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(
                function, out_shardings=out_shardings, donate_argnums=donate_argnums
            )
        return self._jitted[key]
