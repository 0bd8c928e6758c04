"""Hashes of equivalent and of different sources."""

import json

import jax
import jax.numpy as jnp
import pytest
from catalogue import TIES, VALID, merge
from jax.extend.core import Primitive

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.hashes import canonical, identity_of, structure_of
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted


@pytest.fixture
def hashes(signature):
    def compute(program):
        ir = trace_trusted(program, signature)
        return identity_of(ir), structure_of(ir)

    return compute


SAME = {
    "renamed variables": (TIES, TIES.replace("trimmed", "x").replace("agree", "y")),
    "comments and layout": (TIES, TIES.replace("sign = ", "# elect\n    sign  =  ")),
    "a helper": (
        merge("return sum(0.5 * t for t in task_vectors.values())"),
        "def half(x):\n    return 0.5 * x\n"
        "def merge_models(tv):\n    return sum(half(t) for t in tv.values())\n",
    ),
    "a helper under jit": (
        merge("return sum(jnp.tanh(t) for t in task_vectors.values())"),
        "import jax\nimport jax.numpy as jnp\n"
        "@jax.jit\ndef another_name(x):\n    return jnp.tanh(x)\n"
        "def merge_models(tv):\n    return sum(another_name(t) for t in tv.values())\n",
    ),
    "names of jitted functions": (
        merge(
            "return f(task_vectors['expert_1'])", head="import jax\nf = jax.jit(lambda x: x * 2)\n"
        ),
        merge(
            "return f(task_vectors['expert_1'])", head="import jax\nf = jax.jit(lambda y: y * 2)\n"
        ),
    ),
    "dead code": (
        merge("return task_vectors['expert_1'] * 2"),
        merge("unused = jnp.sort(base)\nreturn task_vectors['expert_1'] * 2", "task_vectors, base"),
    ),
    "an unused kind": (
        merge("return task_vectors['expert_1'] * 2"),
        merge("name = 'the ' + kind\nreturn task_vectors['expert_1'] * 2", "task_vectors, kind"),
    ),
    "spelling of a constant": (
        merge("return task_vectors['expert_1'] * 0.5"),
        merge("return task_vectors['expert_1'] * jnp.float32(1 / 2)"),
    ),
    "no-op casts": (
        merge("return task_vectors['expert_1'] * 0.5"),
        merge("return (task_vectors['expert_1'].astype(jnp.float32) * 0.5).astype(jnp.float32)"),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_equivalent_sources_have_equal_hashes(hashes, name):
    first, second = SAME[name]
    assert first != second
    assert hashes(first) == hashes(second)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.7 * jnp.sum", "0.6 * jnp.sum"),
        ("tau, 0.0)", "tau, 0.25)"),
    ],
)
def test_liftable_constants_change_only_the_identity(hashes, old, new):
    assert old in TIES
    (one, structure), (two, same) = hashes(TIES), hashes(TIES.replace(old, new))
    assert one != two
    assert structure == same


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("x ** 2", "x ** 3"),
        ("x / 2.0", "x / 3.0"),
        ("jnp.maximum(x, 0.1)", "jnp.maximum(x, 0.2)"),
        ("x + jnp.sum(x[:1])", "x + jnp.sum(x[:2])"),
        ("x + 1.0", "x - 1.0"),
        ("x * jnp.arange(x.shape[1])", "x * (jnp.arange(x.shape[1]) + 1)"),
        ("jnp.sort(x, axis=0)", "jnp.sort(x, axis=1)"),
    ],
)
def test_other_changes_change_both_hashes(hashes, one, two):
    programs = [merge(f"x = task_vectors['expert_1']\nreturn {e}") for e in (one, two)]
    first, second = map(hashes, programs)
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_defaults_of_hyperparameters_change_only_the_identity(hashes):
    source = VALID["hyperparameters"]
    (one, structure), (two, same) = hashes(source), hashes(source.replace("0.4", "0.5"))
    assert one != two
    assert structure == same
    assert hashes(source.replace("= 2", "= 3"))[1] != structure


def test_array_constants_change_the_identity(hashes):
    source = VALID["top-level arrays"]
    assert hashes(source)[0] != hashes(source.replace("0.3]", "0.4]"))[0]


def test_ir_is_canonical(signature):
    for source in VALID.values():
        ir = trace_trusted(source, signature)
        assert ir == canonical(json.loads(ir))


def test_trusted_functions_are_traced_like_sources(signature):
    def merge_models(task_vectors):
        return sum(0.3 * tau for tau in task_vectors.values())

    text = trace_trusted(VALID["linear"], signature)
    assert trace_trusted(merge_models, signature) == text


def test_tracing_is_the_same_with_and_without_a_backend(signature, sandbox):
    for name in ("ties", "dare", "svd", "tree", "top-level arrays"):
        assert sandbox.judge(VALID[name]).ir == trace_trusted(VALID[name], signature)


def test_trusted_functions_are_refused_with_the_same_message(signature):
    def merge_models(task_vectors):
        jax.debug.print("x")
        return jnp.zeros(3)

    with pytest.raises(Refusal, match="shape") as refusal:
        trace_trusted(merge_models, signature)
    assert refusal.value.verdict == "wrong signature"


def test_side_effects_are_refused_without_text_rules(signature):
    def merge_models(task_vectors):
        jax.debug.print("{}", task_vectors["expert_1"][0, 0])
        return task_vectors["expert_1"]

    with pytest.raises(Refusal, match="side effects"):
        trace_trusted(merge_models, signature)


def test_callbacks_are_refused_without_text_rules(signature):
    def merge_models(task_vectors):
        tau = task_vectors["expert_1"]
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(tau.shape, tau.dtype), tau)

    with pytest.raises(Refusal, match="`pure_callback` is not allowed"):
        trace_trusted(merge_models, signature)


def test_primitive_of_a_future_jax_is_refused_by_name(signature):
    future = Primitive("from_the_future")
    future.def_abstract_eval(lambda aval: aval)

    def merge_models(task_vectors):
        return future.bind(task_vectors["expert_1"])

    with pytest.raises(Refusal, match="`from_the_future` is not allowed"):
        trace_trusted(merge_models, signature)


def test_copies_for_the_probe_have_their_own_equations():
    """A program that takes more than half of the limit is probed at small shapes all the same."""
    limits = Limits(equations=100, max_probe_elements=1 << 12)
    signature = MergeSignature.of(("a",), {"up": ("mlp.up_proj", (128, 64))}, limits)
    body = "x = task_vectors['a']\nfor i in range({}):\n    x = x * 1.5 + i\nreturn x"
    ir = trace_trusted(merge(body.format(40)), signature)
    assert len(verify_ir(ir, signature).programs) == 2
    for count in (60, 200):
        with pytest.raises(Refusal, match="more than 100 operations"):
            trace_trusted(merge(body.format(count)), signature)
