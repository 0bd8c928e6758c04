"""Log-probabilities in chunks: what is never made, and what a shared prefix saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.training import logprobs as logprobs_module
from sdjax.training.fit import rematerialised
from sdjax.training.packing import Example, batches_of, behind_prefix, pack
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import full_finetune, lora_finetune

B, T, V = 4, 64, 48


def shapes_in(jaxpr):
    """Of all values of a program, its inner programs included."""
    for equation in jaxpr.eqns:
        yield from (tuple(out.aval.shape) for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_no_array_of_all_logits_exists_forwards_or_backwards(
    config, weights, fresh_adapter, monkeypatch, kind
):
    monkeypatch.setattr(logprobs_module, "LOGITS", B * T * V // 4)
    trainee = (
        full_finetune(config, weights)
        if kind == "whole"
        else lora_finetune(config, weights, fresh_adapter)
    )
    batch = pack([Example(prompt=(3,), target=(5,) * (T - 1))] * B, T)
    loss = sft_loss(config, trainee.assemble)
    program = jax.make_jaxpr(jax.grad(loss, has_aux=True))(trainee.trainable, trainee.frozen, batch)
    logits = {shape for shape in shapes_in(program.jaxpr) if shape and shape[-1] == V}
    largest = max(int(np.prod(shape)) for shape in logits)
    assert largest <= B * T * V // 4
    assert any(len(shape) == 3 for shape in logits)  # the chunks are seen at all


def test_trained_tokens_alone_give_the_same_loss_and_gradient(config, weights):
    rng = np.random.default_rng(0)
    examples = [
        Example(prompt=(3, 4, 6), target=tuple(rng.integers(0, 48, size))) for size in (23, 2, 9, 3)
    ]
    rows = pack(examples, 26)
    assert len(rows["tokens"]) == 2
    trainee = full_finetune(config, weights)
    loss = jax.jit(jax.value_and_grad(sft_loss(config, trainee.assemble), has_aux=True))
    whole = loss(trainee.trainable, {}, rows)
    for parts in (1, 2):
        (alone,) = batches_of(rows, [np.array([1, 0])], parts=parts)
        assert alone["at"].shape == (parts, 52 // parts)  # 64 would be more than there are
        found = loss(trainee.trainable, {}, alone)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, whole
        )


def test_all_batches_have_as_many_places_as_the_fullest_part():
    trained = [3, 70, 5, 1]
    weights = np.zeros((4, 80), np.float32)
    for row, count in enumerate(trained):
        weights[row, 1 : count + 1] = 1
    data = {"tokens": np.arange(320).reshape(4, 80), "weights": weights}
    chosen = [np.array([0, 2]), np.array([3, 1])]
    for parts, most in ((1, 128), (2, 80)):
        found = list(batches_of(data, chosen, parts=parts))
        for batch, rows in zip(found, chosen, strict=True):
            assert batch["at"].shape == (parts, most)
            behind = np.roll(batch["tokens"].reshape(parts, -1), -1, axis=1)
            seen = np.take_along_axis(behind, batch["at"], 1)[batch["weights"] > 0]
            wanted = [data["tokens"][row, 1 : trained[row] + 1] for row in rows]
            assert seen.tolist() == np.concatenate(wanted).tolist()


@pytest.mark.parametrize("trained", ["whole", "adapter"])
def test_behind_a_shared_prefix_loss_and_gradient_are_those_of_whole_texts(
    config, weights, fresh_adapter, trained
):
    prompt, targets = (3, 4, 5, 6, 7), [(8, 9, 1), (10, 1), (11, 12, 13, 1)]
    trainee = (
        full_finetune(config, weights)
        if trained == "whole"
        else lora_finetune(config, weights, jax.tree.map(lambda leaf: leaf + 0.1, fresh_adapter))
    )
    loss = sft_loss(config, trainee.assemble)
    shared = behind_prefix(prompt, targets, 8)
    apart = [pack([Example(prompt=prompt, target=target)], 12) for target in targets]
    apart = {name: np.concatenate([one[name] for one in apart]) for name in apart[0]}
    values, slopes = zip(
        *(
            jax.value_and_grad(loss, has_aux=True)(trainee.trainable, trainee.frozen, batch)
            for batch in (shared, apart)
        ),
        strict=True,
    )
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *slopes)


def test_rematerialised_is_the_same_loss_with_the_same_gradient(config, weights):
    trainee = full_finetune(config, weights)
    batch = pack([Example(prompt=(3, 4), target=(5, 6, 1))], 8)
    loss = sft_loss(config, trainee.assemble)
    given = (trainee.trainable, {}, batch)
    plain, again = (
        jax.value_and_grad(one, has_aux=True)(*given) for one in (loss, rematerialised(loss))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, again)
    assert "remat" in str(jax.make_jaxpr(rematerialised(loss))(*given))


def test_bfloat16_computes_with_what_float32_keeps(config, weights):
    trainee = full_finetune(config, weights, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in trainee.trainable.values()} == {jnp.dtype(jnp.float32)}
    batch = pack([Example(prompt=(3, 4), target=(5, 6, 1))], 8)
    loss = sft_loss(config, trainee.assemble)
    (value, _), slopes = jax.value_and_grad(loss, has_aux=True)(trainee.trainable, {}, batch)
    exact, _ = sft_loss(config)(full_finetune(config, weights).trainable, {}, batch)
    assert abs(value - exact) < 0.02
    assert value != exact
    assert {leaf.dtype for leaf in slopes.values()} == {jnp.dtype(jnp.float32)}
