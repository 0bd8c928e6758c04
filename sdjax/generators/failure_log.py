"""Log lines about failed requests: few, even if many requests fail at the same time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

_MAX_LINES = 5  # per _SECONDS
_SECONDS = 30.0

logger = logging.getLogger(__name__)


class FailureLog:
    """Logs a line per failed attempt, at most 5 in 30 seconds; later lines count the others."""

    def __init__(self, where: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without failures.

        Args:
            where: start of each line: the generator and its address.
            clock: returns the time in seconds.
        """
        self._where = where
        self._clock = clock
        self._times = deque[float](maxlen=_MAX_LINES)
        self._unlogged = 0
        self._last_reason = ""

    def add(self, reason: str, *, attempt: int, max_attempts: int, wait: float) -> None:
        """Log an attempt that will be repeated.

        Args:
            reason: what is wrong, as a clause.
            attempt: number of attempts so far, from 1.
            max_attempts: maximum number of attempts.
            wait: seconds before the next attempt.
        """
        now = self._clock()
        if len(self._times) == _MAX_LINES and now - self._times[0] < _SECONDS:
            self._unlogged += 1
            self._last_reason = reason
            return
        self._times.append(now)
        logger.warning(
            "%s: %s; attempt %d of %d failed, the next one is in %.1f seconds%s",
            self._where,
            reason,
            attempt,
            max_attempts,
            wait,
            f" ({_failures(self._unlogged)} since the last line)" if self._unlogged else "",
        )
        self._unlogged = 0

    def close(self) -> None:
        """Log how many attempts failed since the last line, if there are any."""
        if self._unlogged:
            logger.warning(
                "%s: %s since the last line, the last one: %s",
                self._where,
                _failures(self._unlogged),
                self._last_reason,
            )
        self._unlogged = 0


def _failures(count: int) -> str:
    return f"{count} more failed attempt{'' if count == 1 else 's'}"
