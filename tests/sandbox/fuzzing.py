"""Fuzzing of the decoder, by mutating real messages or with a coverage-guided fuzzer.

    python tests/sandbox/fuzzing.py --inputs 1000000              mutated real messages
    python tests/sandbox/fuzzing.py --atheris FOLDER -runs=1000000     (needs atheris)

FOLDER is the corpus of atheris, followed by libFuzzer's own flags. Every input must be refused, or
verified as a program that uses only allowed primitives, within `SECONDS`. One in `PROBED` verified
programs is also run on the probe tensors.
"""

import argparse
import contextlib
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SECONDS = 20  # limit on processor time per input
PROBED = 20  # one in PROBED verified programs is probed
JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 31, 255, 1 << 31, 1 << 40, 1 << 62, 10**30, -(1 << 63)),
    *(0.5, -0.0, 1e308, "", "nan", "inf", "add", "float32", "bool", "complex64", "threefry2x32"),
    *("constant", "scope", "probe", "tensor", "tree", "__class__", "\u0000", "ｆ"),
    *([], {}, [0], [[]], [None, [16, 8]], ["float32", 1.0], ["constant", 0], ["int32", 2**31 - 1]),
)
# Primitives that JAX's public functions add when the parent traces a program.
WRAPPERS = {"jit", "pjit", "closed_call", "optimization_barrier"}


def seeds(signature: Any) -> list[Any]:
    """Return valid messages as JSON values: the catalogue's, and one per primitive case."""
    from catalogue import VALID

    from sdjax.sandbox.worker.trace import trace_trusted

    programs = [*VALID.values(), *short_programs()]
    return [json.loads(trace_trusted(program, signature)) for program in programs]


def short_programs() -> list[Callable]:
    """Return one candidate per result of the primitive cases, added to the first expert."""
    import jax
    import jax.numpy as jnp
    import primitive_cases as p

    def program(function: Callable, arguments: tuple, index: int) -> Callable:
        def merge_models(task_vectors: Any, key: Any) -> Any:
            x, y, *_ = task_vectors.values()
            inputs = (
                *((p.X, x), (p.Y, y), (p.U, jax.nn.sigmoid(x)), (p.B, x > 0), (p.KEY, key)),
                *((p.N, (99 * x).astype(int)), (p.W, (9 * x * x).astype(jnp.uint32))),
            )
            values = [next((v for a, v in inputs if a is arg), arg) for arg in arguments]
            return x + jnp.sum(jnp.real(list(function(*values))[index])).astype(jnp.float32)

        return merge_models

    return [
        program(function, arguments, index)
        for function, arguments in p.CASES.values()
        for index in range(len(jax.eval_shape(lambda *xs, f=function: list(f(*xs)), *arguments)))
    ]


def mutated(message: Any, others: Sequence[Any], draw: random.Random) -> Any:
    """Return the message with one random node changed."""
    return _replaced(
        message, random_path(message, draw), lambda node: _replacement(node, others, draw)
    )


def random_path(message: Any, draw: random.Random) -> tuple[Any, ...]:
    """Return the path to a random node, usually one inside the programs."""
    path: list[Any] = []
    while isinstance(message, (dict, list)) and message and draw.random() > 0.04:
        keys = sorted(message) if isinstance(message, dict) else range(len(message))
        heavy = ("programs", "block", "equations", "body")
        path += draw.choices(keys, [20 if key in heavy else 1 for key in keys])
        message = message[path[-1]]
    return tuple(path)


