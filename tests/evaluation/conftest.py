"""One grader for all tests of the room, with less time for an answer than users have."""

import dataclasses

import pytest

from sdjax.evaluation import grader as room
from sdjax.evaluation.tasks import minerva_math


@pytest.fixture(scope="session")
def grader():
    limits = dataclasses.replace(room.LIMITS, cpu_seconds=1)
    grader = room.Grader(limits=limits)
    yield grader
    grader.close()


@pytest.fixture
def quick_grading(grader, monkeypatch):
    """The task of mathematics asks this grader."""
    monkeypatch.setattr(minerva_math, "shared_grader", lambda allow_missing: grader)
