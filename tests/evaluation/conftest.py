"""One grader for all tests, with a shorter time limit per answer than usual; shared executables."""

import dataclasses

import pytest

from sdjax.evaluation import grader as grader_module
from sdjax.evaluation.tasks import minerva_math
from tests.compiled_once import compiled_once


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


@pytest.fixture(scope="package", autouse=True)
def compile_once(tmp_path_factory):
    """Share executables between the evaluations of these tests."""
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield
