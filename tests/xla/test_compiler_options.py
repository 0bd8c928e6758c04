"""Compile options, limited to those that the installed XLA supports."""

import jax
import numpy as np
import pytest

from sdjax.xla import compiler_options
from sdjax.xla.compiler_options import lean_options, quick_options


@pytest.mark.parametrize("options", [lean_options, quick_options])
def test_installed_xla_compiles_with_the_options(options):
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options())
    assert compiled(1.0) == 2


def test_quick_options_include_the_lean_ones():
    assert lean_options().items() <= quick_options().items()
    assert quick_options()["xla_backend_optimization_level"] == "0"


def test_option_missing_from_xla_is_left_out(monkeypatch):
    lacking = {"xla_cpu_no_such_option": True, "xla_backend_optimization_level": "0"}
    monkeypatch.setattr(compiler_options, "_LEAN", lacking)
    assert lean_options() == {"xla_backend_optimization_level": "0"}
    assert np.isfinite(
        jax.jit(lambda x: x).lower(1.0).compile(compiler_options=lean_options())(1.0)
    )
