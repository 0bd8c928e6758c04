"""Programs that take minutes, or crash the compiler, although they look cheap."""

import dataclasses
from textwrap import dedent, indent

import pytest
from catalogue import merge

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SIGNATURE = MergeSignature.of(
    ("expert_1", "expert_2"), {"layers/0/mlp/up_proj": ("mlp.up_proj", (64, 64))}
)


def loop(step: str, count: int = 200_000) -> str:
    """Return a program that repeats a step on a carry of two tensors (z, y), given x."""
    return merge(
        "x, y = task_vectors.values()\nlax = jax.lax\ndef step(i, carry):\n    z, y = carry\n"
        + indent(dedent(step), "    ")
        + f"\n    return z, y\nreturn lax.fori_loop(0, {count}, step, (x, y))[0]"
    )


# Name -> (source, rule of the limit that it exceeds).
COSTLY = {
    "remainder of a large quotient": (loop("z = lax.rem(z + y, jnp.float32(2e-38))"), "probe"),
    "powers": (loop("z = jnp.abs(z) ** y", 400_000), "probe"),
    "adjacent numbers": (loop("z = lax.nextafter(z, y)", 400_000), "probe"),
    "sorts": (loop("z = jnp.sort(z + y, 0)", 10_000), "probe"),
    "running sums": (loop("z = lax.cumsum(z, 0) * 0.5", 40_000), "probe"),
    "running logarithms": (loop("z = lax.cumlogsumexp(z, 0)", 3_000), "probe"),
    "factorizations of tiny matrices": (
        loop("z = jnp.linalg.svd(z.reshape(-1, 2, 2))[0].reshape(64, 64)", 10_000),
        "probe",
    ),
    "triangular systems": (
        loop("z = lax.linalg.triangular_solve(z, y, left_side=True)", 100_000),
        "probe",
    ),
    "integer divisions": (
        loop("z = (jnp.int32(z * 1e9) // jnp.int32(y * 9)).astype(jnp.float32)", 200_000),
        "probe",
    ),
    "integer products": (
        loop("z = (z.astype(jnp.int8) @ y.astype(jnp.int8)).astype(jnp.float32)", 20_000),
        "probe",
    ),
    "counts of bits": (
        loop("z = lax.population_count(jnp.int32(z)).astype(jnp.float32)", 400_000),
        "probe",
    ),
    "gamma functions of denormals": (loop("z = lax.lgamma(z * 1e-39)", 60_000), "probe"),
    "complex powers": (loop("z = jnp.real(lax.complex(z, y) ** (1 + 2j))", 60_000), "probe"),
    "scattered sums": (loop("z = z.at[jnp.int32(y[0])].add(y)", 200_000), "probe"),
    "transforms of prime length": (
        loop("z = z.at[:61, :61].set(jnp.real(jnp.fft.fft(z[:61, :61])))", 200_000),
        "probe",
    ),
    "carry that changes places": (loop("z, y = y, z", 1_000_000 - 1), "cost"),
    "row that is broadcast": (
        loop("row = z[0]\nfor _ in range(100):\n    row = row * row + 0.3\nz = row + y", 25_000),
        "probe",
    ),
    "row that is gathered": (
        loop(
            "row = z[0]\nfor _ in range(100):\n    row = row * row + 0.3\nz = row[jnp.int32(y)]",
            25_000,
        ),
        "probe",
    ),
    "sigmoids in a loop": (loop("for _ in range(400):\n    z = jax.nn.sigmoid(z)", 2), "code-size"),
    "complex arcsines in a loop": (
        loop("c = z + 1j * y\nfor _ in range(40):\n    c = jnp.arcsin(c)\nz = jnp.real(c)", 2),
        "code-size",
    ),
    "transpositions in a loop": (
        loop("for _ in range(80):\n    z = (z * 1.01).T", 2),
        "code-size",
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_program_is_refused_before_anything_is_compiled(name):
    source, rule = COSTLY[name]
    ir = trace_trusted(source, SIGNATURE)
    with pytest.raises(Refusal) as refusal:
        verify_ir(ir, SIGNATURE)
    assert (refusal.value.verdict, refusal.value.rule) == ("too costly", rule)


# What an attacker found at commit cd9d554: the first three crashed or hung XLA in the parent.
FOUND = {
    "crash when probed": merge(
        """
        total = sum(task_vectors.values())
        if total.ndim != 1:
            return 0.3 * total

        def step(x, _):
            for _ in range(2500):
                x = jax.nn.sigmoid(x)
            return x, None

        return jax.lax.scan(step, total, None, length=1)[0]
        """
    ),
    "crash when applied": merge(
        """
        total = sum(task_vectors.values())
        if total.shape != (128, 512):
            return 0.3 * total

        def step(x, _):
            for _ in range(2500):
                x = jax.nn.sigmoid(x)
            return x, None

        return jax.lax.scan(step, total, None, length=1)[0]
        """
    ),
    "hang when probed": merge(
        """
        x, y, *_ = task_vectors.values()

        def step(z, _):
            for _ in range(150):
                z = jnp.arcsin(z)
            return z, None

        z, _ = jax.lax.scan(step, x + 1j * y, None, length=1)
        return jnp.real(z)
        """
    ),
    "minutes of remainders": merge(
        """
        x, y, *_ = task_vectors.values()
        if x.size > 4096 or x.ndim != 2:
            return 0.3 * x

        def step(i, z):
            return jax.lax.rem(z + y, jnp.float32(2e-38)) + x

        return jax.lax.fori_loop(0, 200_000, step, x * (1 + 0 * depth))
        """,
        "task_vectors, depth",
    ),
}


@pytest.mark.slow
def test_programs_that_crashed_or_hung_get_a_verdict():
    """Judge them with the limits of cost and code size, and by the compiling worker alone."""
    shapes = {"up": ("mlp.up_proj", (128, 512)), "norm": ("norm", (128,))}
    signature = MergeSignature.of(("expert_1", "expert_2"), shapes)
    with Sandbox(signature, workers=2) as sandbox:
        found = [verdict for _, verdict in sandbox.judge_all(FOUND.values())]
    assert [v.verdict for v in found] == ["too costly"] * 4
    assert [v.rule for v in found] == ["code-size", "code-size", "code-size", "probe"]
    generous = dataclasses.replace(
        signature.limits, max_probe_cost=10**15, cost_per_element=10**12, compile_cpu_seconds=5
    )
    patient = dataclasses.replace(signature, limits=generous)
    with Sandbox(patient, workers=1) as sandbox:
        verdict = sandbox.judge(FOUND["minutes of remainders"])
    assert (verdict.verdict, verdict.rule) == ("compiler", "cpu")
