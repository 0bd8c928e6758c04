"""Conclusions from a program's results on the probe tensors: fingerprint and notes."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdjax.sandbox.compiler.probe_run import ProbeRun, execute_probe_run, probe_runs
from sdjax.sandbox.findings import EXPERT, ORDER, SCALING, SEED, Findings
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import VerifiedProgram

SAME = 1e-6  # relative distance below which two results count as equal
ROUNDING = 1e-5  # relative distance below which they count as the same sum in another order
PROJECTIONS = 4


def probe(program: VerifiedProgram, signature: MergeSignature) -> Findings:
    """Run a program on its probe tensors.

    Raises:
        Refusal: a result is not finite, or a loop does not end.
    """
    runs = probe_runs(program, signature)
    results = [execute_probe_run(program, run) for run in runs]
    notes = _notes(results, [run.inputs.host for run in runs], signature.slots)
    if not notes and any(map(functools.partial(_depends_on_order, program), runs, results)):
        notes = (ORDER,)
    by_program: dict[Any, list[list[np.ndarray]]] = {}
    for run, result in zip(runs, results, strict=True):
        by_program.setdefault(run.name, []).append(result)
    return Findings(fingerprint=_fingerprint(list(by_program.values())), notes=notes)


def _depends_on_order(program: VerifiedProgram, run: ProbeRun, result: list[np.ndarray]) -> bool:
    """Return whether permuting the experts changes the result by more than rounding.

    A rotation and a swap of the first two experts generate all permutations.
    """
    expected, count = _flatten([result]), len(run.inputs.task_vectors)
    orders = {(*range(1, count), 0), (1, 0, *range(2, count))} if count > 1 else set()
    for order in sorted(orders):
        try:
            permuted = _flatten([execute_probe_run(program, run, order)])
        except Refusal:  # only the original order gives a finite result
            return True
        if float(np.linalg.norm(permuted - expected)) > ROUNDING * float(np.linalg.norm(expected)):
            return True
    return False


def _fingerprint(results: Sequence[Sequence[Sequence[np.ndarray]]]) -> str:
    """Hash the results, so that a program equals one that reads the depth without using it.

    Args:
        results: leaves of the result by array program and depth.
    """
    programs = []
    for depths in results:
        at_depths = [_rounded(leaves) for leaves in depths]
        programs.append(at_depths[:1] if all(x == at_depths[0] for x in at_depths) else at_depths)
    return hashlib.sha256(repr(programs).encode()).hexdigest()


def _rounded(leaves: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return norms and random projections, rounded so that the last bits of a sum do not matter."""
    numbers: list[str] = []
    for index, leaf in enumerate(leaves):
        values = leaf.astype(np.float64).ravel()
        norm = float(np.linalg.norm(values))
        numbers.append(f"{norm:.4e}")
        if norm > 0:
            projected = _projections(values.size, index) @ (values / norm)
            numbers.extend(f"{p + 0.0:.5f}".replace("-0.00000", "0.00000") for p in projected)
    return tuple(numbers)


@functools.lru_cache(maxsize=16)
def _projections(size: int, index: int) -> np.ndarray:
    return np.random.default_rng([size, index]).standard_normal((PROJECTIONS, size))


def _notes(
    results: list[list[np.ndarray]], experts: list[list[list[np.ndarray]]], slots: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the note that applies to the results, if any.

    Args:
        results: results by run and leaf.
        experts: task vectors by run, slot and leaf.
        slots: names of the experts.
    """
    merged = _flatten(results)
    task_vectors = [_flatten([run[i] for run in experts]) for i in range(len(slots))]
    scale = float(np.mean([np.linalg.norm(t) for t in task_vectors])) or 1.0
    if float(np.linalg.norm(merged)) < SAME * scale:
        return (SEED,)
    for slot, task_vector in zip(slots, task_vectors, strict=True):
        squared = float(np.sum(task_vector * task_vector)) or 1.0
        factor = float(np.sum(merged * task_vector)) / squared
        if float(np.linalg.norm(merged - factor * task_vector)) < SAME * np.linalg.norm(merged):
            return (f"{EXPERT if abs(factor - 1) < SAME else SCALING}: {slot}",)
    return ()


def _flatten(runs: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([leaf.astype(np.float64).ravel() for run in runs for leaf in run])
