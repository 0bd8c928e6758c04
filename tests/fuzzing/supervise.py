"""Long runs in worker processes, which may be killed and whose state is kept in a folder."""

import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

from tests.fuzzing.run import Fuzzer, limit_resources

SAVE_SECONDS = 10
REPORT_SECONDS = 60
HANG_SECONDS = 300  # of all loaders of one input
MAX_FAULTS = 40


def work(name: str, seed: int, inputs: int, out: Path) -> None:
    """Run the remaining inputs of a kind; the state is saved regularly."""
    os.nice(15)
    (out / f"{name}.log").touch()
    log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    state = load_state(out, name, seed)
    counts, faults = Counter(state["counts"]), state["faults"]
    current = os.open(out / f"{name}-{seed}.current", os.O_WRONLY | os.O_CREAT)
    first = state["next"]
    numbers = range(first, inputs)
    with Fuzzer(name, seed=seed) as fuzzer:
        fuzzer.check_valid()
        limit_resources()
        started = saved = time.monotonic()
        for number in numbers:
            os.pwrite(current, f"{number:<20}".encode(), 0)
            outcome = fuzzer.run(number)
            counts["accepted" if outcome.accepted and not outcome.refused else "refused"] += 1
            if outcome.seconds > state["slowest"]:
                state |= {"slowest": round(outcome.seconds, 3), "slowest_input": number}
            if outcome.fault is not None:
                counts["faults"] += 1
                if outcome.key not in faults and len(faults) < MAX_FAULTS:
                    fuzzer.run(number, keep=out / "faults" / f"{name}-{seed}-{number}")
                    faults[outcome.key] = number
            now = time.monotonic()
            if now - saved > SAVE_SECONDS or number + 1 == inputs:
                done = number + 1 - first
                state |= {"next": number + 1, "counts": dict(counts), "faults": faults}
                state |= {"seconds": round(state["seconds"] + now - saved, 1)}
                state |= {"per_second": round(done / (now - started), 1)}
                save_state(out, name, seed, state)
                saved = now


def load_state(out: Path, name: str, seed: int) -> dict:
    """Return the state of a kind; of one that has not begun, the first state."""
    path = out / f"{name}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    zero = {"next": 0, "slowest": 0.0, "slowest_input": 0, "seconds": 0.0}
    return zero | {"counts": {}, "faults": {}}


def save_state(out: Path, name: str, seed: int, state: dict) -> None:
    """Write the state of a kind."""
    partial = out / f".{name}-{seed}.json"
    partial.write_text(json.dumps(state, indent=1))
    partial.rename(out / f"{name}-{seed}.json")


def supervise(name: str, seed: int, inputs: int, out: Path) -> int:
    """Run a kind to its end; return the number of faults."""
    while True:
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(name, seed, inputs, out)
        )
        current = out / f"{name}-{seed}.current"
        current.unlink(missing_ok=True)
        process.start()
        reported = time.monotonic()
        while process.is_alive():
            process.join(5)
            # The worker ends what it can, so this is code in C that never returns.
            if current.exists() and time.time() - current.stat().st_mtime > HANG_SECONDS:
                process.kill()
            if time.monotonic() - reported > REPORT_SECONDS or not process.is_alive():
                report(name, seed, out)
                reported = time.monotonic()
        state = load_state(out, name, seed)
        if process.exitcode == 0:
            return len(state["faults"])
        if process.exitcode is not None and process.exitcode > 0:
            print(f"{name}: the worker failed; see {out / name}.log", flush=True)
            return 1
        number = int(current.read_text())
        key = f"killed by signal {-(process.exitcode or 0)}"
        state["faults"].setdefault(f"{key} (input {number})", number)
        print(f"{name}: {key} at input {number}", flush=True)
        # What came between the last save and this input is run again, without it.
        state |= {"next": number + 1}
        save_state(out, name, seed, state)


def report(name: str, seed: int, out: Path) -> None:
    """Print the state of a kind in one line."""
    state = load_state(out, name, seed)
    print(
        f"{name}: {state['next']:,} inputs, {state.get('per_second', 0)} per second, slowest "
        f"{state['slowest']} s (input {state['slowest_input']}), {state['counts']}, "
        f"{len(state['faults'])} kinds of faults",
        flush=True,
    )
