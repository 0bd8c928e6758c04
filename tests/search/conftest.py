"""Fixtures for a minimal search on the zoo."""

import dataclasses

import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.comparison_config import BaselinesConfig
from sdjax.search.config import RunConfig, read_config
from sdjax.search.context import RunContext, build_context
from tests.compiled_once import compiled_once


@pytest.fixture(scope="session")
def small_config() -> RunConfig:
    """Two iterations of eight samples, scored as written, and 24 problems in the search."""
    config = read_config("configs/demo.yaml")
    return dataclasses.replace(
        config,
        iterations=2,
        task=dataclasses.replace(config.task, development=30, confirmation=6, test=24),
        generation=dataclasses.replace(
            config.generation,
            samples=8,
            decoding=DecoderConfig(slots=8, prefill_batch=8, buckets=(16, 224), max_new_tokens=96),
        ),
        evaluation=DecoderConfig(slots=24, prefill_batch=24, buckets=(48,), max_new_tokens=12),
        training=dataclasses.replace(config.training, max_steps=2, rank=2, batch_size=2),
        baselines=BaselinesConfig(paper={"task_arithmetic": {"weight": (0.2, 0.6)}}),
        transfer={},
        score="as_written",
        tuning=None,
        controls=None,
        test=dataclasses.replace(config.test, top_k=2, ablations=0),
    )


@pytest.fixture(scope="package")
def context(small_config) -> RunContext:
    """Return the loaded parts of the search."""
    return build_context(small_config)


@pytest.fixture(scope="package")
def sandbox(context):
    """Return a running sandbox of the search."""
    with Sandbox(context.signature, workers=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="package", autouse=True)
def compile_once(tmp_path_factory):
    """Share executables between the runs of these tests."""
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield
