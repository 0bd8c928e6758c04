"""Find how long a chain of operations XLA's CPU compiler survives, per kind of operation.

    python -m benchmarks.sandbox.fusion_limits [--kinds exp,sin] [--margin 4]

Each trial compiles one chain in a forked child under the limits of the sandbox's compiling workers
(processor time, address space, a stack of 8 MiB). By default the script compiles a chain of
`--margin` times the length that `codegen_size.py` admits, with every set of compiler options that
sdjax uses, in a loop's body and outside of one, and exits with 1 if a trial does not survive. With
`--bisect` it finds the shortest chain that fails.
"""

import argparse
import functools
import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "none"  # the parent starts no backend: its threads do not survive
os.environ["NPROC"] = "1"

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.environment import describe_environment
from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.primitives import weight
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.codegen_size import check_codegen_size

SHAPE = (64, 64)
STACK_BYTES = 8 << 20
CONTEXTS = ("loop", "flat")
OPTIONS = ("quick", "lean", "default")
ERROR, MEMORY = 2, 3  # exit statuses of a trial
SURVIVED = ("ok", "time", "memory")  # the limits of a compiling worker decide cleanly


def _unary(names: str) -> dict[str, Callable]:
    return {name: getattr(lax, name) for name in names.split()}


F32: dict[str, Callable] = {
    "product and sum": lambda x: x * 1.01 + 0.5,
    "quotient": lambda x: 1.5 / x,
    "sigmoid": jax.nn.sigmoid,
    **_unary(
        "exp exp2 expm1 log log1p sin cos tan tanh logistic sqrt rsqrt cbrt asin acos atan sinh"
        " cosh asinh acosh atanh erf erfc erf_inv lgamma digamma bessel_i0e bessel_i1e"
    ),
    "pow": lambda x: x**0.7,
    "rem": lambda x: lax.rem(x, jnp.float32(1e-3)),
    "atan2": lambda x: lax.atan2(x, jnp.float32(0.3)),
    "nextafter": lambda x: lax.nextafter(x, jnp.float32(2)),
    "integer_pow": lambda x: x**-63,
    "round": jnp.round,
    "sign": lambda x: jnp.sign(x) + x,
    "select": lambda x: jnp.where(x > 0.5, x, 0.5 * x),
    "clamp": lambda x: jnp.clip(x, 0.1, 0.9),
    "bfloat16": lambda x: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32),
    "reduce_precision": lambda x: lax.reduce_precision(x * 2, 5, 7),
    "integers": lambda x: lax.bitcast_convert_type(
        (lax.bitcast_convert_type(x, jnp.int32) * 3) ^ 77, jnp.float32
    ),
    "norm": lambda x: x / (1 + jnp.linalg.norm(x)),
    "row sums": lambda x: x - jnp.mean(x, 1, keepdims=True),
    "broadcast": lambda x: x[0] * 1.5 + x,
    "transpose": lambda x: x.T * 1.01,
    "reverse": lambda x: x[::-1] * 1.01,
    "reshape": lambda x: (x.reshape(32, 128).T * 1.01).reshape(64, 64),
    "pad": lambda x: jnp.pad(x, ((1, 0), (0, 0)))[:64] * 1.01,
    "tile": lambda x: jnp.tile(x, (2, 1))[32:96] * 1.01,
    "stack": lambda x: jnp.stack([x, x * 1.01])[1] + 0.5,
    "strided": lambda x: jnp.repeat(x, 2, 0)[::2] * 1.01,
    "dynamic slice": lambda x: lax.dynamic_slice(x, (jnp.int32(x[0, 0]), 0), (64, 64)) * 1.01,
    "transpose and exp": lambda x: jnp.exp(x.T),
    "gather": lambda x: x[jnp.arange(64) ^ 1] * 1.01,
    "scatter": lambda x: x.at[jnp.arange(64) ^ 1].add(x),
    "matmul": lambda x: x @ x * 0.1,
    "sort": lambda x: jnp.sort(x * 1.01, 0),
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "update": lambda x: x.at[3].multiply(1.01),
    "random": lambda x: (
        x
        * jax.random.uniform(
            jax.random.wrap_key_data(
                lax.bitcast_convert_type(x[0, :2], jnp.uint32), impl="threefry2x32"
            ),
            SHAPE,
        )
    ),
    "mixed": lambda x: jnp.where(x > 0, jnp.tanh(x), jnp.sin(x)) + jnp.exp(x) / (1 + x * x),
}
I32: dict[str, Callable] = {
    "integer product": lambda n: n * 3 + 1,
    "integer quotient": lambda n: 77 // (n | 1),
    "integer remainder": lambda n: lax.rem(jnp.int32(123456789), n | 1),
    "population_count": lambda n: lax.population_count(n) ^ 5,
    "clz": lambda n: lax.clz(n) ^ 5,
    "shift": lambda n: (n << 3) ^ (n >> 5),
}
C64: dict[str, Callable] = {
    f"complex {name}": step
    for name, step in {
        "product": lambda z: z * (1.01 + 0.2j),
        "quotient": lambda z: (1.01 + 0.2j) / z,
        "abs": lambda z: z * jnp.abs(z),
        "pow": lambda z: z ** (0.7 + 0.1j),
        **_unary(
            "exp log log1p expm1 sin cos tan tanh sqrt rsqrt logistic asin acos atan sinh cosh"
            " asinh acosh atanh sign"
        ),
    }.items()
}
KINDS = (
    {name: (jnp.float32, step) for name, step in F32.items()}
    | {name: (jnp.int32, step) for name, step in I32.items()}
    | {name: (jnp.complex64, step) for name, step in C64.items()}
)


def chain(kind: str, length: int, context: str) -> Callable:
    """Return a function whose body is a chain of one kind of step."""
    _, step = KINDS[kind]

    def steps(x: Any) -> Any:
        for _ in range(length):
            x = step(x)
        return x

    if context == "flat":
        return steps
    return lambda x: lax.fori_loop(0, 3, lambda _, y: steps(y), x)


def admitted(kind: str) -> tuple[int, int]:
    """Return the longest chains that the limit on equations, and all limits, let through."""
    dtype, _ = KINDS[kind]

    def trace(length: int) -> Any:
        return jax.make_jaxpr(chain(kind, length, "flat"))(jax.ShapeDtypeStruct(SHAPE, dtype)).jaxpr

    def passes(length: int) -> bool:
        try:
            check_codegen_size(trace(length))
        except Refusal:
            return False
        return True

    cap = Limits().equations // max(1, _weight(trace(2)) - _weight(trace(1)))
    return cap, _largest(passes, 1, cap)


def _weight(jaxpr: Any) -> int:
    inner = [e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "jit"]
    named = [e.primitive.name for e in jaxpr.eqns if e.primitive.name != "jit"]
    return sum(map(_weight, inner)) + sum(map(weight, named))


def _largest(passes: Callable[[int], bool], low: int, cap: int, tolerance: float = 0.0) -> int:
    """Return the largest number for which `passes` holds, by doubling and bisection."""
    high = low
    while passes(high):
        if high >= cap:
            return cap
        low, high = high, min(2 * high, cap)
    while high - low > max(1, tolerance * low):
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def _compile(kind: str, length: int, context: str, options: str) -> None:
    from sdjax.xla.compiler_options import lean_options, quick_options

    jax.config.update("jax_platforms", "cpu")
    chosen = {"quick": quick_options, "lean": lean_options, "default": lambda: None}[options]()
    dtype, _ = KINDS[kind]
    lowered = jax.jit(chain(kind, length, context)).lower(jax.ShapeDtypeStruct(SHAPE, dtype))
    lowered.compile(compiler_options=chosen)


def trial(kind: str, length: int, context: str, options: str, cpu_seconds: int) -> tuple[str, Any]:
    """Compile a chain in a child; return "ok" or what happened, and the resources it used."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
            space = Limits().compile_address_space
            resource.setrlimit(resource.RLIMIT_AS, (space, space))
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
            signal.alarm(20 * cpu_seconds)
            _compile(kind, length, context, options)
            os._exit(0)
        except BaseException as error:
            os._exit(
                3 if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError) else 2
            )
    _, status, usage = os.wait4(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            "time" if number in (signal.SIGXCPU, signal.SIGALRM) else signal.Signals(number).name
        ), usage
    return {0: "ok", 2: "error", 3: "memory"}[os.WEXITSTATUS(status)], usage


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", help="comma-separated; all by default")
    parser.add_argument("--margin", type=float, default=4)
    parser.add_argument("--bisect", action="store_true")
    parser.add_argument("--cpu-seconds", type=int, default=Limits().compile_cpu_seconds)
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--contexts", default=",".join(CONTEXTS))
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",") if arguments.kinds else list(KINDS)
    crashed = 0
    print(describe_environment(), flush=True)
    print(f"{'kind':20s} {'admitted':>8s} {'tried':>6s} context options  result   CPU s   MB")
    for kind in kinds:
        cap, limit = admitted(kind)
        for case in itertools.product(arguments.contexts.split(","), arguments.options.split(",")):
            survives = functools.partial(_survives, kind, limit, case, arguments.cpu_seconds)
            length = min(int(arguments.margin * limit), cap)
            if not survives(length):
                crashed += 1
                if arguments.bisect:
                    _largest(survives, max(1, length // 16), length, 0.15)
    sys.exit(1 if crashed else 0)


def _survives(kind: str, limit: int, case: tuple[str, str], cpu_seconds: int, length: int) -> bool:
    """Try one length, print what happens, and return whether the compiler did not crash."""
    result, usage = trial(kind, length, *case, cpu_seconds)
    seconds = usage.ru_utime + usage.ru_stime
    print(
        f"{kind:20s} {limit:8d} {length:6d} {case[0]:7s} {case[1]:8s} {result:8s}"
        f" {seconds:5.1f} {usage.ru_maxrss / 1024:5.0f}",
        flush=True,
    )
    return result in SURVIVED


if __name__ == "__main__":
    main()
