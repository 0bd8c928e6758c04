"""Verified programs: agreement with their source, and limits on their costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import VALID
from catalogue import merge as source_of

from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import merge
from sdjax.models.tree import unflatten
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.config import Limits
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SHAPE = (16, 8)


@pytest.fixture(scope="module")
def tensors(signature):
    draw = np.random.default_rng(1)
    return {slot: jnp.asarray(draw.standard_normal(SHAPE), jnp.float32) for slot in signature.slots}


def function_of(source, name="merge_models"):
    """Execute a source text and return its merge function."""
    namespace: dict = {}
    exec(source, namespace)
    return namespace[name]


@pytest.mark.parametrize(
    "name", ["linear", "ties", "svd", "ranks", "scan", "while", "cond", "grad"]
)
def test_result_equals_the_source_bit_for_bit(name, signature, tensors):
    program = verify_ir(trace_trusted(VALID[name], signature), signature)
    expected = jax.jit(function_of(VALID[name]))(tensors)
    assert np.array_equal(jax.jit(program)(tensors), expected)
    in_slot_order = tuple(tensors[slot] for slot in signature.slots)
    assert np.array_equal(jax.jit(program)(in_slot_order), expected)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("dare", {"key": jax.random.key(3)}),
        ("depth with where", {"depth": jnp.float32(0.7)}),
        ("branch on kind", {"kind": "mlp.down_proj"}),
        ("branch on kind", {"kind": "mlp.up_proj"}),
        ("hyperparameters", {}),
        ("hyperparameters", {"scale": 0.9, "limit": 0.2}),
    ],
)
def test_requests_and_hyperparameters_are_passed(name, keywords, signature, tensors):
    program = verify_ir(trace_trusted(VALID[name], signature), signature)
    shape = (8, 16) if keywords.get("kind") == "mlp.down_proj" else SHAPE
    inputs = {slot: tensor.reshape(shape) for slot, tensor in tensors.items()}
    direct = function_of(VALID[name])
    expected = jax.jit(lambda taus: direct(taus, **keywords))(inputs)
    found = jax.jit(lambda taus: program(taus, **keywords))(inputs)
    # A default is a constant in the source and a traced argument in the verified program.
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_base_is_passed(signature, tensors):
    program = verify_ir(trace_trusted(VALID["base"], signature), signature)
    base = tensors["expert_2"] * 0.01
    expected = jax.jit(function_of(VALID["base"]))(tensors, base)
    assert program.requests == ("base",)
    assert np.array_equal(jax.jit(lambda t, b: program(t, base=b))(tensors, base), expected)


def test_tree_form_equals_the_source(signature):
    draw = np.random.default_rng(2)

    def tree():
        return {
            path: jnp.asarray(draw.standard_normal(tensor.shape), jnp.float32)
            for path, tensor in signature.paths
        }

    taus, base = {slot: tree() for slot in signature.slots}, tree()
    program = verify_ir(trace_trusted(VALID["tree"], signature), signature)
    found = jax.jit(lambda t, b: program(t, base=b))(taus, base)
    expected = jax.jit(function_of(VALID["tree"], "merge_trees"))(taus, base)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-6)


def test_wrong_shapes_raise_value_error(signature):
    program = verify_ir(trace_trusted(VALID["linear"], signature), signature)
    with pytest.raises(ValueError, match=r"not traced for tensors of \(3, 3\)"):
        program({slot: jnp.ones((3, 3)) for slot in signature.slots})
    with pytest.raises(TypeError, match="unknown hyperparameter: nonsense"):
        program({slot: jnp.ones(SHAPE) for slot in signature.slots}, nonsense=1.0)


@pytest.mark.parametrize(
    "body",
    [
        "return jax.lax.while_loop(lambda v: v[0, 0] < 1e9, lambda v: v + 1.0, x)",
        "n = jax.lax.while_loop(lambda i: i < 10**6, lambda i: i + 1, 0)\nreturn x + n",
        "f = lambda i, v: jax.lax.while_loop(lambda w: w[0, 0] < 1e9, lambda w: w + 1.0, v)\n"
        "return jax.lax.fori_loop(0, 2, f, x)",
        "f = lambda v: jax.lax.while_loop(lambda w: w[0, 0] < 1e9, lambda w: w + 1.0, v)\n"
        "return jax.lax.cond(x[0, 0] < 1e9, f, lambda v: v, x)",
    ],
)
def test_while_loop_that_is_cut_off_returns_nan(body, signature, tensors):
    source = source_of("x = task_vectors['expert_1']\n" + body)
    program = verify_ir(trace_trusted(source, signature), signature)
    assert np.isnan(jax.jit(program)(tensors)).all()


def test_while_loop_may_reach_the_iteration_limit(tensors, signature):
    body = "return jax.lax.fori_loop(0, {} + (x[0, 0] * 0).astype(int), lambda i, v: v + 1.0, x)"
    for steps, finite in (
        (signature.limits.max_loop_iterations, True),
        (signature.limits.max_loop_iterations + 1, False),
    ):
        source = source_of("x = task_vectors['expert_1']\n" + body.format(steps))
        program = verify_ir(trace_trusted(source, signature), signature)
        assert bool(np.isfinite(jax.jit(program)(tensors)).all()) == finite


def test_stored_ir_is_enough_to_verify_again(sandbox, signature, tensors):
    verdict = sandbox.judge(VALID["ties"])
    program = verify_ir(verdict.ir, signature)
    assert (program.identity, program.structure) == (verdict.identity, verdict.structure)
    assert (program.cost, program.memory) == (verdict.cost, verdict.memory)
    assert np.array_equal(jax.jit(program)(tensors), jax.jit(function_of(VALID["ties"]))(tensors))


@pytest.mark.parametrize("name", ["ties", "dare", "hyperparameters", "branch on kind", "tree"])
def test_algorithm_of_a_program_merges_like_the_source(name, signature):
    ir = trace_trusted(VALID[name], signature)
    algorithm = to_algorithm(verify_ir(ir, signature), name="found")
    assert (algorithm.name, algorithm.identity) == ("found", verify_ir(ir, signature).identity)
    written = function_of(VALID[name], "merge_trees" if name == "tree" else "merge_models")
    draw = np.random.default_rng(3)

    def model():
        tensors = {path: tensor.shape for path, tensor in signature.paths}
        return unflatten(
            {p: jnp.asarray(draw.normal(size=s), "bfloat16") for p, s in tensors.items()}
        )

    base, experts = model(), [model() for _ in signature.slots]
    found, expected = (
        merge(base, experts, method, num_layers=2, key=jax.random.key(4))
        for method in (algorithm, Algorithm.from_function(written))
    )
    assert found.finite
    assert found.change == pytest.approx(expected.change, rel=1e-5)
    for left, right in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
        assert np.array_equal(left, right)


def test_exceeded_cost_budget_is_refused(signature):
    ir = trace_trusted(VALID["ties"], signature)
    poor = MergeSignature.of(
        signature.slots,
        {path: (t.kind, t.shape) for path, t in signature.paths},
        Limits(cost_per_element=1),
    )
    with pytest.raises(Refusal, match="operations over the model") as refusal:
        verify_ir(ir, poor)
    assert (refusal.value.verdict, refusal.value.rule) == ("too costly", "cost")


def test_memory_is_the_peak_of_live_arrays(signature):
    def memory(body):
        source = source_of("x = task_vectors['expert_1']\n" + body)
        return verify_ir(trace_trusted(source, signature), signature).memory

    chain = "\n".join(["x = x * 2.0"] * 50) + "\nreturn x"
    tensor = 4 * SHAPE[0] * SHAPE[1]
    assert memory("return x * 2.0 * 3.0") == memory(chain)
    assert memory("return jnp.tile(x, (9, 1))[: x.shape[0]] + x") >= memory(chain) + 8 * tensor


def test_constants_are_not_folded_at_compile_time(tensors, signature):
    """Check a sort of the largest allowed constant, which takes 18 s to fold."""
    source = source_of(
        "x = task_vectors['expert_1']\n"
        "return x + jnp.sort(jnp.asarray(np.linspace(1.0, 0.0, 16, dtype=np.float32)))[0]",
        head="import jax.numpy as jnp\nimport numpy as np\n",
    )
    program = verify_ir(trace_trusted(source, signature), signature)
    text = jax.jit(program).lower(tensors).compile().as_text()
    assert "sort(" in text


def test_hyperparameter_may_be_named_self(tensors, signature):
    source = "def merge_models(t, self: float = 0.5):\n    return self * t['expert_1']\n"
    program = verify_ir(trace_trusted(source, signature), signature)
    assert np.array_equal(program(tensors), 0.5 * tensors["expert_1"])
