"""The fork server: a clean, warmed process that forks one confined child per program.

    Sandbox (parent, has the weights)
      └─ warm process: JAX imported, no backend, no secrets; forks and then only waits
           └─ one dispatcher per worker: reads sources from its socket, one at a time
                └─ a child per source: confined, traces, writes one message, ends

A dispatcher answers with one status byte and the child's message (untrusted bytes, capped).
"""

import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from multiprocessing.connection import Connection

from sdjax.sandbox.confine import adopt_orphans, confine, die_with, end_descendants
from sdjax.sandbox.contract import Contract, Limits

DONE, OUT_OF_TIME, OUT_OF_CPU, DIED, TOO_LONG = b"D", b"T", b"C", b"X", b"L"


def main(descriptors: list[int], contract_text: str) -> None:
    """Warm up, fork a dispatcher for every socket, and stay until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    contract = Contract.from_json(contract_text)
    warm_up(contract)
    here = os.getpid()
    for descriptor in descriptors:
        if os.fork() == 0:
            die_with(here)
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            serve(Connection(descriptor), contract)
            os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    adopt_orphans()
    os.read(0, 1)  # the parent holds the other end: it closes it, or dies
    end_descendants()


def warm_up(contract: Contract) -> None:
    """Import and trace whatever programs commonly use, so that a child finds it done."""
    import jax

    from sdjax.sandbox import rules, trace, warmth

    # No backend can be started: tracing needs none, and its threads would not survive a fork.
    jax.config.update("jax_platforms", "none")
    jax.config.update("jax_traceback_filtering", "off")
    for module in sorted(rules.IMPORTS):
        importlib.import_module(module)
    for source in warmth.SOURCES:
        trace.trace_source(source, contract)
    warmth.provoke_errors()
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection touches its pages
    gc.disable()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork keeps one thread alone"


def serve(connection: Connection, contract: Contract) -> None:
    """Greet, then answer the requests of one socket until its other end is closed."""
    connection.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        status, message = run(request["source"], request["seconds"], connection, contract)
        try:
            connection.send_bytes(status + message)
        except OSError:
            return


def run(source: str, seconds: float, owner: Connection, contract: Contract) -> tuple[bytes, bytes]:
    """Judge one source in a child of its own; (status, what the child wrote)."""
    reader, writer = os.pipe()
    here = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with(here)
            work(source, confine(writer, contract.limits), contract)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        return _collect(child, reader, seconds, owner, contract.limits)
    finally:
        os.close(reader)


def work(source: str, pipe: int, contract: Contract) -> None:
    """In the child: trace, and write the message or the refusal. Never returns."""
    from sdjax.sandbox.trace import trace_source
    from sdjax.sandbox.verdict import Refusal

    reply: dict[str, str]
    try:
        reply = {"wire": trace_source(source, contract)}
    except Refusal as refusal:
        verdict, rule, message = refusal.verdict, refusal.rule, refusal.message
        reply = {"verdict": verdict, "rule": rule, "message": message}
    except MemoryError:
        message = "the program takes too much memory"
        reply = {"verdict": "too costly", "rule": "memory", "message": message}
    data = json.dumps(reply).encode()
    while data:
        data = data[os.write(pipe, data) :]
    os._exit(0)


def _collect(
    child: int, reader: int, seconds: float, owner: Connection, limits: Limits
) -> tuple[bytes, bytes]:
    """The child's output until it ends, is late, writes too much, or nobody wants it any more."""
    deadline = time.monotonic() + seconds
    output, status = bytearray(), DONE
    while status == DONE:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([reader, owner.fileno()], [], [], max(0.0, left))
        if not ready:
            status = OUT_OF_TIME
        elif (
            owner.fileno() in ready
        ):  # requests come one at a time, so this is the end of the parent
            status = DIED
        else:
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                break
            output += chunk
            if len(output) > limits.wire_bytes:
                status = TOO_LONG
    _kill(child)
    _, code = os.waitpid(child, 0)
    if status == DONE and code != 0:
        signalled = os.WIFSIGNALED(code) and os.WTERMSIG(code)
        status = OUT_OF_CPU if signalled == signal.SIGXCPU else DIED
    return status, bytes(output) if status == DONE else b""


def _kill(child: int) -> None:
    """End the child and all that it started. One that has written everything ends by itself."""
    for end in (os.killpg, os.kill):
        try:
            end(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
