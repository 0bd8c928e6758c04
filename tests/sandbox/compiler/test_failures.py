"""Programs that the compiler or a first run does not survive."""

import dataclasses
import signal
from pathlib import Path
from textwrap import dedent

import pytest
from catalogue import HEAD, VALID, merge

from sdjax.isolation import client
from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.tuning.programs import program_tunable

# Admitted only without limits on cost.
UNBOUNDED = {"cost_per_element": 10**12, "max_probe_cost": 10**15}
SLOW = merge(
    "x, y, *_ = task_vectors.values()\n"
    "step = lambda i, z: jax.lax.rem(z + y, jnp.float32(2e-38)) + x\n"
    "return jax.lax.fori_loop(0, 900_000, step, x)"
)
# Boot code of a server whose compiling workers fail on some programs, as XLA does on others.
FAULTY = """
import sys; sys.path[:0] = {paths!r}
from sdjax.sandbox.compiler import probe, trial
real_probe, real_trial = probe.probe, trial.try_merge
import ctypes
def fail(program):
    if "base" in program.requests:
        ctypes.string_at(0)  # a segmentation fault
    if "depth" in program.requests:
        raise MemoryError
def faulty_probe(program, signature):
    fail(program)
    return real_probe(program, signature)
def faulty_trial(program, description, *rest):
    fail(program)
    if len(program.hyperparameters) > (description.computes == "merge"):
        ctypes.string_at(0)
    return real_trial(program, description, *rest)
probe.probe, trial.try_merge = faulty_probe, faulty_trial
from sdjax.isolation.server import main; main({groups})
"""
CRASHES = merge("return 0.5 * task_vectors['expert_1'] + base", "task_vectors, base")
SCALED = merge("return a * task_vectors['expert_1']", "task_vectors, a: float = 0.4")
EXHAUSTS = merge("return depth * task_vectors['expert_1']", "task_vectors, depth")


@pytest.fixture(scope="module")
def short(signature):
    limits = dataclasses.replace(signature.limits, compile_cpu_seconds=2, **UNBOUNDED)
    return dataclasses.replace(signature, limits=limits)


def trial_of(signature: MergeSignature, compiler: str) -> MergeTrial:
    tensors = tuple(
        TrialTensor(path=path, shape=t.shape, base="bfloat16", experts=("bfloat16",) * 3)
        for path, t in signature.paths
    )
    return MergeTrial(memory=1 << 40, tensors=tensors, compiler=compiler)


@pytest.mark.slow
def test_program_that_runs_too_long_is_refused(short):
    with Sandbox(short, workers=1) as sandbox:
        found = [v for _, v in sandbox.judge_all([SLOW, VALID["linear"], SLOW])]
        assert [v.verdict for v in found] == ["compiler", "admitted", "compiler"]
        assert (found[0].rule, found[0].ir, found[0].program) == ("cpu", None, None)
        assert found[0].identity is not None
        assert "2 s of processor time" in found[0].message


@pytest.mark.slow
def test_interrupt_during_a_compilation_leaves_no_process(signature):
    limits = dataclasses.replace(signature.limits, **UNBOUNDED)
    patient = dataclasses.replace(signature, limits=limits)
    with Sandbox(patient, workers=1) as sandbox:
        processes = []

        def interrupt(*_):
            processes.extend([sandbox._pool.pid, *_descendants(sandbox._pool.pid)])
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 3.0)
        try:
            with pytest.raises(KeyboardInterrupt):
                sandbox.judge(SLOW)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert len(processes) >= 4  # server, two dispatchers, the process that compiles
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
        assert sandbox.judge(VALID["linear"]).admitted


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *_descendants(child))]


def test_crash_is_a_verdict_and_the_others_are_judged(short, monkeypatch):
    monkeypatch.setattr(client, "_BOOT", FAULTY)
    with Sandbox(short, workers=2) as sandbox:
        sources = [VALID["linear"], CRASHES, EXHAUSTS, VALID["ties"], CRASHES]
        found = [v for _, v in sandbox.judge_all(sources)]
        assert [v.verdict for v in found] == [
            *("admitted", "compiler", "compiler", "admitted", "compiler")
        ]
        assert {v.rule for v in found if v.verdict == "compiler"} == {"crash"}
        verdict = sandbox.judge(VALID["hyperparameters"])
        assert verdict.admitted
        refusal = sandbox.try_merge(verdict.ir, trial_of(short, "quick"))
        assert (refusal.verdict, refusal.rule) == ("compiler", "crash")
        trial = trial_of(short, "quick")
        assert sandbox.try_merge(found[0].ir, trial) is None
        refusal = sandbox.try_merge(found[0].ir, dataclasses.replace(trial, memory=1_000))
        assert (refusal.verdict, refusal.rule) == ("too costly", "memory")
        assert "but the machine has 1e-06 GB" in refusal.message
        # Only its gradient crashes.
        tuned = program_tunable(SCALED, sandbox, name="scaled.py", trial=trial)
        assert (
            tuned.gradient_refusal
            == "compiler (crash): XLA crashed or ran out of memory on the program, twice"
        )


