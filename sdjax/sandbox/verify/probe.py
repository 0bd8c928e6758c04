"""What a program's results on the probe tensors say: has it been seen, and what does it equal."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.probe_run import ProbeRun, execute_probe_run, probe_runs
from sdjax.sandbox.verify.verified_program import VerifiedProgram

SAME = 1e-6  # relative distance below which two results are one
ROUNDING = 1e-5  # and below which they are the same sum in another order
PROJECTIONS = 4
# What may be said of an admitted program; where an expert is meant, ": expert_2" follows.
SEED, EXPERT = "equals the seed", "equals an expert"
SCALING = "plain scaling of one task vector"
ORDER = "depends on the order of experts"  # of the others: an expert or its multiple always does


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the probe runs showed."""

    fingerprint: str
    notes: tuple[str, ...]


def probe(program: VerifiedProgram, signature: MergeSignature) -> Findings:
    """Run the program on the contract's probe tensors; Refusal where a result is not finite."""
    runs = probe_runs(program)
    results = [execute_probe_run(program, probe_run) for probe_run in runs]
    notes = _notes(results, [probe_run.inputs.host for probe_run in runs], signature.slots)
    if not notes and any(map(functools.partial(_depends_on_order, program), runs, results)):
        notes = (ORDER,)
    return Findings(fingerprint=_fingerprint(results, _salt(program)), notes=notes)


def _depends_on_order(
    program: VerifiedProgram, probe_run: ProbeRun, result: list[np.ndarray]
) -> bool:
    """Whether the result changes, by more than the rounding of a sum, with the experts' places.

    A turn of all and a swap of the first two generate every order.
    """
    wanted, count = _flat([result]), len(probe_run.inputs.task_vectors)
    orders = {(*range(1, count), 0), (1, 0, *range(2, count))} if count > 1 else set()
    for order in sorted(orders):
        try:
            found = _flat([execute_probe_run(program, probe_run, order)])
        except Refusal:  # finite in the given order alone
            return True
        if float(np.linalg.norm(found - wanted)) > ROUNDING * float(np.linalg.norm(wanted)):
            return True
    return False


def _salt(program: VerifiedProgram) -> str:
    """What keeps apart the programs that may agree where they are probed and nowhere else: those
    that use the depth, or that do other things at other shapes. Only the rest can be found equal
    by their results."""
    operations = {tuple(e.name for e in block.equations) for _, block in program.programs.values()}
    everywhere_alike = len(operations) == 1 or "kind" in program.requests
    return "" if everywhere_alike and "depth" not in program.requests else program.identity


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


@functools.lru_cache(maxsize=16)
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
