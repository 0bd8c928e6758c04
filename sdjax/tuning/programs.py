"""Programs whose constants are tuned: files that the sandbox admits, and shipped methods.

The program is judged twice: as written, before its text is read in this process, and in its
parametric form, which is what merges. Use decides which constants are parameters
(`sdjax.programs.constants`), and the sandbox has the last word: a constant whose parametric form is
refused, because Python needs its value, stays as it is.

The merge and its gradient are compiled in a confined process first. A program whose gradient is
refused there, or by its size, is tuned without one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.method import Method
from sdjax.programs.constants import Constant, find_constants
from sdjax.programs.parametric import parametric_form, with_values
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.gradient import check_gradient
from sdjax.sandbox.merge_trial import MergeTrial
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import Verdict
from sdjax.sandbox.verify.verified_program import VerifiedProgram
from sdjax.tuning.patterns import Pattern, PatternedAlgorithm, rounded
from sdjax.tuning.types import Parameter, Tunable

MAX_CONSTANTS = 32

_logger = logging.getLogger(__name__)


class Judge(Protocol):
    """A sandbox, or what shares one between processes."""

    signature: MergeSignature

    def judge(self, source: str, *, name: str) -> Verdict:
        """Judge one candidate."""

    def judge_all(self, sources: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the verdict of each candidate."""

    def try_merge(self, ir: str, trial: MergeTrial) -> Refusal | None:
        """Return why a merge is refused, or None."""


def program_tunable(
    source: str,
    sandbox: Judge,
    *,
    name: str,
    trial: MergeTrial | None = None,
    with_gradient: bool = True,
) -> Tunable:
    """Return a program whose constants are tuned.

    Args:
        source: text of the program.
        sandbox: a running sandbox for the models that are merged.
        name: name of the program in messages.
        trial: what the merges will compile, if the program and its gradient are tried first.
        with_gradient: whether the search may use the gradient.

    Raises:
        UserError: the program is refused, or it has no constants to tune.
    """
    slots = sandbox.signature.slots
    _admitted(sandbox.judge(source, name=name), name)
    try:
        found = find_constants(source, slots)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    constants, verdict = _tunable_constants(source, found[:MAX_CONSTANTS], sandbox, name)
    if len(found) > MAX_CONSTANTS:
        _logger.warning(
            "%s: %d of its %d constants are tuned, the first ones; the others stay",
            *(name, MAX_CONSTANTS, len(found)),
        )
    assert verdict.program is not None
    assert verdict.ir is not None
    if trial is not None and (refusal := sandbox.try_merge(verdict.ir, trial)):
        raise UserError(f"{name}: {_text(refusal)}")
    algorithm = replace(
        to_algorithm(verdict.program, name=name), identity=identity_without_defaults(verdict.ir)
    )
    ranges = [Parameter(name=c.name, start=c.start, low=c.low, high=c.high) for c in constants]
    refusal = None
    if with_gradient:
        refusal = _refuse_gradient(verdict.program, verdict.ir, sandbox, trial)
    return replace(
        _tunable(name, source, slots, constants, ranges, algorithm),
        gradient_refusal=None if refusal is None else _text(refusal),
    )


def method_program_tunable(
    method: Method,
    slots: Sequence[str],
    parameters: Mapping[str, Parameter],
) -> Tunable:
    """Return a shipped method whose hyperparameters are tuned, and which is written as a program.

    Args:
        method: the method.
        slots: names of the experts, in order.
        parameters: hyperparameter to its start and bounds, if it is tuned.
    """
    source = inspect.getsource(inspect.getmodule(method.algorithm.function))  # type: ignore[arg-type]
    constants = [
        constant
        for constant in find_constants(source, slots)
        if constant.is_default and constant.name in parameters
    ]
    ranges = [parameters[constant.name] for constant in constants]
    return _tunable(method.name, source, slots, constants, ranges, method.algorithm)


def identity_without_defaults(ir: str) -> str:
    """Return a hash of an IR without the default values of its hyperparameters.

    Two programs that differ in tunable constants alone have parametric forms with the same hash,
    and therefore share their executables.
    """
    message = json.loads(ir)
    message["hyperparameters"] = sorted(message["hyperparameters"])
    text = json.dumps(message, sort_keys=True, separators=(",", ":"))
    return f"parametric {hashlib.sha256(text.encode()).hexdigest()}"


def _refuse_gradient(
    program: VerifiedProgram, ir: str, sandbox: Judge, trial: MergeTrial | None
) -> Refusal | None:
    """Return why the gradient of a program in its hyperparameters is refused, or None."""
    try:
        differentiable = check_gradient(program, sandbox.signature)
    except Refusal as refusal:
        return refusal
    if trial is None or not differentiable:  # there is nothing to compile; see `MergeLoss.blocking`
        return None
    return sandbox.try_merge(ir, replace(trial, computes="gradient"))


