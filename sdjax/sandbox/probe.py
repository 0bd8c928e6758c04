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
DEPTHS = (0.0, 1.0)  # the first and the last layer


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the probe runs showed."""

    fingerprint: str
    notes: tuple[str, ...]


def probe(program: Rebuilt, contract: Contract) -> Findings:
    """Run the program on the contract's probe tensors; Refusal where a result is not finite."""
    results: list[list[np.ndarray]] = []
    experts: list[list[list[np.ndarray]]] = []  # [slot][run][leaf]
    depths = DEPTHS if "depth" in program.requests else DEPTHS[:1]
    with _on_host():
        for preferred, real in plan(contract, program.form, "kind" in program.requests).probes:
            name = preferred if preferred in program.programs else real
            inputs = _inputs(program.programs[name][0], name)
            for depth in depths:
                results.append(_guarded(program, name, inputs, depth))
                experts.append(inputs.host)
    slots = [[run[i] for run in experts] for i in range(len(contract.slots))]
    return Findings(
        fingerprint=_fingerprint(results, _salt(program)),
        notes=_notes(results, slots, contract.slots),
    )


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


def _guarded(program: Rebuilt, name: Any, inputs: _Inputs, depth: float) -> list[np.ndarray]:
    """What XLA objects to (only a forged message gets so far) is a refusal like any other."""
    try:
        return _run(program, name, inputs, depth)
    except Refusal:
        raise
    except Exception as error:
        message = f"the array program cannot be run ({type(error).__name__})"
        raise Refusal("refused", "wire", message) from None


def _run(program: Rebuilt, name: Any, inputs: _Inputs, depth: float) -> list[np.ndarray]:
    outputs, exhausted = program.run(
        inputs.task_vectors,
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
    results: list[list[np.ndarray]], slots: list[list[list[np.ndarray]]], names: tuple[str, ...]
) -> tuple[str, ...]:
    merged = _flat(results)
    experts = [_flat(slot) for slot in slots]
    scale = float(np.mean([np.linalg.norm(e) for e in experts])) or 1.0
    if float(np.linalg.norm(merged)) < SAME * scale:
        return ("equals the seed",)
    for name, expert in zip(names, experts, strict=True):
        factor = float(np.sum(merged * expert)) / (float(np.sum(expert * expert)) or 1.0)
        if float(np.linalg.norm(merged - factor * expert)) < SAME * np.linalg.norm(merged):
            return (f"equals {name}",) if abs(factor - 1) < SAME else (f"scales {name}",)
    return ()


def _flat(runs: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([leaf.astype(np.float64).ravel() for run in runs for leaf in run])
