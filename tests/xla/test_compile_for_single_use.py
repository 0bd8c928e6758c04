"""Choice of compile options by the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.xla import compiler_options
from sdjax.xla.compiler_options import LARGE, compile_for_single_use, lean_options

SMALL = (8, 128)
WIDE = (LARGE // 128, 128)


def scaled(x):
    return x * jnp.bfloat16(0.3) + x


def by_norm(x):
    return x / jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def of_exponentials(x):
    return x / jnp.sum(jnp.exp(x.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("function", "shape", "options"),
    [
        (scaled, SMALL, lean_options),
        (scaled, WIDE, lean_options),
        (by_norm, SMALL, lean_options),
        (by_norm, WIDE, lambda: None),  # the sum is split across the cores
        (of_exponentials, SMALL, lambda: None),
    ],
)
def test_large_reductions_and_transcendentals_use_fusion_emitters(
    monkeypatch, function, shape, options
):
    compiled_with, expected = [], options()  # which compiles, so before `compile` is replaced
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda _, compiler_options: compiled_with.append(compiler_options),
    )
    monkeypatch.setattr(compiler_options.jax, "default_backend", lambda: "cpu")
    compile_for_single_use(jax.jit(function).lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16)))
    assert compiled_with == [expected]


@pytest.mark.parametrize("function", [scaled, by_norm])
def test_lean_options_give_the_same_bits(function):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(SMALL), jnp.bfloat16)
    lowered = jax.jit(function).lower(x)
    np.testing.assert_array_equal(compile_for_single_use(lowered)(x), lowered.compile()(x))
