"""The environment has what the other tests would silently skip without."""

import importlib.util
import os

import pytest


@pytest.mark.skipif("SDJAX_NO_TORCH" in os.environ, reason="SDJAX_NO_TORCH is set")
def test_torch_is_installed():
    """Or the parity tests are skipped; `make test-newest` sets SDJAX_NO_TORCH."""
    assert importlib.util.find_spec("torch")
