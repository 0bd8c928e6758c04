"""Measure the time to judge candidates for the shapes of Mistral-7B's MLP.

    python -m benchmarks.sandbox.judge

The baseline is an unconfined judge: it executes the source code in this process, traces it for
every shape, and compiles and runs it once on the probe tensors, without source rules or cost
estimates.
"""

import argparse
import platform
import time
from collections import Counter

import jax
import numpy as np

from benchmarks.environment import describe_environment
from sdjax.programs.grammar import sample_candidate
from sdjax.sandbox.compiler.probe import probe
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import DuplicateIndex
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SLOTS = ("expert_1", "expert_2", "expert_3")
SHAPES = {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
SIGNATURE = MergeSignature.of(
    SLOTS,
    {
        f"layers/{layer}/mlp/{name}": (f"mlp.{name}", shape)
        for layer in range(32)
        for name, shape in SHAPES.items()
    },
)
REFUSED = "import os\n\ndef merge_models(task_vectors):\n    return os.getpid()\n"
TIES = """import jax.numpy as jnp

def merge_models(task_vectors):
    kept = []
    for tau in task_vectors.values():
        threshold = jnp.quantile(jnp.abs(tau), 0.8)
        kept.append(jnp.where(jnp.abs(tau) >= threshold, tau, 0.0))
    trimmed = jnp.stack(kept)
    sign = jnp.sign(jnp.sum(trimmed, axis=0))
    agree = jnp.where(jnp.sign(trimmed) == sign, trimmed, 0.0)
    return {} * jnp.sum(agree, axis=0) / jnp.maximum(jnp.sum(agree != 0, axis=0), 1)
"""


def timed(call, *arguments):
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def row(name: str, seconds: list[float]) -> None:
    low, middle, high = (1e3 * q for q in np.quantile(seconds, [0.1, 0.5, 0.9]))
    print(f"{name:58s} {middle:8.1f} ms   ({low:.1f} to {high:.1f}, {len(seconds)} times)")


def programs(count: int, seed: int) -> list[str]:
    """Sample candidates from the grammar: 60 to 120 tokens, one in nine broken on purpose."""
    rng = np.random.default_rng(seed)
    return [sample_candidate(rng).text for _ in range(count)]


def rate(sandbox: Sandbox, sources: list[str], seen: DuplicateIndex) -> tuple[float, Counter]:
    start = time.perf_counter()
    verdicts = Counter(v.verdict for _, v in sandbox.judge_all(sources, seen=seen))
    return len(sources) / (time.perf_counter() - start), verdicts


def unconfined(source: str) -> None:
    """Judge one candidate as the baseline does."""
    namespace: dict = {}
    exec(source, namespace)
    function = namespace["merge_models"]
    inputs = {"depth": np.float32(0), "key": jax.random.key(0), "kind": "mlp.up_proj"}
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    for shape in set(SHAPES.values()):
        tensors = {slot: jax.ShapeDtypeStruct(shape, np.float32) for slot in SLOTS}
        available = inputs | {"base": tensors[SLOTS[0]]}
        jax.make_jaxpr(lambda t, a=available: function(t, **{n: a[n] for n in names}))(tensors)
    small = {slot: np.ones((112, 32), np.float32) for slot in SLOTS}
    available = inputs | {"base": small[SLOTS[0]]}
    jax.block_until_ready(jax.jit(lambda t: function(t, **{n: available[n] for n in names}))(small))


def measure_unconfined(sources: list[str]) -> float:
    start = time.perf_counter()
    for source in sources:
        try:
            unconfined(source)
        except Exception:
            continue  # broken on purpose
    return len(sources) / (time.perf_counter() - start)


def parts(sources: list[str]) -> None:
    """Measure the steps of the worker and of the parent in a single process."""
    spent: dict[str, list[float]] = {"trace": [], "verify": [], "probe": []}
    for number, source in enumerate(sources):
        try:
            traced, ir = timed(trace_trusted, source, SIGNATURE)
            verified, program = timed(verify_ir, ir, SIGNATURE)
            probed, _ = timed(probe, program, SIGNATURE)
        except Refusal:
            continue
        if number >= len(sources) // 2:  # the first half is a warm-up
            for name, seconds in zip(spent, (traced, verified, probed), strict=True):
                spent[name].append(seconds)
    row("  worker: trace and encode", spent["trace"])
    row("  parent: decode, trace, estimate cost", spent["verify"])
    row("  compiler: probe, operation by operation", spent["probe"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    tensors = f"{len(SIGNATURE.paths)} tensors of 3 kinds and 2 shapes"
    print(f"{describe_environment()}, Linux {platform.release()}; {tensors}")
    with Sandbox(SIGNATURE, options.workers) as sandbox:
        sandbox.judge(REFUSED)
        row("trivial refusal (import os)", [timed(sandbox.judge, REFUSED)[0] for _ in range(100)])
        seconds = [timed(sandbox.judge, TIES.format(0.5 + i / 100))[0] for i in range(40)]
        print(f"{'TIES, first time (compiles its operations)':58s} {1e3 * seconds[0]:8.1f} ms")
        row("TIES", seconds[1:])
        seen = DuplicateIndex()
        cold, _ = rate(sandbox, programs(options.programs, seed=1), seen)
        warm, verdicts = rate(sandbox, programs(options.programs, seed=2), seen)
        print(f"candidates of the grammar, cold start {cold:29.1f} per second")
        print(f"candidates of the grammar, {options.workers} workers {warm:30.1f} per second")
        print(f"  verdicts: {dict(verdicts)}")
    parts(programs(options.programs, seed=2))
    baseline = measure_unconfined(programs(options.programs // 4, seed=3))
    print(f"baseline: unconfined, in this process {baseline:29.1f} per second")
    print(f"ratio {warm / baseline:.1f}")


if __name__ == "__main__":
    main()
