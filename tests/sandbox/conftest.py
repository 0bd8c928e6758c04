"""A small merge signature and a running sandbox, shared by all tests of the sandbox."""

import sys
from pathlib import Path

import pytest

from sdjax.sandbox.config import Limits
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature

sys.path.insert(0, str(Path(__file__).parent))  # makes `catalogue` and `refused` importable

SHAPES = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}


@pytest.fixture(scope="session")
def signature() -> MergeSignature:
    tensors = {
        f"layers/{layer}/mlp/{name}": (f"mlp.{name}", shape)
        for layer in range(2)
        for name, shape in SHAPES.items()
    }
    slots = ("expert_1", "expert_2", "expert_3")
    return MergeSignature.of(
        # Processor time must run out before the wall clock, on a busy machine, too.
        *(slots, tensors),
        Limits(equations=1_500, cpu_seconds=2, wall_seconds=600.0, compile_wall_seconds=600.0),
    )


@pytest.fixture(scope="session")
def sandbox(signature):
    with Sandbox(signature, workers=2) as sandbox:
        yield sandbox
