"""The NNX module holds the same arrays, gives the same logits and can be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.nnx import from_nnx, to_nnx
from sdjax.models.params import abstract_params
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=32,
)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 64, (2, 7)))


def random_params(config, dtype=jnp.float32):
    """Parameters from NumPy: drawing them with JAX takes seconds of compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            0.1 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), leaf.dtype
        ),
        abstract_params(config, dtype),
    )


@pytest.fixture(
    params=[
        {},
        {"tie_embeddings": True},
        {"family": "phi3"},
        {"family": "gemma2", "logit_cap": 2.0},
    ],
    ids=["untied", "tied", "fused", "capped"],
)
def model(request):
    config = dataclasses.replace(CONFIG, **request.param)
    return config, random_params(config)


def test_the_leaves_are_the_same_buffers_there_and_back(model):
    config, params = model
    module = to_nnx(config, params)
    state = flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param))["params"])
    found_config, found = from_nnx(module)
    assert found_config == config
    assert flatten(found).keys() == state.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        pointer = leaf.unsafe_buffer_pointer()
        assert flatten(found)[path] is leaf
        assert state[path].unsafe_buffer_pointer() == pointer


def test_the_logits_are_the_same(model):
    config, params = model
    module = to_nnx(config, params)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))

    @jax.jit
    def logits(params):
        hidden, _ = forward(params, None, TOKENS, config=config, positions=positions)
        return unembed(params, hidden, config=config)

    # Two programs, which XLA may fuse differently.
    found = nnx.jit(type(module).__call__)(module, TOKENS)
    np.testing.assert_allclose(found, logits(params), atol=1e-6)


def test_an_nnx_optimiser_trains_it():
    params = random_params(CONFIG)
    module = to_nnx(CONFIG, params)
    optimiser = nnx.Optimizer(module, optax.sgd(0.5), wrt=nnx.Param)

    def loss(module):
        logits = module(TOKENS)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    @nnx.jit
    def step(module, optimiser):
        value, gradients = nnx.value_and_grad(loss)(module)
        optimiser.update(module, gradients)
        return value

    first = step(module, optimiser)
    for _ in range(3):
        last = step(module, optimiser)
    assert last < first
    trained = flatten(from_nnx(module)[1])
    assert trained.keys() == flatten(params).keys()
    assert not np.array_equal(trained["embed"], flatten(params)["embed"])


def test_leaves_that_do_not_fit(model):
    config, params = model
    with pytest.raises(UserError, match="final_norm is missing"):
        to_nnx(config, {key: leaf for key, leaf in params.items() if key != "final_norm"})
    with pytest.raises(UserError, match="odd is surplus"):
        to_nnx(config, {**params, "odd": params["embed"]})
    with pytest.raises(UserError, match=r"embed has shape \[3, 16\]"):
        to_nnx(config, {**params, "embed": params["embed"][:3]})
