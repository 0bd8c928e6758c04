"""Durations of a run's phases: for its store, its time limit, and the estimate of the time left."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from sdjax.search.estimate import describe_time_left, units_done
from sdjax.search.plan import RunPlan
from sdjax.search.run_limits import search_seconds
from sdjax.search.store import Store
from sdjax.search.types import SEARCH, UnfinishedPhase, phase_name
from sdjax.sharding.multihost import broadcast_from_main

# A process that is killed loses at most so much of its time.
_SECONDS_BETWEEN_NOTES = 5.0

logger = logging.getLogger(__name__)


class PhaseClock:
    """Measures the phases of a run and logs estimates of the time that is left."""

    def __init__(self, plan: RunPlan, store: Store) -> None:
        """Start without any measured rates: a resumed run may be on another machine."""
        self._plan = plan
        self._store = store
        self._rates: dict[str, float] = {}
        self._baseline_times: list[float] = []
        self._current: tuple[int, str] | None = None
        self._earlier = 0.0  # what interrupted processes have spent on the current phase
        self._start = self._noted = 0.0

    @contextmanager
    def timed(self, iteration: int, phase: str, purpose: str = SEARCH) -> Iterator[None]:
        """Measure a phase and save its duration.

        The duration of a phase that an extension of the run continues is that of all its work. A
        resumption that finds nothing left to do leaves it as it is.
        """
        before, name = units_done(self._store, phase), phase_name(phase, purpose)
        self._current = iteration, name
        self._earlier = self._store.unfinished_phases().get(self._current, 0.0)
        self._start = self._noted = time.monotonic()
        try:
            yield
        finally:
            self._current = None
        seconds, units = time.monotonic() - self._start, units_done(self._store, phase) - before
        if units > 0 and phase != "baselines":
            self._rates[phase] = seconds / units
        complete = self._store.phases().get((iteration, name))
        if complete is None:
            self._store.save_phase(iteration, name, self._earlier + seconds)
        elif units > 0 or self._earlier > 0:
            self._store.save_phase(iteration, name, complete + self._earlier + seconds)

    def out_of_time(self) -> bool:
        """Return, on every process, whether the search has used the hours that it may take.

        The time of the phase in progress is noted in the store, so that it counts for a process
        that resumes the run.
        """
        self._note(every=_SECONDS_BETWEEN_NOTES)
        limit = self._plan.config.limits.max_hours
        if limit is None:
            return False

        def decide() -> bytes:
            unnoted = 0.0 if self._current is None else time.monotonic() - self._noted
            return bytes([search_seconds(self._store) + unnoted >= 3600 * limit])

        is_over = broadcast_from_main(decide) == b"\x01"
        if is_over:
            self._note(every=0.0)
        return is_over

    def _note(self, *, every: float) -> None:
        """Note the time of the phase in progress, unless it was noted in the last seconds."""
        now = time.monotonic()
        if self._current is None or now - self._noted < every:
            return
        iteration, name = self._current
        seconds = self._earlier + now - self._start
        self._store.save(UnfinishedPhase(iteration=iteration, name=name, seconds=seconds))
        self._noted = now

    def baseline_scored(self) -> None:
        """Measure the rate of scoring, and log the first estimate after the fourth baseline.

        The rate is a median, since a few of the baselines include compilation. The interval before
        the first one, which includes the compilation of decoding, does not count.
        """
        self._note(every=_SECONDS_BETWEEN_NOTES)
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
