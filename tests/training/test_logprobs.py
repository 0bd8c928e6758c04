"""Log-probabilities in chunks, target indices, shared prefixes and rematerialization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.training import logprobs as logprobs_module
from sdjax.training.fit import rematerialize
from sdjax.training.packing import Example, pack, prefix_batch, target_batches
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import full_finetune, lora_finetune

B, T, V = 4, 64, 48


def shapes_in(jaxpr):
    """Return the shapes of all values of a jaxpr, including nested jaxprs."""
    for equation in jaxpr.eqns:
        yield from (tuple(out.aval.shape) for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_full_logits_never_exist_in_forward_or_backward_pass(
    config, weights, fresh_adapter, monkeypatch, kind
):
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", B * T * V // 4)
    trainable = (
        full_finetune(config, weights)
        if kind == "whole"
        else lora_finetune(config, weights, fresh_adapter)
    )
    batch = pack([Example(prompt=(3,), target=(5,) * (T - 1))] * B, T)
    loss = sft_loss(config, trainable.assemble)
    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
        trainable.trainable, trainable.frozen, batch
    )
    logits = {shape for shape in shapes_in(jaxpr.jaxpr) if shape and shape[-1] == V}
    largest = max(int(np.prod(shape)) for shape in logits)
    assert largest <= B * T * V // 4
    assert any(len(shape) == 3 for shape in logits)  # the chunks are among them


def test_target_batches_give_the_same_loss_and_gradient(config, weights):
    rng = np.random.default_rng(0)
    examples = [
        Example(prompt=(3, 4, 6), target=tuple(rng.integers(0, 48, size).tolist()))
        for size in (23, 2, 9, 3)
    ]
    rows = pack(examples, 26)
    assert len(rows["tokens"]) == 2
    trainable = full_finetune(config, weights)
    loss = jax.jit(jax.value_and_grad(sft_loss(config, trainable.assemble), has_aux=True))
    whole = loss(trainable.trainable, {}, rows)
    for parts in (1, 2):
        (alone,) = target_batches(rows, [np.array([1, 0])], parts=parts)
        assert alone["target_index"].shape == (parts, 52 // parts)  # 64 would exceed the tokens
        found = loss(trainable.trainable, {}, alone)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, whole
        )


def test_target_batches_have_equal_widths():
    trained = [3, 70, 5, 1]
    weights = np.zeros((4, 80), np.float32)
    for row, count in enumerate(trained):
        weights[row, 1 : count + 1] = 1
    data = {"tokens": np.arange(320).reshape(4, 80), "weights": weights}
    chosen = [np.array([0, 2]), np.array([3, 1])]
    for parts, most in ((1, 128), (2, 80)):
        found = list(target_batches(data, chosen, parts=parts))
        for batch, rows in zip(found, chosen, strict=True):
            assert batch["target_index"].shape == (parts, most)
            next_tokens = np.roll(batch["tokens"].reshape(parts, -1), -1, axis=1)
            target_tokens = np.take_along_axis(next_tokens, batch["target_index"], 1)[
                batch["weights"] > 0
            ]
            expected = [data["tokens"][row, 1 : trained[row] + 1] for row in rows]
            assert target_tokens.tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("trained", ["whole", "adapter"])
def test_shared_prefix_gives_the_same_loss_and_gradient(config, weights, fresh_adapter, trained):
    prompt, targets = (3, 4, 5, 6, 7), [(8, 9, 1), (10, 1), (11, 12, 13, 1)]
    trainable = (
        full_finetune(config, weights)
        if trained == "whole"
        else lora_finetune(config, weights, jax.tree.map(lambda leaf: leaf + 0.1, fresh_adapter))
    )
    loss = sft_loss(config, trainable.assemble)
    shared = prefix_batch(prompt, targets, 8)
    separate = [pack([Example(prompt=prompt, target=target)], 12) for target in targets]
    separate = {name: np.concatenate([one[name] for one in separate]) for name in separate[0]}
    values, slopes = zip(
        *(
            jax.jit(jax.value_and_grad(loss, has_aux=True))(
                trainable.trainable, trainable.frozen, batch
            )
            for batch in (shared, separate)
        ),
        strict=True,
    )
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *slopes)


def test_rematerialized_loss_has_the_same_gradient(config, weights):
    trainable = full_finetune(config, weights)
    batch = pack([Example(prompt=(3, 4), target=(5, 6, 1))], 8)
    loss = sft_loss(config, trainable.assemble)
    arguments = (trainable.trainable, {}, batch)
    plain, again = (
        jax.jit(jax.value_and_grad(one, has_aux=True))(*arguments)
        for one in (loss, rematerialize(loss))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, again)
    assert "remat" in str(jax.make_jaxpr(rematerialize(loss))(*arguments))


def test_bfloat16_computation_keeps_float32_master_weights(config, weights):
    trainable = full_finetune(config, weights, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in trainable.trainable.values()} == {jnp.dtype(jnp.float32)}
    batch = pack([Example(prompt=(3, 4), target=(5, 6, 1))], 8)
    loss = sft_loss(config, trainable.assemble)
    slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), slopes = slope(trainable.trainable, {}, batch)
    exact, _ = jax.jit(sft_loss(config))(full_finetune(config, weights).trainable, {}, batch)
    assert abs(value - exact) < 0.02
    assert value != exact
    assert {leaf.dtype for leaf in slopes.values()} == {jnp.dtype(jnp.float32)}
