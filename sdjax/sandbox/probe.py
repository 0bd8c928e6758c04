"""A verified program on small fixed tensors: is it finite, what does it equal, has it been seen.

The program runs operation by operation on the host's CPU: compiling it whole would take longer
than running it ever does, and single operations stay compiled from one candidate to the next.
"""

import functools
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sdjax.sandbox.contract import Contract
from sdjax.sandbox.layout import Layout, plan
from sdjax.sandbox.rebuild import Rebuilt
from sdjax.sandbox.verdict import Refusal

SAME = 1e-6  # relative distance below which two results are one
PROJECTIONS = 4
ROUNDING = 1e-5  # and below which they are the same sum in another order
DEPTHS = (0.0, 1.0)  # the first and the last layer
# What may be said of an admitted program; where an expert is meant, ": expert_2" follows.
SEED, EXPERT = "equals the seed", "equals an expert"
SCALING = "plain scaling of one task vector"
ORDER = "depends on the order of experts"  # of the others: an expert or its multiple always does


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the probe runs showed."""

    fingerprint: str
    notes: tuple[str, ...]


def probe(program: Rebuilt, contract: Contract) -> Findings:
    """Run the program on the contract's probe tensors; Refusal where a result is not finite."""
    results: list[list[np.ndarray]] = []
    experts: list[list[list[np.ndarray]]] = []  # [run][slot][leaf]
    depths = DEPTHS if "depth" in program.requests else DEPTHS[:1]
    runs: list[tuple[Any, _Inputs, float]] = []
    with _on_host():
        for preferred, real in plan(contract, program.form, "kind" in program.requests).probes:
            name = preferred if preferred in program.programs else real
            inputs = _inputs(program.programs[name][0], name)
            runs.extend((name, inputs, depth) for depth in depths)
        for run in runs:
            results.append(_guarded(program, *run))
            experts.append(run[1].host)
        notes = _notes(results, experts, contract.slots)
        if not notes and any(
            _depends_on_order(program, *run, result)
            for run, result in zip(runs, results, strict=True)
        ):
            notes = (ORDER,)
    return Findings(fingerprint=_fingerprint(results, _salt(program)), notes=notes)


def _depends_on_order(
    program: Rebuilt, name: Any, inputs: "_Inputs", depth: float, result: list[np.ndarray]
) -> bool:
    """Whether the result changes, by more than the rounding of a sum, with the experts' places.

    A turn of all and a swap of the first two generate every order.
    """
    count = len(inputs.task_vectors)
    wanted = _flat([result])
    for order in _generators(count):
        try:
            found = _flat([_guarded(program, name, inputs, depth, order)])
        except Refusal:  # finite in the given order alone
            return True
        if float(np.linalg.norm(found - wanted)) > ROUNDING * float(np.linalg.norm(wanted)):
            return True
    return False


def _generators(count: int) -> list[tuple[int, ...]]:
    if count < 2:
        return []
    return sorted({(*range(1, count), 0), (1, 0, *range(2, count))})


def _salt(program: Rebuilt) -> str:
    """What keeps apart the programs that may agree where they are probed and nowhere else: those
    that use the depth, or that do other things at other shapes. Only the rest can be found equal
    by their results."""
    operations = {tuple(e.name for e in block.equations) for _, block in program.programs.values()}
    everywhere_alike = len(operations) == 1 or "kind" in program.requests
    return "" if everywhere_alike and "depth" not in program.requests else program.identity


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs:
    task_vectors: tuple[Any, ...]
    base: Any
    host: list[list[np.ndarray]]  # [slot][leaf]


@functools.lru_cache(maxsize=64)
def _inputs(layout: Layout, name: Any) -> _Inputs:
    """Task vectors as fine-tuning leaves them: bfloat16 differences, some of them exactly zero."""
    seed = int.from_bytes(hashlib.sha256(repr((name, layout)).encode()).digest()[:8], "big")
    draw = np.random.default_rng(seed)

    def tensor(shape: tuple[int, ...], scale: float, zeros: float) -> np.ndarray:
        values = draw.standard_normal(shape) * scale
        values = np.where(draw.random(shape) < zeros, 0.0, values)
        return values.astype(jax.numpy.bfloat16).astype(np.float32)

    common = [draw.random(shape) < 0.02 for shape in layout.shapes]  # zero for every expert
    host = [
        [
            np.where(zero, np.float32(0), tensor(shape, 0.01 * (1 + i), 0.05))
            for shape, zero in zip(layout.shapes, common, strict=True)
        ]
        for i in range(len(layout.slots))
    ]
    base = [tensor(shape, 0.05, 0.0) for shape in layout.shapes]
    put = jax.device_put
    return _Inputs(
        task_vectors=tuple(put(layout.result(leaves)) for leaves in host),
        base=put(layout.result(base)),
        host=host,
    )


