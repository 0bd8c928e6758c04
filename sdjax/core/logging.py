"""Log output of the command line.

The library logs to `logging.getLogger(__name__)` and configures nothing, so a caller may route or
silence it as usual. Only the command line calls `configure_logging`.
"""

from __future__ import annotations

import logging
import sys

from sdjax.core.visible import escape

_LOGGER = logging.getLogger("sdjax")


def is_main_process() -> bool:
    """Return whether this process is the one that prints and writes files.

    Imports no JAX and starts no backend unless the process has joined a distributed run.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0


class _StderrHandler(logging.Handler):
    """Handler that prints to the current `sys.stderr`, which progress bars and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process():
            print(escape(self.format(record)), file=sys.stderr)


def configure_logging(level: int = logging.INFO) -> None:
    """Print the package's log messages as lines `sdjax: ...` on stderr of the main process.

    Calling it again changes only the level.

    Args:
        level: the lowest level that is printed.
    """
    if not any(isinstance(handler, _StderrHandler) for handler in _LOGGER.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("sdjax: %(message)s"))
        _LOGGER.addHandler(handler)
        _LOGGER.propagate = False  # other libraries add handlers to the root logger
    _LOGGER.setLevel(level)
