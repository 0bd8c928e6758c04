"""One grader for all tests, with a shorter time limit per answer than usual."""

import dataclasses

import pytest

from sdjax.evaluation import grader as grader_module
from sdjax.evaluation.tasks import minerva_math


@pytest.fixture(scope="session")
def grader():
    limits = dataclasses.replace(grader_module.LIMITS, cpu_seconds=1)
    grader = grader_module.Grader(limits=limits)
    yield grader
    grader.close()


@pytest.fixture
def quick_grading(grader, monkeypatch):
    """Make MinervaMath use the shared grader."""
    monkeypatch.setattr(minerva_math, "shared_grader", lambda allow_missing: grader)
