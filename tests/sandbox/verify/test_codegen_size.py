"""Limits on the code that XLA generates."""

import jax
import jax.numpy as jnp
import pytest
from catalogue import merge as source_of
from jax import lax

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.codegen_size import check_codegen_size
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
        (lambda x: x * 1.01, 1_250),
        (jax.nn.sigmoid, 312),
        (lax.lgamma, 78),
        (lambda x: jnp.real(lax.asin(lax.complex(x, x))), 18),
        (lambda x: x.T * 1.01, 73),
    ],
)
def test_chain_that_could_overflow_the_compilers_stack_is_refused(step, longest):
    """Check the bounds that the docstring of codegen_size.py names."""

    def chain(x, length):
        for _ in range(length):
            x = step(x)
        return x

    jaxpr = jax.make_jaxpr(chain, static_argnums=1)(jnp.ones((4, 4)), longest)
    check_codegen_size(jaxpr.jaxpr)
    jaxpr = jax.make_jaxpr(chain, static_argnums=1)(jnp.ones((4, 4)), longest + 1)
    with pytest.raises(Refusal, match="chain of elementwise operations") as refusal:
        check_codegen_size(jaxpr.jaxpr)
    assert (refusal.value.verdict, refusal.value.rule) == ("too costly", "code-size")


def _in_scan(step, x):
    return lax.scan(lambda x, _: (step(x), None), x, None, length=1)[0]


def _in_while(step, x):
    return lax.while_loop(lambda pair: pair[0] < 1, lambda pair: (1, step(pair[1])), (0, x))[1]


def _in_cond(step, x):
    return lax.cond(True, step, lambda x: x, x)


@pytest.mark.parametrize("wrap", [_in_scan, _in_while, _in_cond])
def test_chain_continues_through_control_flow_that_xla_removes(wrap):
    def half(x):
        for _ in range(700):
            x = x * 1.01
        return x

    check_codegen_size(jax.make_jaxpr(lambda x: wrap(half, x))(jnp.ones((4, 4))).jaxpr)
    twice = jax.make_jaxpr(lambda x: wrap(half, wrap(half, x)))(jnp.ones((4, 4)))
    with pytest.raises(Refusal, match="chain of elementwise operations"):
        check_codegen_size(twice.jaxpr)


@pytest.mark.parametrize("step", ["x - 0.1 * jnp.tanh(x)", "x / (1 + jnp.linalg.norm(x))"])
def test_long_elementwise_chains_are_admitted(step, signature):
    body = f"x = task_vectors['expert_1']\nfor _ in range(60):\n    x = {step}\nreturn x"
    assert verify_ir(trace_trusted(source_of(body), signature), signature)
