"""Statistics of a tiny model against a float64 model in NumPy, and finite differences of it."""

from functools import partial

import jax
import numpy as np
import pytest
from numpy_llama import forward, log_likelihood

from sdjax.merging.statistics import statistic_name
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.statistics.config import StatisticsConfig
from sdjax.statistics.examples import batches
from sdjax.statistics.sums import add_batch, means, zero_sums
from sdjax.testing import tiny_model
from sdjax.training.packing import Example
from sdjax.xla.compiler_options import quick_options

EXAMPLES = [
    Example(prompt=(5, 9, 7), target=(11, 3)),
    Example(prompt=(4,), target=(8, 8, 20, 31, 6, 1)),
    Example(prompt=(12, 13), target=(14,)),
]
TOKENS = sum(map(len, EXAMPLES))
# Vectors of all kinds, and matrices before and after the attention.
CHECKED = ("embed", "lm_head", "final_norm", "layers/0/attn/k_proj", "layers/1/mlp/down_proj")


@pytest.fixture(scope="module")
def model():
    return tiny_model(tie_embeddings=False, vocab_size=32)


def sum_up(model, examples, settings):
    config, params = model
    step = jax.jit(partial(add_batch, config=config, settings=settings))
    sums, executable = zero_sums(config, settings), None
    for batch in batches(examples, settings.batch):
        if executable is None:
            executable = step.lower(params, sums, batch).compile(quick_options())
        sums = executable(params, sums, batch)
    return sums


def compute(model, **changes):
    sums = sum_up(model, EXAMPLES, StatisticsConfig(**{"batch": 2, **changes}))
    return means(sums, examples=len(EXAMPLES), tokens=TOKENS)


def test_products_of_inputs(model):
    config, params = model
    got = compute(model, kinds=("gram", "input_norm"))
    leaves = flatten(params)
    every = [forward(leaves, e.prompt + e.target, config)[1] for e in EXAMPLES]
    matrices = [path for path in param_specs(config) if path.endswith(("_proj", "lm_head"))]
    assert {statistic_name("gram", path) for path in matrices} == {
        name for name in got if name.startswith("gram/")
    }
    for path in matrices:
        inputs = np.concatenate([one[path] for one in every])
        want = inputs.T @ inputs / TOKENS
        for name, value in (("gram", want), ("input_norm", np.sqrt(np.diag(want)))):
            found = got[statistic_name(name, path)]
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5 * np.abs(value).max())


def squared_slopes(model, path, index, examples, step=1e-5):
    """Return the mean over examples of the squared derivative of the log-likelihood."""
    config, params = model
    leaves = {name: np.asarray(x, np.float64) for name, x in flatten(params).items()}
    slopes = []
    for example in examples:
        values = []
        for sign in (1, -1):
            moved = leaves[path].copy()
            moved[index] += sign * step
            values.append(log_likelihood({**leaves, path: moved}, example, config))
        slopes.append((values[0] - values[1]) / (2 * step))
    return np.mean(np.square(slopes))


def test_empirical_fisher_information(model):
    config, _ = model
    got = compute(model, kinds=("fisher",), labels="data")
    assert got.keys() == {f"fisher/{path}" for path in param_specs(config)}
    rng = np.random.default_rng(0)
    for path in CHECKED:
        information = np.asarray(got[f"fisher/{path}"])
        assert information.shape == param_specs(config)[path].shape
        largest = np.unravel_index(information.argmax(), information.shape)
        for index in (largest, tuple(int(rng.integers(size)) for size in information.shape)):
            want = squared_slopes(model, path, index, EXAMPLES)
            np.testing.assert_allclose(information[index], want, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_fisher_information_of_drawn_targets(model):
    """Average over many drawn targets of one token: the expectation is known exactly."""
    config, params = model
    example, path = Example(prompt=(5, 9, 7), target=(11,)), "final_norm"
    settings = StatisticsConfig(kinds=("fisher",), batch=400, seed=3)
    sums = sum_up(model, [example] * 400, settings)
    logits, _ = forward(flatten(params), example.prompt, config)
    probabilities = np.exp(logits[-1]) / np.exp(logits[-1]).sum()
    for index in ((0,), (7,)):
        each = [
            squared_slopes(model, path, index, [Example(prompt=example.prompt, target=(token,))])
            for token in range(config.vocab_size)
        ]
        mean = probabilities @ np.array(each)
        spread = np.sqrt(probabilities @ np.square(each - mean) / 400)
        assert abs(sums[f"fisher/{path}"][index] / 400 - mean) < 4 * spread


@pytest.mark.slow
def test_padding_and_the_size_of_batches_change_nothing(model):
    one, three = (compute(model, batch=batch) for batch in (1, 4))
    for name, value in one.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(three[name], value, rtol=1e-4, atol=1e-5 * scale)
    other = compute(model, seed=1, kinds=("fisher",))
    assert not np.allclose(other["fisher/final_norm"], one["fisher/final_norm"])
