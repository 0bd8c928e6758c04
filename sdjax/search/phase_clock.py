"""Durations of a run's phases, for its store and for the estimate of the time that is left."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from sdjax.search.estimate import describe_time_left, units_done
from sdjax.search.plan import RunPlan
from sdjax.search.store import Store
from sdjax.search.types import SEARCH, phase_name

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
    def timed(self, iteration: int, phase: str, purpose: str = SEARCH) -> Iterator[None]:
        """Measure a phase and save its duration.

        The duration of a phase that an extension of the run continues is that of all its work. A
        resumption that finds nothing left to do leaves it as it is.
        """
        start, before = time.monotonic(), units_done(self._store, phase)
        yield
        seconds, units = time.monotonic() - start, units_done(self._store, phase) - before
        if units > 0 and phase != "baselines":
            self._rates[phase] = seconds / units
        name = phase_name(phase, purpose)
        earlier = self._store.phases().get((iteration, name))
        if earlier is None:
            self._store.save_phase(iteration, name, seconds)
        elif units > 0:
            self._store.save_phase(iteration, name, earlier + seconds)

    def baseline_scored(self) -> None:
        """Measure the rate of scoring, and log the first estimate after the fourth baseline.

        The rate is a median, since a few of the baselines include compilation. The interval before
        the first one, which includes the compilation of decoding, does not count.
        """
        self._baseline_times.append(time.monotonic())
        if len(self._baseline_times) > 1:
            intervals = [after - before for before, after in pairwise(self._baseline_times)]
            self._rates["baselines"] = statistics.median(intervals)
        if len(self._baseline_times) == 4:
            self.log_estimate()

    def log_estimate(self) -> None:
        """Log the time that is left, if a rate has been measured and there is work left."""
        sentence = describe_time_left(self._plan, self._store, self._rates)
        if sentence is not None:
            logger.info("%s", sentence)
