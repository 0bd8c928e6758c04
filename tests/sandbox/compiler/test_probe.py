"""Findings of the probe runs."""

import json

import numpy as np
import pytest
from catalogue import merge

from sdjax.sandbox.compiler.probe import probe
from sdjax.sandbox.compiler.probe_run import probe_runs
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature, TensorSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted


@pytest.fixture(scope="module")
def large():
    """Return a signature whose tensors are probed at reduced shapes."""
    return MergeSignature.of(
        ("expert_1", "expert_2"),
        {"layers/0/mlp/up_proj": ("mlp.up_proj", (512, 128)), "final_norm": ("final_norm", (128,))},
    )


def findings(body, signature, parameters="task_vectors"):
    program = verify_ir(trace_trusted(merge(body, parameters), signature), signature)
    return probe(program, signature)


def test_equal_results_have_equal_fingerprints(signature):
    first = findings("a, b, c = task_vectors.values()\nreturn 0.5 * (a + b)", signature)
    other_order = findings("a, b, c = task_vectors.values()\nreturn b * 0.5 + a / 2", signature)
    different = findings("a, b, c = task_vectors.values()\nreturn 0.501 * (a + b)", signature)
    assert first.fingerprint == other_order.fingerprint
    assert first.fingerprint != different.fingerprint


def test_findings_are_deterministic(signature):
    body = "return task_vectors['expert_1'] * jax.random.uniform(key)"
    assert findings(body, signature, "task_vectors, key") == findings(
        body, signature, "task_vectors, key"
    )


def test_large_tensors_are_probed_at_a_reduced_shape(large):
    ir = trace_trusted(merge("return task_vectors['expert_1'] * 2.0"), large)
    program = verify_ir(ir, large)
    assert set(program.programs) == {(None, s) for s in [(512, 128), (128,), (128, 32)]}
    assert probe(program, large).notes == ("plain scaling of one task vector: expert_1",)


def test_program_that_fails_at_reduced_shapes_is_probed_at_real_ones(large):
    blocks = "x.reshape(64, 8, 128).reshape(512, 128)"
    body = f"x = task_vectors['expert_1']\nreturn x if x.ndim == 1 else {blocks}"
    program = verify_ir(trace_trusted(merge(body), large), large)
    assert set(program.programs) == {(None, (512, 128)), (None, (128,))}
    assert probe(program, large).notes == ("equals an expert: expert_1",)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("(1 - depth) * a + depth * b", "a + depth * (b - a)", True),
        ("0.5 * a", "0.5 * a + 0.0 * depth", True),
        ("jnp.where(depth < 0.4, a, b)", "jnp.where(depth <= 0.5, a, b)", True),  # of two layers
        ("jnp.where(depth < 0.4, a, b)", "jnp.where(depth < 0.4, a, a)", False),
        ("(1 - depth) * a", "a", False),
    ],
)
def test_fingerprints_of_programs_that_read_the_depth(first, second, equal, signature):
    start = "a, b, c = task_vectors.values()\nreturn "
    one, other = (findings(start + e, signature, "task_vectors, depth") for e in (first, second))
    assert (one.fingerprint == other.fingerprint) == equal


def test_fingerprints_of_programs_that_read_the_kind(signature):
    factor = "(0.5 if kind == 'mlp.up_proj' else {})"
    a, twice, other = (
        findings(f"a, b, c = task_vectors.values()\nreturn {e}", signature, "task_vectors, kind")
        for e in (
            f"{factor.format(0.25)} * (a + b)",
            f"{factor.format(0.25)} * b + a * {factor.format(0.25)}",
            f"{factor.format(0.26)} * (a + b)",
        )
    )
    assert a.fingerprint == twice.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("paths", "depths"),
    [
        ((), (0.0, 1.0)),
        (("layers/0/mlp/up_proj", "layers/1/mlp/up_proj"), (0.0, 1.0)),
        (("layers/0/mlp/up_proj",), (0.0,)),
        (("embed", *(f"layers/{n}/mlp/up_proj" for n in range(5))), (-1.0, 0.0, 0.5, 1.0)),
        (("embed",), (-1.0,)),
    ],
)
def test_probe_depths_are_those_of_the_tensors_in_scope(paths, depths):
    tensor = TensorSignature(kind="mlp.up_proj", shape=(4, 4))
    by_path = tuple((path, tensor) for path in paths)
    signature = MergeSignature(slots=("a",), tensors=(tensor,), paths=by_path)
    source = "def merge_models(task_vectors, depth):\n    return task_vectors['a'] * depth\n"
    program = verify_ir(trace_trusted(source, signature), signature)
    assert tuple(run.depth for run in probe_runs(program, signature)) == depths