def _text(refusal: Refusal) -> str:
    return f"{refusal.verdict} ({refusal.rule}): {refusal.message}"


def _admitted(verdict: Verdict, name: str) -> None:
    if verdict.program is None:
        raise UserError(f"{name}: {verdict.verdict} ({verdict.rule}): {verdict.message}")


def _tunable_constants(
    source: str, constants: Sequence[Constant], sandbox: Judge, name: str
) -> tuple[Sequence[Constant], Verdict]:
    """Return the constants that can be hyperparameters, and the verdict on that form."""
    if not constants:
        raise UserError(
            f"{name}: no constant to tune; write a weight as a number with a decimal point, such "
            "as 0.5, or tune one of the families, such as weights"
        )
    verdict = sandbox.judge(parametric_form(source, constants), name=name)
    if verdict.ir is not None:
        unused = unused_hyperparameters(verdict.ir)
        kept = [constant for constant in constants if not _scalars(constant, constants) <= unused]
        if kept and len(kept) < len(constants):
            verdict = sandbox.judge(parametric_form(source, kept), name=name)
        if not kept:
            raise UserError(f"{name}: no constant to tune; the result depends on none of them")
        return kept, verdict
    groups = _by_hyperparameter(constants)
    forms = [parametric_form(source, group) for group in groups.values()]
    kept = [
        constant
        for (_, own), group in zip(sandbox.judge_all(forms), groups.values(), strict=True)
        if own.program is not None
        for constant in group
    ]
    if kept and len(kept) < len(constants):
        stay = ", ".join(key for key in groups if groups[key][0] not in kept)
        _logger.warning("%s: Python needs the values of %s, which stay as they are", name, stay)
        verdict = sandbox.judge(parametric_form(source, kept), name=name)
    if not kept or verdict.program is None:
        raise UserError(
            f"{name}: its constants cannot be tuned; as hyperparameters they are "
            f"{verdict.verdict} ({verdict.rule}): {verdict.message}"
        )
    return kept, verdict


def unused_hyperparameters(ir: str) -> frozenset[str]:
    """Return the scalar hyperparameters of an IR that none of its array programs reads."""
    message = json.loads(ir)
    names = sorted(message["hyperparameters"])
    used: set[str] = set()
    for array_program in message["programs"]:
        block = array_program["block"]
        first = block["inputs"] - len(names)  # the last inputs; see `CallingConvention`
        atoms = [atom for _, operands, _, _ in block["equations"] for atom in operands]
        read = {atom for atom in (*atoms, *block["outputs"]) if isinstance(atom, int)}
        used |= {name for i, name in enumerate(names, first) if i in read}
    return frozenset(names) - used


def _scalars(constant: Constant, constants: Sequence[Constant]) -> frozenset[str]:
    """Return the scalars of a constant's hyperparameter in an IR: one, or one per expert."""
    if constant.expert is None:
        return frozenset({constant.name})
    group = _by_hyperparameter(constants)[constant.name]
    return frozenset(f"{constant.name}.{number + 1}" for number in range(len(group)))


def _by_hyperparameter(constants: Sequence[Constant]) -> dict[str, list[Constant]]:
    groups: dict[str, list[Constant]] = {}
    for constant in constants:
        groups.setdefault(constant.name, []).append(constant)
    return groups


def _tunable(
    name: str,
    source: str,
    slots: Sequence[str],
    constants: Sequence[Constant],
    ranges: Sequence[Parameter],
    algorithm: Algorithm,
) -> Tunable:
    index = {id(constant): number for number, constant in enumerate(constants)}
    shared: dict[str, Pattern] = {}
    per_expert: dict[str, list[Pattern]] = {}
    for key, group in _by_hyperparameter(constants).items():
        patterns = [Pattern(numbers=((index[id(constant)],),)) for constant in group]
        if group[0].expert is None:
            shared[key] = patterns[0]
        else:
            per_expert[key] = patterns
    patterned = PatternedAlgorithm(algorithm=algorithm, shared=shared, per_expert=per_expert)

    def write(values: Any) -> str:
        return with_values(source, constants, [rounded(value) for value in values])

    return Tunable(
        name=name,
        slots=tuple(slots),
        parameters=tuple(
            parameter
            if constant.expert is None
            else replace(parameter, name=f"{constant.name}[{slots[constant.expert]}]")
            for constant, parameter in zip(constants, ranges, strict=True)
        ),
        bind=patterned.bind,
        write=write,
        suffix=".py",
    )
