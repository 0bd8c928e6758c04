"""Loss through the merge: its gradient, what is compiled for it, and numbers without one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.methods.registry import algorithm
from sdjax.models.tree import flatten
from sdjax.sharding.memory import MemoryLimitExceeded
from sdjax.testing import count_compilations, random_params, tiny_model
from sdjax.training.packing import Example
from sdjax.training.sft import sft_loss
from sdjax.tuning.differentiability import blocking_operations
from sdjax.tuning.loss import MergeLoss, rows_per_part
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.open_tunable import open_tunable
from sdjax.tuning.search import SearchConfig
from tests.tuning.searches import tunable

EXAMPLES = [Example(prompt=(5, 6 + i % 7), target=(9, 10 + i % 5, 1)) for i in range(60)]
SEARCH = SearchConfig(budget=2, steps=3, starts=2, batch=2)
PATHS = tuple(f"layers/{i}/mlp/{kind}_proj" for i in (0, 1) for kind in ("up", "gate", "down"))
MODEL_GRADIENTS = CompileCache()  # of all tests


def loss_of(tuned, dtype=jnp.float32, num_layers=1):
    config, base = tiny_model(dtype=dtype, max_seq_len=16, num_layers=num_layers)
    experts = [random_params(config, seed=seed, dtype=dtype) for seed in (1, 2)]
    merger = sdjax.Merger(base, experts, scope="mlp")
    loss = MergeLoss(
        merger,
        tuned,
        base,
        config=config,
        compute_dtype=jnp.float32,
        key=jax.random.key(0),
        examples=EXAMPLES,
        search=SEARCH,
        compile_cache=MODEL_GRADIENTS,
    )
    return loss, merger, config


def program(function):
    """Return a tunable whose two numbers are the hyperparameters a and b of a function."""
    made = Algorithm.from_function(function)
    return dataclasses.replace(
        tunable(start=0.5), bind=lambda values: made.bind(a=values[0], b=values[1])
    )


def by_kind_and_depth(task_vectors, kind, depth, key, a: float = 0.5, b: float = 0.5):
    first, second = task_vectors.values()
    kept = jnp.where(jax.random.bernoulli(key, 0.7, first.shape), first, 0.0)
    return (a * kept if kind == "mlp.down_proj" else a * b * jnp.tanh(first)) + depth * b * second


def merge_trees(task_vectors, base, a: float = 0.5, b: float = 0.5):
    norm = jnp.sqrt(sum(jnp.sum(x * x) for x in base.values()))
    first, second = task_vectors.values()
    return {path: a * first[path] + b * b / norm * second[path] for path in first}


def weights_of_layers():
    models = ModelSet(base="base", experts={"expert_1": "a", "expert_2": "b"}, paths=PATHS)
    return open_tunable("layers", models)


def composed_gradient(tuned, loss, merger, config):
    """Return the loss of the second step and its gradient, differentiated as one function."""
    (batch,) = loss._batches[0][1]
    leaves, key = flatten(loss._params), jax.random.key(0)

    def composed(values):
        algorithm = tuned.bind(values)
        merged = merger.merge_in_trace(algorithm, dict(merger.tensors), key=key)
        return sft_loss(config)({}, {**leaves, **merged}, batch)[0]

    return jax.jit(jax.value_and_grad(composed))(np.asarray(tuned.start, np.float32))


def test_gradient_matches_finite_differences_and_compiles_once():
    loss, _, _ = loss_of(program(by_kind_and_depth))
    assert loss.blocking() == {}
    values, step = np.array([0.5, 0.5]), 1e-2
    _, gradient = loss(values, 0, 0)
    slopes = [
        (loss(values + d, 0, 0)[0] - loss(values - d, 0, 0)[0]) / (2 * step)
        for d in step * np.eye(2)
    ]
    np.testing.assert_allclose(gradient, slopes, rtol=2e-2, atol=1e-4)
    with count_compilations() as compilations:
        others = [loss(values * start, start, step)[0] for start in (0, 1) for step in range(3)]
    assert compilations.count == 0
    assert len(set(others)) == 6


def test_gradient_that_does_not_fit_into_memory_is_not_run(monkeypatch):
    loss, _, _ = loss_of(tunable(start=0.5))
    monkeypatch.setattr("sdjax.sharding.memory.host_memory", lambda: 10_000)
    message = r"the gradient needs .* GB of memory at once, but the machine has 1e-05 GB; tune by"
    with pytest.raises(MemoryLimitExceeded, match=message):
        loss(np.array([0.5, 0.5]), 0, 0)


STRUCTURES = [
    pytest.param(lambda: program(by_kind_and_depth), id="kind and depth"),
    pytest.param(weights_of_layers, id="layers"),
    pytest.param(lambda: program(merge_trees), id="tree"),
]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradient_is_that_of_the_composed_loss(structure):
    tuned = structure()
    loss, merger, config = loss_of(tuned, num_layers=2)
    assert loss.blocking() == {}
    value, gradient = loss(tuned.start, 0, 1)
    expected, slopes = composed_gradient(tuned, loss, merger, config)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-7)


def test_another_structure_compiles_no_model_gradient():
    compiled = []
    for tuned in (tunable(start=0.5), program(by_kind_and_depth), program(merge_trees)):
        loss, merger, _ = loss_of(tuned)
        loss(tuned.start, 0, 0)
        compiled.append((MODEL_GRADIENTS.compiled, merger.compile_cache.compiled))
    models, merges = zip(*compiled, strict=True)
    assert models[0] == models[1] == models[2] > 0
    # A merge and its gradient for each of two shapes, for each of three kinds, and for the tree.
    assert merges == (4, 6, 2)


@pytest.mark.slow
def test_loss_is_that_of_the_merged_weights_in_their_stored_dtype():
    tuned = tunable(start=0.5)
    loss, merger, config = loss_of(tuned, jnp.bfloat16)
    merged = merger(tuned.bind(tuned.start)).params
    assert {leaf.dtype for leaf in flatten(merged).values()} == {jnp.dtype(jnp.bfloat16)}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), merged)
    (batch,) = loss._batches[1][2]
    expected, _ = jax.jit(sft_loss(config))({}, flatten(params), batch)
    np.testing.assert_allclose(loss(tuned.start, 1, 2)[0], expected, rtol=1e-5)


def test_rows_of_a_part_divide_the_batch_and_the_devices():
    assert rows_per_part(64, 128) == 8
    assert rows_per_part(8, 128) == 8
    assert rows_per_part(12, 256) == 4
    assert rows_per_part(7, 512) == 1
    assert rows_per_part(8, 4096) == 1
    assert rows_per_part(64, 128, devices=4) == 32
    assert rows_per_part(8, 4096, devices=4) == 4


@pytest.mark.slow
def test_parts_of_a_batch_have_the_gradient_of_the_whole(monkeypatch):
    whole = loss_of(tunable(start=0.5))[0](np.array([0.5, 0.4]), 0, 1)
    monkeypatch.setattr("sdjax.tuning.loss._PART_TOKENS", 1)
    loss = loss_of(tunable(start=0.5))[0]
    assert len(loss._batches[0][1]) == SEARCH.batch
    parts = loss(np.array([0.5, 0.4]), 0, 1)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-4)


def test_operations_without_a_gradient_are_named():
    x = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)

    def function(values):
        kept = jnp.where(values[1] > 0.3, 1.0, 2.0) * x
        return values[0] * kept + jnp.floor(values[2]) + jnp.sort(values.reshape(5, 1)[3] * x)

    assert blocking_operations(function, 5) == {1: ("gt",), 2: ("floor",), 4: ()}

    def repeated(values):
        return jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * values[0]), (0, x)
        )

    assert blocking_operations(repeated, 1) == {0: ("while",)}


def test_number_that_takes_two_rounds_of_a_loop_has_an_effect():
    def function(values):
        def rotated(carry, _):
            a, b, c = carry
            return (a, a * 2, b + jnp.floor(values[1])), c

        return jax.lax.scan(rotated, (values[0], 0.0, 0.0), None, length=4)[1]

    assert blocking_operations(function, 3) == {1: ("floor",), 2: ()}


def test_analysis_allocates_no_large_array():
    def function(values):
        return jnp.broadcast_to(values[0], (1 << 22, 1 << 22))[::-1] + jnp.floor(values[1])

    assert blocking_operations(function, 2) == {1: ("floor",)}


@pytest.mark.parametrize(
    ("name", "parameter", "operations"),
    [("ties", "density", ("floor", "ge", "gt")), ("sce", "select_topk", ("floor", "ge"))],
)
def test_number_of_a_method_without_a_gradient_is_named(name, parameter, operations):
    tuned = dataclasses.replace(
        tunable(start=0.5), bind=lambda values: algorithm(name, **{parameter: values[1]})
    )
    loss, _, _ = loss_of(tuned)
    # The first number is unused.
    assert loss.blocking() == {0: (), 1: operations}


def test_loop_prevents_the_gradient_in_all_numbers():
    def halve(task_vectors, a: float = 0.5, b: float = 0.5):
        first, second = task_vectors.values()
        halved = jax.lax.while_loop(lambda x: jnp.max(x) > 1e-3, lambda x: a * x, first)
        return halved + b * second

    loss, _, _ = loss_of(program(halve))
    assert loss.blocking() == {0: ("while",), 1: ("while",)}


def test_merge_that_jax_cannot_differentiate_is_reported():
    @jax.custom_vjp
    def refused(x):
        return x

    def backward(*_):
        raise NotImplementedError("no rule for this")

    refused.defvjp(lambda x: (x, x), backward)

    def blend(task_vectors, a: float = 1.0, b: float = 1.0):
        first, second = task_vectors.values()
        return refused(a * first) + b * second

    made = Algorithm.from_function(blend)
    tuned = dataclasses.replace(tunable(), bind=lambda v: made.bind(a=v[0], b=v[1]))
    loss, _, _ = loss_of(tuned)
    assert loss.blocking() == dict.fromkeys((0, 1), ("no rule for this",))
