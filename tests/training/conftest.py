"""Tiny model for the training tests."""

import jax
import jax.numpy as jnp
import pytest

from sdjax.models.lora import init_adapter
from sdjax.models.params import init_params
from sdjax.testing import tiny_config


@pytest.fixture(scope="session")
def config():
    return tiny_config(
        vocab_size=48, num_heads=2, num_kv_heads=1, max_seq_len=128, tie_embeddings=True
    )


@pytest.fixture(scope="session")
def weights(config):
    return init_params(config, jax.random.key(0), jnp.float32)


@pytest.fixture(scope="session")
def fresh_adapter(config):
    return init_adapter(config, jax.random.key(1), rank=4, alpha=8)
