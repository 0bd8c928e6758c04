"""Gradient of a merge on eight devices: that of one device."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import jax, jax.numpy as jnp, numpy as np
    import sdjax
    from sdjax.models.params import param_specs
    from sdjax.models.tree import unflatten
    from sdjax.sharding.mesh import make_mesh
    from sdjax.sharding.rules import shardings
    from sdjax.testing import random_params, tiny_model
    from sdjax.training.packing import Example
    from sdjax.tuning.loss import MergeLoss
    from sdjax.tuning.search import SearchConfig
    from tests.tuning.searches import tunable

    assert len(jax.devices()) == 8
    examples = [Example(prompt=(5, 6 + i % 7), target=(9, 10 + i % 5, 1)) for i in range(60)]
    config, base = tiny_model(num_layers=1, max_seq_len=16)
    models = [base, *(random_params(config, seed=seed) for seed in (1, 2))]

    def gradient(sizes):
        placed = models
        if sizes:
            places = shardings(unflatten(param_specs(config)), make_mesh(sizes))
            placed = [jax.device_put(params, places) for params in models]
        loss = MergeLoss(
            sdjax.Merger(placed[0], placed[1:], scope="mlp"),
            tunable(start=0.5),
            placed[0],
            config=config,
            compute_dtype=jnp.float32,
            key=jax.random.key(0),
            examples=examples,
            search=SearchConfig(budget=1, steps=1, batch=8),
        )
        value, slope = loss(np.array([0.5, 0.5]), 0, 0)
        return [value, *slope]

    expected = gradient(None)
    for sizes in ({"tensor": 8}, {"data": 2, "tensor": 2, "fsdp": 2}, {"fsdp": 8}):
        np.testing.assert_allclose(gradient(sizes), expected, rtol=1e-4)
    print("same")
    """
)


@pytest.mark.slow
def test_gradient_on_a_mesh_is_that_of_one_device():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "same", result.stderr[-2000:]
