import logging
from types import SimpleNamespace

import pytest

from sdjax.core import progress
from sdjax.core.progress import format_duration, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="sdjax")
    return lambda: [record.getMessage() for record in caplog.records]


def run(clock, steps: int, seconds: float, total: float | None, **options) -> None:
    with progress_bar("score", total, **options) as advance:
        for _ in range(steps):
            clock.now += seconds
            advance()


def test_one_line_per_tenth_and_one_at_the_end(clock, lines):
    run(clock, 40, 5.0, 40)
    assert len(lines()) == 10
    assert lines()[0] == "score: 10 %, 4 of 40, 3 min left"
    assert lines()[8] == "score: 90 %, 36 of 40, 20 s left"
    assert lines()[9] == "score: 40 of 40 in 3 min 20 s"


def test_fast_phase_is_one_line(clock, lines):
    run(clock, 1000, 0.0004, 1000)
    assert lines() == ["score: 1,000 of 1,000 in 0 s"]


def test_earlier_steps_do_not_count_as_fast(clock, lines):
    run(clock, 10, 6.0, 100, completed=90)
    assert lines()[-1] == "score: 100 of 100 (10 in this process) in 1 min"
    run(clock, 20, 6.0, 100, completed=80)
    assert lines()[-2] == "score: 90 %, 90 of 100, 1 min left"


def test_first_step_does_not_count_in_the_rate(clock, lines):
    with progress_bar("score", 10) as advance:
        for seconds in (600, 2, 2, 2):  # the first one compiles
            clock.now += seconds
            advance()
    assert lines()[0] == "score: 10 %, 1 of 10"
    assert lines()[1] == "score: 20 %, 2 of 10, 16 s left"
    assert lines()[3] == "score: 40 %, 4 of 10, 12 s left"


def test_phase_without_steps_logs_nothing(clock, lines):
    run(clock, 0, 0, 0)
    run(clock, 0, 0, 10, completed=10)
    assert lines() == []


def test_total_that_is_known_later(clock, lines):
    with progress_bar("merge", None) as advance:
        for _ in range(4):
            clock.now += 2
            advance(total=4)
    assert lines() == [
        "merge: 25 %, 1 of 4",
        "merge: 50 %, 2 of 4, 4 s left",
        "merge: 75 %, 3 of 4, 2 s left",
        "merge: 4 of 4 in 8 s",
    ]


def test_interrupted_phase_has_no_last_line(clock, lines):
    def interrupt() -> None:
        with progress_bar("score", 4) as advance:
            advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert lines() == []


def test_only_the_main_process_reports(clock, lines, monkeypatch):
    monkeypatch.setattr(progress, "is_main_process", lambda: False)
    run(clock, 40, 5.0, 40)
    assert lines() == []


def test_library_is_silent(clock, caplog):
    run(clock, 40, 5.0, 40)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min"),
        (160, "2 min 40 s"),
        (3600, "1 h"),
        (12_000, "3 h 20 min"),
        (86_399, "24 h"),
        (86_400, "1 day"),
        (200_000, "2 days 8 h"),
    ],
)
def test_durations_are_rounded_to_two_units(seconds, text):
    assert format_duration(seconds) == text
