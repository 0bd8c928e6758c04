"""Wrong shapes and dtypes are rejected by the annotations that `tests/conftest.py` checks."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from sdjax.models.transformer import forward
from sdjax.testing import tiny_model
from sdjax.xla.matmul import matmul_transposed


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (jnp.zeros(4, int), jnp.zeros(4, int)),  # rank 1
        (jnp.zeros((1, 4), int), jnp.zeros((1, 5), int)),  # different lengths
        (jnp.zeros((1, 4)), jnp.zeros((1, 4), int)),  # float tokens
    ],
)
def test_forward_rejects_wrong_shapes_and_dtypes(tokens, positions):
    config, params = tiny_model()
    with pytest.raises(TypeCheckError):
        forward(params, None, tokens, config=config, positions=positions)


def test_matmul_rejects_different_inner_sizes():
    with pytest.raises(TypeCheckError):
        matmul_transposed(jnp.zeros((2, 3)), jnp.zeros((4, 5)))
