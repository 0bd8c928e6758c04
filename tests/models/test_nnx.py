"""NNX modules: arrays shared with the parameter tree, equal logits, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sdjax.core.errors import UserError
from sdjax.models.nnx import from_nnx, to_nnx
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten
from sdjax.testing import tiny_model

TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 64, (2, 7)))


@pytest.fixture(
    params=[
        {},
        {"tie_embeddings": True},
        {"family": "phi3"},
        {"family": "gemma2", "final_logit_softcap": 2.0},
    ],
    ids=["untied", "tied", "fused", "capped"],
)
def model(request):
    return tiny_model(**request.param)


def test_conversion_shares_buffers_in_both_directions(model):
    config, params = model
    module = to_nnx(config, params)
    state = flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param))["params"])
    restored_config, restored = from_nnx(module)
    assert restored_config == config
    assert flatten(restored).keys() == state.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        pointer = leaf.unsafe_buffer_pointer()
        assert flatten(restored)[path] is leaf
        assert state[path].unsafe_buffer_pointer() == pointer


def test_module_logits_equal_forward(model):
    config, params = model
    module = to_nnx(config, params)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))

    @jax.jit
    def logits(params):
        hidden, _ = forward(params, None, TOKENS, config=config, positions=positions)
        return unembed(params, hidden, config=config)

    # XLA may fuse the two executables differently.
    module_logits = nnx.jit(type(module).__call__)(module, TOKENS)
    np.testing.assert_allclose(module_logits, logits(params), atol=1e-6)


def test_nnx_optimizer_reduces_the_loss():
    config, params = tiny_model()
    module = to_nnx(config, params)
    optimizer = nnx.Optimizer(module, optax.sgd(0.5), wrt=nnx.Param)

    def loss(module):
        logits = module(TOKENS)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    @nnx.jit
    def train_step(module, optimizer):
        value, gradients = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradients)
        return value

    first_loss = train_step(module, optimizer)
    for _ in range(3):
        last_loss = train_step(module, optimizer)
    assert last_loss < first_loss
    trained = flatten(from_nnx(module)[1])
    assert trained.keys() == flatten(params).keys()
    assert not np.array_equal(trained["embed"], flatten(params)["embed"])


def test_mismatched_leaves_raise_user_error(model):
    config, params = model
    with pytest.raises(UserError, match="final_norm is missing"):
        to_nnx(config, {key: leaf for key, leaf in params.items() if key != "final_norm"})
    with pytest.raises(UserError, match="extra is unexpected"):
        to_nnx(config, {**params, "extra": params["embed"]})
    with pytest.raises(UserError, match=r"embed has shape \[3, 16\]"):
        to_nnx(config, {**params, "embed": params["embed"][:3]})