def _replaced(node: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(node)
    key, inner = path[0], _replaced(node[path[0]], path[1:], change)
    return node | {key: inner} if isinstance(node, dict) else [*node[:key], inner, *node[key + 1 :]]


def _replacement(node: Any, others: Sequence[Any], draw: random.Random) -> Any:
    """Return a replacement, usually of the same type so that it passes the first checks."""
    from sdjax.sandbox.ir.parameters import DTYPES
    from sdjax.sandbox.ir.primitives import ALLOWED

    if draw.random() < 0.1:
        return draw.choice(JUNK)
    if draw.random() < 0.15:  # a part of another message
        other = draw.choice(others)
        for key in random_path(other, draw):
            other = other[key]
        return other
    if type(node) is bool:
        return not node
    if type(node) in (int, float):
        return draw.choice((node + 1, node - 1, 0, -node, 2 * node, draw.randrange(40), node + 0.5))
    if type(node) is str:
        return draw.choice(sorted(DTYPES if node in DTYPES else ALLOWED))
    if isinstance(node, list) and node:
        at, action = draw.randrange(len(node)), draw.randrange(4)
        other = node[draw.randrange(len(node))]
        return [
            node[:at] + node[at + 1 :],
            [*node[:at], other, *node[at:]],
            [*node[:at], other, *node[at + 1 :]],
            draw.sample(node, len(node)),
        ][action]
    return draw.choice(JUNK)


class Hang(BaseException):
    """Raised when an input takes longer than SECONDS. Not an Exception, so never caught."""


class Judge:
    """Verifier of messages, as in the parent, that counts the outcomes."""

    def __init__(self, signature: Any):
        self.signature, self.outcomes, self.admitted = signature, Counter[str](), 0
        self.slowest = 0.0

        def hang(number: int, frame: Any) -> None:
            raise Hang

        signal.signal(signal.SIGPROF, hang)

    def __call__(self, ir: str) -> None:
        """Verify one message; raise any exception that is not a Refusal."""
        from sdjax.sandbox.compiler.probe import probe
        from sdjax.sandbox.refusal import Refusal
        from sdjax.sandbox.verify.verified_program import verify_ir

        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            program = verify_ir(ir, self.signature)
            self.admitted += 1
            if self.admitted % PROBED == 1:
                check_primitives(program)
                probe(program, self.signature)
            self.outcomes["admitted"] += 1
        except Refusal as refusal:
            self.outcomes[f"{refusal.verdict}, {refusal.rule}"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - started)


def check_primitives(program: Any) -> None:
    """Check that a traced program contains only allowed primitives."""
    import jax

    from sdjax.sandbox.verify.interpreter import run_block

    for convention, block in program.programs.values():
        avals = convention.avals(list(program.hyperparameters))
        jaxpr = jax.make_jaxpr(
            lambda *xs, b=block: run_block(b, xs, program.max_loop_iterations)[0]
        )(*avals)
        assert not jaxpr.effects
        _check_names(jaxpr.jaxpr)


def _check_names(jaxpr: Any) -> None:
    from sdjax.sandbox.ir.primitives import ALLOWED, CONTROL_FLOW

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        assert name in ALLOWED or name in CONTROL_FLOW or name in WRAPPERS, name
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    _check_names(inner)


def fuzz(signature: Any, inputs: int, *, seed: int = 0, every: int = 0) -> Judge:
    """Judge mutated messages; print a status line every `every` inputs."""
    draw, judge, messages = random.Random(seed), Judge(signature), seeds(signature)

    started = time.monotonic()
    for number in range(1, inputs + 1):
        message = draw.choice(messages)
        for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
            message = mutated(message, messages, draw)
        ir = to_text(message, draw)
        if draw.random() < 0.05:  # invalid JSON
            at = draw.randrange(len(ir) + 1)
            ir = ir[:at] + draw.choice(('"', "[", "}", "\ud800", "1e999", "")) + ir[at + 1 :]
        judge(ir)
        if every and number % every == 0:
            seconds = time.monotonic() - started
            print(
                f"{number} inputs, {seconds:.0f} s, slowest {judge.slowest:.2f} s, "
                f"{dict(judge.outcomes)}",
                flush=True,
            )
    return judge


def to_text(message: Any, draw: random.Random) -> str:
    """Return canonical JSON, or in a few cases ordinary JSON."""
    from sdjax.sandbox.ir.hashes import canonical

    with contextlib.suppress(ValueError, TypeError):  # not a number; keys of several types
        if draw.random() < 0.98:
            return canonical(message)
    return json.dumps(message, allow_nan=True)


def small_signature() -> Any:
    """Return a signature with two small tensors, so that messages are short."""
    from sdjax.sandbox.config import Limits
    from sdjax.sandbox.signature import MergeSignature

    tensors = {"layers/0/mlp/up_proj": ("mlp.up_proj", (6, 4)), "up": ("mlp.gate_proj", (6, 4))}
    limits = Limits(equations=1_500, max_expansion=64)
    return MergeSignature.of(("expert_1", "expert_2", "expert_3"), tensors, limits)


def with_atheris(folder: Path, flags: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["sdjax.sandbox"]):
        import sdjax.sandbox.compiler.probe
        import sdjax.sandbox.verify.verified_program  # noqa: F401

    signature = small_signature()
    messages, judge = seeds(signature), Judge(signature)
    folder.mkdir(parents=True, exist_ok=True)
    for number, message in enumerate(messages):
        (folder / f"seed-{number}").write_text(to_text(message, random.Random(0)))

    def one_input(data: bytes) -> None:
        judge(data.decode("utf-8", "surrogateescape"))
        total = judge.outcomes.total()
        if total % 10_000 == 0:
            print(f"{total} inputs, {judge.slowest:.2f} s, {dict(judge.outcomes)}", flush=True)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        with contextlib.suppress(ValueError, RecursionError):
            if draw.random() < 0.9:
                message = mutated(json.loads(data), messages, draw)
                return to_text(message, draw).encode("utf-8", "surrogateescape")[:max_size]
        return atheris.Mutate(data, len(data))

    atheris.Setup(
        [sys.argv[0], str(folder), f"-timeout={100 * SECONDS}", "-max_len=65536", *flags],
        one_input,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", type=Path)
    options, rest = parser.parse_known_args()
    if options.atheris:
        with_atheris(options.atheris, rest)
    else:
        fuzz(small_signature(), options.inputs, seed=options.seed, every=10_000)
