"""The fork server: a clean, warmed process that forks one confined child per program.

    Sandbox (parent, has the weights)
      └─ warm process: JAX imported, no backend, no secrets; forks and then only waits
           └─ one dispatcher per worker: forks a child as soon as a source is announced
                └─ a child per source: locks itself down, is then sent the source, traces it,
                   writes one message, ends

A dispatcher answers with one status byte and the child's message (untrusted bytes, capped).
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import time
from multiprocessing.connection import Connection

from sdjax.sandbox.confine import adopt_orphans, confine, die_with, end_descendants
from sdjax.sandbox.contract import Contract, Limits

DONE, OUT_OF_TIME, OUT_OF_CPU, DIED, TOO_LONG = b"D", b"T", b"C", b"X", b"L"


def main(descriptors: list[int], contract_text: str, allow_missing: list[str]) -> None:
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
            serve(Connection(descriptor), contract, frozenset(allow_missing))
            os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    adopt_orphans()
    os.read(0, 1)  # the parent holds the other end: it closes it, or dies
    end_descendants()


def warm_up(contract: Contract) -> None:
    """Import and trace whatever programs commonly use, so that a child finds it done."""
    import jax

    from sdjax.sandbox import rules, warmth

    # No backend can be started: tracing needs none, and its threads would not survive a fork.
    jax.config.update("jax_platforms", "none")
    jax.config.update("jax_traceback_filtering", "off")
    for module in sorted(rules.IMPORTS):
        importlib.import_module(module)
    warmth.warm_up(contract)
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection touches its pages
    gc.disable()


def serve(connection: Connection, contract: Contract, allow_missing: frozenset[str]) -> None:
    """Greet, then answer the requests of one socket until its other end is closed."""
    connection.send_bytes(b"ready")
    while True:
        try:
            connection.poll(None)
            child, pipe = fork_worker(contract, allow_missing)
            try:
                request = json.loads(connection.recv_bytes())
                with contextlib.suppress(OSError):  # it has ended: `_collect` finds out how
                    pipe.sendall(request["source"].encode("utf-8", "surrogatepass"))
                    pipe.shutdown(socket.SHUT_WR)
                seconds, limits = request["seconds"], contract.limits
                status, output = _collect(pipe, seconds, connection, limits)
            finally:
                pipe.close()
                ended = end_worker(child)
            connection.send_bytes(_answer(status, output, ended))
        except (EOFError, OSError):
            return


def fork_worker(contract: Contract, allow_missing: frozenset[str]) -> tuple[int, socket.socket]:
    """A child that locks itself down, and the descriptor over which it waits for a source."""
    assert len(os.listdir("/proc/self/task")) == 1, "no backend: it would have threads"
    ours, theirs = socket.socketpair()
    here = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with(here)
            missing = confine(theirs.detach(), contract.limits)
            if os.getppid() == here and allow_missing.issuperset(missing):
                work(3, contract)
        finally:
            os._exit(1)
    theirs.close()
    return child, ours


def work(pipe: int, contract: Contract) -> None:
    """In the child: read the source, trace it, write the message or the refusal. Never returns."""
    from sdjax.sandbox.trace import trace_source
    from sdjax.sandbox.verdict import Refusal

    reply: dict[str, str]
    try:
        source = b"".join(iter(lambda: os.read(pipe, 1 << 16), b""))
        reply = {"wire": trace_source(source.decode("utf-8", "surrogatepass"), contract)}
    except Refusal as refusal:
        verdict, rule, message = refusal.verdict, refusal.rule, refusal.message
        reply = {"verdict": verdict, "rule": rule, "message": message}
    except MemoryError:
        message = "the program takes too much memory"
        reply = {"verdict": "too costly", "rule": "memory", "message": message}
    except Exception as error:  # of Python's own, before the program runs
        message = f"the program cannot be read ({type(error).__name__})"
        reply = {"verdict": "refused", "rule": "exception", "message": message}
    data = json.dumps(reply).encode()
    while data:
        data = data[os.write(pipe, data) :]
    os._exit(0)


def _collect(
    pipe: socket.socket, seconds: float, owner: Connection, limits: Limits
) -> tuple[bytes, bytes]:
    """What a child writes until it ends, is late, writes too much, or is not wanted any more."""
    deadline, output = time.monotonic() + seconds, bytearray()
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([pipe.fileno(), owner.fileno()], [], [], max(0.0, left))
        if not ready:
            return OUT_OF_TIME, b""
        if owner.fileno() in ready:  # requests come one at a time: this is the parent's end
            return DIED, b""
        try:
            chunk = pipe.recv(1 << 16)
        except ConnectionResetError:  # it ended without reading all that it was sent
            chunk = b""
        if not chunk:
            return DONE, bytes(output)
        output += chunk
        if len(output) > limits.wire_bytes:
            return TOO_LONG, b""


def _answer(status: bytes, output: bytes, ended: int) -> bytes:
    """One byte of status and, of a child that ended well, what it wrote."""
    if status == DONE and ended != 0:
        signalled = os.WIFSIGNALED(ended) and os.WTERMSIG(ended)
        return OUT_OF_CPU if signalled == signal.SIGXCPU else DIED
    return status + output


def end_worker(child: int) -> int:
    """End a child and all that it started; its status, that of its own end if it had come."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
