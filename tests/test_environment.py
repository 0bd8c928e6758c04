"""Dependencies without which other tests would be skipped silently."""

import importlib.util
import os

import pytest


@pytest.mark.skipif("SDJAX_NO_TORCH" in os.environ, reason="SDJAX_NO_TORCH is set")
def test_torch_is_installed():
    """Check for torch, without which parity tests are skipped, unless SDJAX_NO_TORCH is set."""
    assert importlib.util.find_spec("torch")