RARE = {
    "functions": """
        x = jnp.abs(task_vectors["expert_1"]) * 0.1 + 0.2
        out = lax.acosh(x + 1.0) + lax.acos(x) + lax.asin(x) + lax.asinh(x) + lax.atan(x)
        out += lax.atanh(x) + lax.bessel_i0e(x) + lax.bessel_i1e(x) + lax.cbrt(x) + lax.cos(x)
        out += lax.cosh(x) + lax.digamma(x) + lax.erf(x) + lax.erfc(x) + lax.exp2(x)
        out += lax.expm1(x) + lax.lgamma(x) + lax.log(x) + lax.rsqrt(x) + lax.sin(x)
        out += lax.sinh(x) + lax.tan(x)
        return out + lax.atan2(x, x) + lax.nextafter(x, x) + jnp.cumsum(x, 0) + lax.cummax(x)
    """,
    "linear algebra": """
        x = task_vectors["expert_1"]
        gram = x.T @ x + jnp.eye(x.shape[1])
        out = jnp.linalg.cholesky(gram) + lax.linalg.lu(gram)[0] + jnp.linalg.solve(gram, gram)
        return x @ (out + jnp.linalg.eigh(gram)[1] + jnp.real(jnp.fft.ifft(jnp.fft.fft(gram))))
    """,
    "integers and keys": """
        x = task_vectors["expert_1"]
        n = jnp.argsort(x, axis=0) & 3
        bits = lax.population_count(n) + lax.clz(n) + (n << 1) + (n >> 1) + (~n)
        noise = jax.random.normal(jax.random.fold_in(jax.random.split(key)[0], 1), x.shape)
        return x + 0.01 * bits + noise.at[n[:, 0] % 2].add(1.0) + lax.reduce_precision(x, 8, 7)
    """,
}


@pytest.mark.parametrize("name", RARE)
def test_confined_compiler_finds_all_that_rare_operations_need(sandbox, name):
    verdict = sandbox.judge(merge("lax = jax.lax\n" + dedent(RARE[name]), "task_vectors, key"))
    assert verdict.admitted, verdict.message


@pytest.mark.parametrize("name", ["linear", "dare", "svd", "while", "branch on kind", "tree"])
def test_trial_compiles_and_runs_a_merge(sandbox, signature, name):
    verdict = sandbox.judge(VALID[name])
    for compiler in ("quick", "single use"):
        assert sandbox.try_merge(verdict.ir, trial_of(signature, compiler)) is None


GRADIENTS = {
    "per expert": merge(
        "return sum(w * task_vectors[name] for name, w in weight.items()) * depth",
        "task_vectors, depth, weight: sdjax.PerExpert = 0.3",
        head=HEAD + "import sdjax\n",
    ),
    "loop": merge(
        "x = task_vectors['expert_1']\n"
        "return jax.lax.fori_loop(0, 5, lambda i, x: a * jnp.tanh(x), x)",
        "task_vectors, a: float = 0.9",
    ),
    "tree": HEAD
    + "def merge_trees(task_vectors, a: float = 0.9):\n"
    + "    return jax.tree.map(lambda x, y: a * x + y, *list(task_vectors.values())[:2])\n",
}


@pytest.mark.parametrize(
    "name",
    ["per expert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loop", "tree"))],
)
def test_trial_compiles_and_runs_a_gradient(sandbox, signature, name):
    verdict = sandbox.judge(GRADIENTS[name])
    trial = dataclasses.replace(trial_of(signature, "full"), computes="gradient")
    assert sandbox.try_merge(verdict.ir, trial) is None


def test_trial_of_other_tensors_is_a_refusal(sandbox, signature):
    verdict = sandbox.judge(VALID["linear"])
    trial = trial_of(signature, "quick")
    wrong = (dataclasses.replace(trial.tensors[0], shape=(3, 3)), *trial.tensors[1:])
    refusal = sandbox.try_merge(verdict.ir, dataclasses.replace(trial, tensors=wrong))
    assert (refusal.verdict, refusal.rule) == ("refused", "ir")
    assert MergeTrial.from_json(trial.to_json()) == trial
