"""Cost of a program: per primitive, and of loops, copies and fused chains."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.verify.cost import COPIED_PER_UNIT, ITERATION_COST, estimate_cost
from sdjax.sandbox.verify.primitive_costs import CALL, EXCEPTIONS, FACTORIZATIONS, UNITS

N = 64
X = jax.ShapeDtypeStruct((N, N), jnp.float32)
ROW = jax.ShapeDtypeStruct((N,), jnp.float32)


def cost(function, *operands):
    jaxpr = jax.make_jaxpr(function)(*operands)
    return estimate_cost(jaxpr, Limits(), max_elements=1 << 30).cost


def test_product_costs_one_unit_per_element():
    assert cost(lambda x: x * 2.0, X) == N * N + CALL


def test_table_lists_primitives_that_are_allowed_or_that_their_gradients_contain():
    names = {name.partition("-")[0] for name in ALLOWED}
    assert (UNITS.keys() | EXCEPTIONS.keys() | FACTORIZATIONS.keys()) - names == {"polygamma"}
    gradient = jax.make_jaxpr(jax.grad(lax.digamma))(1.0)
    assert "polygamma" in {equation.primitive.name for equation in gradient.eqns}


def test_remainder_costs_as_much_as_its_slowest_quotient():
    plain = cost(lambda x: x * x, X)
    for dtype, units in EXCEPTIONS["rem"].items():
        operand = jax.ShapeDtypeStruct(X.shape, dtype)
        assert cost(lax.rem, operand, operand) > 0.9 * units * plain
    whole = jax.ShapeDtypeStruct(X.shape, jnp.int32)
    assert cost(lax.rem, whole, whole) < 5 * plain


@pytest.mark.parametrize("name", ["exp", "asin", "tanh", "sqrt"])
def test_complex_functions_cost_more_than_real_ones(name):
    operand = jax.ShapeDtypeStruct(X.shape, jnp.complex64)
    assert cost(getattr(lax, name), operand) > 7 * cost(getattr(lax, name), X)


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        (lambda x: x * x, lambda x: jnp.exp(x)),
        (lambda x: lax.cumsum(x), lambda x: lax.cumlogsumexp(x)),
        (lambda x: lax.top_k(x, 1), lambda x: lax.top_k(x, N)),
        (lambda x: lax.top_k(x, 1), lambda x: lax.sort(x)),
        (lambda x: jnp.linalg.qr(x), lambda x: jnp.linalg.svd(x)),
        (lambda x: x @ x, lambda x: x.astype(jnp.int8) @ x.astype(jnp.int8)),
        (lambda x: x + x, lambda x: x[lax.iota(jnp.int32, N)].at[0].add(x[1])),
        (lambda x: lax.select_n(x > 0, x, x), lambda x: lax.select_n(jnp.int32(x), *[x] * 99)),
    ],
)
def test_order_of_costs(cheaper, dearer):
    assert cost(dearer, X) > 1.5 * cost(cheaper, X)


def test_every_iteration_of_a_loop_counts():
    def loop(count):
        return cost(lambda x: lax.fori_loop(0, count, lambda i, v: v * 2.0, x), X)

    assert loop(100) > 95 * N * N
    assert loop(200) > 1.9 * loop(100)
    endless = cost(lambda x: lax.while_loop(lambda v: v[0, 0] < 1, lambda v: v * 2.0, x), X)
    assert endless > Limits().max_loop_iterations * N * N


def test_carry_that_a_loop_copies_counts():
    """Check loops whose bodies compute nothing: XLA copies a carry that changes places."""

    def swap(x, y):
        return lax.fori_loop(0, 100, lambda i, v: (v[1], v[0]), (x, y))

    assert cost(swap, X, X) > 2 * 100 * N * N / COPIED_PER_UNIT
    stacked = jax.ShapeDtypeStruct((100, N, N), jnp.float32)
    assert (
        cost(lambda xs: lax.scan(lambda c, x: (c, x), 0.0, xs)[1], stacked)
        > 100 * N * N / COPIED_PER_UNIT
    )
    scalar = cost(lambda x: lax.fori_loop(0, 100, lambda i, v: v, x[0, 0]), X)
    assert 100 * ITERATION_COST < scalar < 200 * ITERATION_COST


@pytest.mark.parametrize(
    "expand",
    [
        lambda r, x: r[None, :] + x,
        lambda r, x: r[:, None] + x,
        lambda r, x: r[0] + x,
        lambda r, x: jnp.tile(r, (N, 1)),
        lambda r, x: r[x.astype(jnp.int32)],
        lambda r, x: jnp.pad(r, (0, N * N)),
        lambda r, x: jnp.where(r[0] > 0, x, 0.0),
    ],
)
def test_fused_chain_counts_per_element_of_a_larger_result(expand):
    """Check a chain on a row that is used everywhere: XLA computes it again per element."""

    def chain(row):
        for _ in range(100):
            row = row * row + 0.3
        return row

    once = cost(expand, ROW, X)
    assert cost(lambda r, x: expand(chain(r), x), ROW, X) > once + 40 * N * N
    # A reduction, a sort or a loop stores its result.
    stored = cost(lambda r, x: expand(lax.sort(chain(r)), x), ROW, X)
    assert stored < once + 10 * N * N


def test_shared_steps_of_a_chain_count_once():
    def doubling(row):
        for _ in range(60):
            row = row * 0.5 + row
        return row

    assert cost(lambda r, x: doubling(r)[None, :] + x, ROW, X) < 100 * N * N


def test_branch_counts_as_its_most_expensive_one():
    def branch(first, second):
        return cost(lambda x: lax.cond(x[0, 0] > 0, first, second, x), X)

    cheap, dear = (lambda x: x), (lambda x: jnp.exp(jnp.exp(x)))
    assert branch(cheap, dear) == branch(dear, cheap) > branch(cheap, lambda x: x * 2) + 6 * N * N
