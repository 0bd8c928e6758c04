"""Durations of a run's phases, for its store and for the estimate of the time that is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sdjax.search.estimate import describe_time_left, units_done
from sdjax.search.plan import RunPlan
from sdjax.search.store import Store

logger = logging.getLogger(__name__)


class PhaseClock:
    """Measures the phases of a run and logs estimates of the time that is left."""

    def __init__(self, plan: RunPlan, store: Store) -> None:
        """Start without any measured rates: a resumed run may be on another machine."""
        self._plan = plan
        self._store = store
        self._rates: dict[str, float] = {}
        self._baseline_times: list[float] = []

    @contextmanager
    def timed(self, iteration: int, phase: str) -> Iterator[None]:
        """Measure a phase; save its duration, unless it is already saved."""
        start, before = time.monotonic(), units_done(self._store, phase)
        yield
        seconds, units = time.monotonic() - start, units_done(self._store, phase) - before
        if units > 0:
            self._rates[phase] = seconds / units
        if (iteration, phase) not in self._store.phases():
            self._store.save_phase(iteration, phase, seconds)

    def baseline_scored(self) -> None:
        """Log the first estimate after the third baseline.

        The first one includes the compilation of decoding, and the second one that of merging.
        """
        self._baseline_times.append(time.monotonic())
        if len(self._baseline_times) == 3:
            first, second, third = self._baseline_times
            self._rates["baselines"] = min(second - first, third - second)
            self.log_estimate()

    def log_estimate(self) -> None:
        """Log the time that is left, if a rate has been measured and there is work left."""
        sentence = describe_time_left(self._plan, self._store, self._rates)
        if sentence is not None:
            logger.info("%s", sentence)
