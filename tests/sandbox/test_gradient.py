"""Limits on the gradient of a program, which is only traced."""

import pytest
from catalogue import merge

from sdjax.sandbox.gradient import check_gradient
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

CHAIN = "x = a * task_vectors['expert_1']\nfor _ in range({}):\n    x = jnp.sin(x)\nreturn x"
SHARED = CHAIN.replace("jnp.sin(x)", "jnp.sin(a * x)")  # a sum over all elements per use of `a`
LOOP = """
step = lambda i, x: jnp.sin(a * x) * jnp.cos(a * x)
return jax.lax.fori_loop(0, {}, step, task_vectors["expert_1"])
"""
ENDLESS = """
x = task_vectors["expert_1"]
return jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 1e-3, lambda x: 0.5 * x, a * x)
"""


def check(body, signature):
    source = merge(body, "task_vectors, a: float = 0.5")
    return check_gradient(verify_ir(trace_trusted(source, signature), signature), signature)


@pytest.mark.parametrize(
    ("body", "differentiable"),
    [(CHAIN.format(20), True), (LOOP.format(20), True), (ENDLESS, False)],
)
def test_gradient_of_an_ordinary_size_is_accepted_if_there_is_one(signature, body, differentiable):
    assert check(body, signature) is differentiable


@pytest.mark.parametrize(
    ("body", "rule", "message"),
    [
        (CHAIN.format(270), "code-size", "a chain of elementwise operations is 1352 products"),
        (SHARED.format(200), "code-size", "uses of the same values in a row"),
        (LOOP.format(900), "memory", "bytes alive at once"),
        (LOOP.format(3_000), "elements", "makes an array of"),
    ],
)
def test_gradient_that_exceeds_a_limit_is_refused_although_the_merge_is_not(
    signature, body, rule, message
):
    with pytest.raises(Refusal, match=message) as error:
        check(body, signature)
    assert (error.value.verdict, error.value.rule) == ("too costly", rule)