def _guarded(
    program: Rebuilt,
    name: Any,
    inputs: _Inputs,
    depth: float,
    order: tuple[int, ...] | None = None,
) -> list[np.ndarray]:
    """What XLA objects to (only a forged message gets so far) is a refusal like any other."""
    try:
        return _run(program, name, inputs, depth, order or range(len(inputs.task_vectors)))
    except Refusal:
        raise
    except Exception as error:
        message = f"the array program cannot be run ({type(error).__name__})"
        raise Refusal("refused", "wire", message) from None


def _run(
    program: Rebuilt, name: Any, inputs: _Inputs, depth: float, order: Sequence[int]
) -> list[np.ndarray]:
    outputs, exhausted = program.run(
        [inputs.task_vectors[slot] for slot in order],
        base=inputs.base,
        key=jax.random.key(0, impl="threefry2x32"),
        depth=np.float32(depth),
        kind=name[0] if isinstance(name, tuple) else None,
    )
    if exhausted is not None and bool(exhausted):
        message = f"a `while` loop did not end within {program.fuel} steps on the probe tensors"
        raise Refusal("too costly", "fuel", message)
    leaves = [np.asarray(leaf) for leaf in _leaves(program.programs[name][0], outputs)]
    for leaf in leaves:
        if not np.isfinite(leaf).all():
            share = float(np.mean(~np.isfinite(leaf)))
            raise Refusal(
                "non-finite",
                "non-finite",
                f"{share:.2g} of the result is NaN or infinite on probe tensors that hold some"
                " zeros, as real task vectors do; guard divisions, logarithms and roots",
            )
    return leaves


def _leaves(layout: Layout, value: Any) -> list[Any]:
    return [value] if layout.paths is None else [value[path] for path in layout.paths]


def _on_host() -> AbstractContextManager:
    """The host's CPU, so that verdicts are the same beside any accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # a process that was started for its accelerator alone
        return nullcontext()


# --- what the results say --------------------------------------------------------------------


def _fingerprint(results: Sequence[Sequence[np.ndarray]], salt: str) -> str:
    """A hash of norms and random projections, rounded: it forgives the last bits of a sum."""
    numbers = []
    for leaves in results:
        for index, leaf in enumerate(leaves):
            values = leaf.astype(np.float64).ravel()
            norm = float(np.linalg.norm(values))
            numbers.append(f"{norm:.4e}")
            if norm > 0:
                projected = _projections(values.size, index) @ (values / norm)
                numbers.extend(f"{p + 0.0:.5f}".replace("-0.00000", "0.00000") for p in projected)
    return hashlib.sha256("|".join([salt, *numbers]).encode()).hexdigest()


@functools.lru_cache(maxsize=128)
def _projections(size: int, index: int) -> np.ndarray:
    draw = np.random.default_rng([size, index])
    return draw.standard_normal((PROJECTIONS, size))


def _notes(
    results: list[list[np.ndarray]], experts: list[list[list[np.ndarray]]], names: tuple[str, ...]
) -> tuple[str, ...]:
    merged = _flat(results)
    flat = [_flat([slots[i] for slots in experts]) for i in range(len(names))]
    scale = float(np.mean([np.linalg.norm(e) for e in flat])) or 1.0
    if float(np.linalg.norm(merged)) < SAME * scale:
        return (SEED,)
    for name, expert in zip(names, flat, strict=True):
        factor = float(np.sum(merged * expert)) / (float(np.sum(expert * expert)) or 1.0)
        if float(np.linalg.norm(merged - factor * expert)) < SAME * np.linalg.norm(merged):
            return (f"{EXPERT if abs(factor - 1) < SAME else SCALING}: {name}",)
    return ()


def _flat(runs: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([leaf.astype(np.float64).ravel() for run in runs for leaf in run])
