"""Merging on 8 devices gives the numbers of one, and keeps the leaves where they were."""

import os
import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sdjax.algorithms.registry import algorithm
    from sdjax.merging.algorithm import Algorithm
    from sdjax.merging.engine import Merger
    from sdjax.merging.programs import Programs
    from sdjax.models.tree import flatten, unflatten

    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    shapes = {"up_proj": (64, 32), "down_proj": (32, 64)}
    specs = {"up_proj": P("model", None), "down_proj": P(None, ("data", "model"))}

    def tree(near=None):
        leaves = {}
        for layer in range(2):
            for name, shape in shapes.items():
                path = f"layers/{layer}/mlp/{name}"
                at = 0 if near is None else np.asarray(near[path], np.float32)
                leaves[path] = jnp.asarray(at + 0.1 * rng.standard_normal(shape), jnp.bfloat16)
        return leaves

    def spread(leaves):
        return {
            path: jax.device_put(leaf, NamedSharding(mesh, specs[path.split("/")[-1]]))
            for path, leaf in leaves.items()
        }

    def free_form(task_vectors, base, key, depth):
        a, b, c = task_vectors.values()
        mixed = jnp.sort(a, axis=-1) + (b @ b.T) @ c * 0.1 + depth * base
        return mixed * jax.random.bernoulli(key, 0.5, a.shape) * jnp.quantile(jnp.abs(b), 0.5)

    def merge_trees(task_vectors):
        total = sum(jnp.sum(leaf ** 2) for leaf in task_vectors["expert_1"].values())
        return {p: x / jnp.sqrt(total) for p, x in task_vectors["expert_1"].items()}

    base = tree()
    experts = [tree(base) for _ in range(3)]
    quick = Programs(quick=True)
    one = Merger(unflatten(base), [unflatten(e) for e in experts], programs=quick)
    quick = Programs(quick=True)
    eight = Merger(
        unflatten(spread(base)), [unflatten(spread(e)) for e in experts], programs=quick
    )
    names = ("ties", "dare_ties", "slerp", "model_stock", "self_developing_a")
    every = [algorithm(name) for name in names]
    every += [Algorithm.from_function(free_form), Algorithm.from_function(merge_trees)]
    key = jax.random.key(1)
    for method in every:
        a, b = one(method, key=key), eight(method, key=key)
        np.testing.assert_allclose(a.change, b.change, rtol=1e-4)
        assert a.finite and b.finite
        want, got = flatten(a.params), flatten(b.params)
        for path, leaf in got.items():
            assert leaf.sharding == NamedSharding(mesh, specs[path.split("/")[-1]]), method.name
            x, y = np.asarray(want[path], np.float32), np.asarray(leaf, np.float32)
            # Sums in another order differ in float32, and a rounding may then go the other way.
            np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-6, err_msg=method.name)
            assert np.mean(x != y) < 0.02, (method.name, np.mean(x != y))

    # Elementwise methods need no communication: only the one scalar sum of the statistics.
    eight.programs.clear()
    for name in ("task_arithmetic", "dare_linear", "magmax"):
        eight(algorithm(name), key=key)
    for program in eight.programs:
        text = program.as_text()
        assert not re.search(r"all-gather|all-to-all|collective-permute", text)
        for shape in re.findall(r"= (\\S+) all-reduce", text):
            assert shape.startswith("f32[]"), shape
    print("same")
    """
)


def test_eight_devices_give_the_numbers_of_one():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "same"
