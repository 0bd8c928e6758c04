"""Merging on eight devices: the result of one device, with shardings preserved."""

import os
import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sdjax.merging.methods.registry import algorithm
    from sdjax.core.errors import UserError
    from sdjax.merging.algorithm import Algorithm
    from sdjax.merging.engine import Merger
    from sdjax.merging.compile_cache import CompileCache
    from sdjax.models.tree import flatten, unflatten
    from sdjax.sharding import memory

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

    def shard(leaves):
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
    quick = CompileCache(quick=True)
    one = Merger(unflatten(base), [unflatten(e) for e in experts], compile_cache=quick)
    quick = CompileCache(quick=True)
    eight = Merger(
        unflatten(shard(base)), [unflatten(shard(e)) for e in experts], compile_cache=quick
    )
    names = ("ties", "slerp", "model_stock", "karcher", "multislerp", "sce", "breadcrumbs")
    every = [algorithm(name) for name in names]
    random = [
        algorithm(name, density=0.5, rescale="none")
        for name in ("dare_linear", "dare_ties", "della", "della_linear")
    ]
    every += random
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
            # Float32 sums depend on the order, which may change a rounding.
            np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-6, err_msg=method.name)
            assert np.mean(x != y) < 0.02, (method.name, np.mean(x != y))
            if method in random:  # the same elements are dropped, without a sum
                np.testing.assert_array_equal(x, y, err_msg=method.name)

    def error_of(function):
        try:
            function()
        except UserError as error:
            return str(error)

    linear = every[0]
    here, there = unflatten(base), unflatten(shard(base))
    assert "are on different devices" in error_of(lambda: Merger(here, [there]))
    assert "has a different sharding" in error_of(lambda: one(linear, donate=eight(linear)))

    # The memory of a CPU's devices is that of the host; an executable's counts on all devices.
    for executable in eight.compile_cache:
        assert len(memory.devices_of(executable)) == 8
        assert memory.compiled_memory(executable) >= 4 * 2 * 32 * 64
    memory.host_memory = lambda: 4 * 2 * 32 * 64
    assert memory.memory_of(jax.devices()) == memory.host_memory()
    assert "GB of memory at once, but the machine has" in error_of(lambda: eight(linear))
    print("same")
    """
)


COLLECTIVES = textwrap.dedent(
    """
    import re, sys
    import jax, jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sdjax.merging.methods.registry import methods
    from sdjax.merging.tensor_program import TensorProgram
    from sdjax.xla.compiler_options import quick_options

    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("tensor", "fsdp"))
    leaf = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=sharding)
    for name in sys.argv[1:]:
        method = methods()[name]
        slots = ("a", "b", "c")[: method.schema.max_models]
        program = TensorProgram.of(
            method.bind(),
            slots,
            leaf,
            (leaf,) * len(slots),
            path="x",
            key=jax.random.key(0),
        )
        text = program.lower().compile(compiler_options=quick_options()).as_text()
        shapes = re.findall(r"= ([(].*?[)]|[^ ]+) all-reduce(?:-start)?[(]", text)
        others = re.findall(
            r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?[(]", text
        )
        inside = {s for shape in shapes for s in re.findall(r"[a-z0-9]+[[].*?[]]", shape)}
        scalars = sum(len(re.findall(r"[[][]]", shape)) for shape in shapes)
        print(name, len(others), ",".join(sorted(inside)), scalars)
    """
)

ELEMENTWISE = (
    *("linear", "passthrough", "task_arithmetic", "dare_linear", "dare_ties"),
    *("nearswap", "ram", "magmax"),
)
BY_NORM = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")


def test_elementwise_methods_need_no_collectives_and_norms_only_scalars():
    """Count the collectives for a matrix that is sharded over both axes of a mesh."""
    counts = dict(
        line.split(" ", 1) for line in run(COLLECTIVES, *ELEMENTWISE, *BY_NORM).splitlines()
    )
    assert counts.keys() == {*ELEMENTWISE, *BY_NORM}
    for name in ELEMENTWISE:
        assert counts[name] == "0  0", (name, counts[name])
    for name in BY_NORM:
        others, shapes, scalars = counts[name].split(" ")
        assert (others, shapes) == ("0", "f32[]"), (name, counts[name])
        assert int(scalars) <= 2 * 7, (name, scalars)  # of three experts: six products


def test_eight_devices_match_one_device():
    assert run(PROGRAM) == "same"


def run(program, *arguments):
    """Run a script with eight devices and return what it prints."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