@pytest.mark.parametrize(
    ("expression", "parameters"),
    [
        ("x / x", "task_vectors"),
        ("x / depth", "task_vectors, depth"),
        ("x / (1.0 - depth)", "task_vectors, depth"),
        ("jnp.sqrt(x)", "task_vectors"),
        ("x if kind == 'mlp.gate_proj' else jnp.log(x)", "task_vectors, kind"),
    ],
)
def test_non_finite_results_are_refused(expression, parameters, signature):
    body = f"x = task_vectors['expert_1']\nreturn {expression}"
    with pytest.raises(Refusal) as refusal:
        findings(body, signature, parameters)
    assert refusal.value.verdict == "non-finite"


def test_probe_tensors_contain_zeros(signature):
    with pytest.raises(Refusal, match="zeros") as refusal:
        findings("x = task_vectors['expert_1']\nreturn x / jnp.abs(x)", signature)
    fraction = float(refusal.value.message.split()[0])
    assert 0 < fraction < 0.3
    assert np.isfinite(fraction)


@pytest.mark.parametrize("bits", [-1, 0, 1 << 39])
def test_xla_errors_are_refusals(bits, signature):
    body = "return jax.lax.reduce_precision(task_vectors['expert_1'], 8, 7)"
    message = json.loads(trace_trusted(merge(body), signature))
    for program in message["programs"]:
        program["block"]["equations"][0][3]["exponent_bits"] = bits
    with pytest.raises(Refusal) as refusal:
        probe(verify_ir(json.dumps(message), signature), signature)
    assert refusal.value.rule == "ir"


@pytest.mark.slow
def test_number_of_different_operations_is_limited(signature):
    """Check the limit: operations are compiled separately, and 600 took half a minute and 1 GB."""
    body = """
    x = task_vectors["expert_1"]
    for n in range(MANY):
        x = jnp.pad(x, ((0, n + 1), (0, 0)))[: x.shape[0]]
    return x
    """
    few, many = (
        verify_ir(trace_trusted(merge(body.replace("MANY", n)), signature), signature)
        for n in ("3", "300")
    )
    assert probe(few, signature)
    with pytest.raises(Refusal) as refusal:
        probe(many, signature)
    assert (refusal.value.verdict, refusal.value.rule) == ("too costly", "operations")


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("fori_loop(0, 10**9, lambda i, v: v * 1.1, x)", "loop-iterations"),
        ("fori_loop(0, 10**5, lambda i, v: jnp.tanh(v @ v.T) @ v, x)", "probe"),
    ],
)
def test_program_that_is_expensive_at_probe_shapes_is_refused(body, rule, large):
    """Check the cost limit, whose message is clearer than that of the compiler's limits."""
    lines = "fori_loop, x = jax.lax.fori_loop, task_vectors['expert_1']"
    source = merge(f"{lines}\nreturn {body} if x.ndim == 2 and x.size <= 4096 else x")
    with pytest.raises(Refusal) as refused:
        verify_ir(trace_trusted(source, large), large)
    assert (refused.value.verdict, refused.value.rule) == ("too costly", rule)


def test_program_that_works_at_large_shapes_only_is_refused():
    signature = MergeSignature.of(("a", "b"), {"up": ("mlp.up_proj", (1 << 11, 1 << 10))})
    source = (
        "def merge_models(task_vectors):\n    assert task_vectors['a'].size > 10**6\n"
        "    return task_vectors['a']\n"
    )
    with pytest.raises(Refusal, match="smaller shapes"):
        verify_ir(trace_trusted(source, signature), signature)
