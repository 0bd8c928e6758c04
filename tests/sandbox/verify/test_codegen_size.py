"""Limits on the code that XLA generates."""

import pytest
from catalogue import merge as source_of

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted


@pytest.mark.parametrize(
    "other", ["x[::-1]", "jnp.roll(x, 1, 0)", "jnp.concatenate([x[1:], x[:1]])"]
)
def test_exponential_code_size_is_refused(other, signature):
    """Check a program whose code doubles at each step: 20 steps take XLA a minute."""
    body = "x = task_vectors['expert_1']\nfor _ in range({}):\n    x = 0.5 * (x + {})\nreturn x"
    verify_ir(trace_trusted(source_of(body.format(8, other)), signature), signature)
    with pytest.raises(Refusal) as refusal:
        verify_ir(trace_trusted(source_of(body.format(40, other)), signature), signature)
    assert (refusal.value.verdict, refusal.value.rule) == ("too costly", "code-size")


@pytest.mark.parametrize(
    ("step", "longest"),
    [
        ("x * 1.01", 1_250),
        ("jax.nn.sigmoid(x)", 312),
        ("jax.lax.lgamma(x)", 78),
        ("jnp.real(jax.lax.asin(jax.lax.complex(x, x)))", 18),
        ("x.T.T * 1.01", 73),
    ],
)
def test_chain_that_could_overflow_the_compilers_stack_is_refused(step, longest):
    one = MergeSignature.of(("expert_1",), {"layers/0/mlp/up_proj": ("mlp.up_proj", (16, 8))})
    body = (
        f"def inner(_, x):\n    for _ in range(LENGTH):\n        x = {step}\n    return x\n"
        "return jax.lax.fori_loop(0, 3, inner, task_vectors['expert_1'])"
    )
    verify_ir(trace_trusted(source_of(body.replace("LENGTH", str(longest))), one), one)
    ir = trace_trusted(source_of(body.replace("LENGTH", str(longest + 1))), one)
    with pytest.raises(Refusal, match="chain of elementwise operations") as refusal:
        verify_ir(ir, one)
    assert (refusal.value.verdict, refusal.value.rule) == ("too costly", "code-size")


@pytest.mark.parametrize("step", ["x - 0.1 * jnp.tanh(x)", "x / (1 + jnp.linalg.norm(x))"])
def test_long_elementwise_chains_are_admitted(step, signature):
    body = f"x = task_vectors['expert_1']\nfor _ in range(60):\n    x = {step}\nreturn x"
    assert verify_ir(trace_trusted(source_of(body), signature), signature)
