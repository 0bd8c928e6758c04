"""The trusted side's own program: each primitive of a checked message bound anew.

`rebuild` is the whole gate: it decodes the message, traces the program that comes of it over the
contract's tensors (so that JAX itself checks every shape and type), and counts elements, memory
and cost in the jaxpr that it made itself. What the worker claimed is never used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax.sandbox.ir.calling_convention import CallingConvention, trace_plan
from sdjax.sandbox.ir.decode import Atom, Block, Equation, Message, decode
from sdjax.sandbox.ir.hashes import identity_of, structure_of
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.cost import CostEstimate, estimate_cost


@dataclass(frozen=True, kw_only=True, eq=False)
class VerifiedProgram:
    """A verified program, callable as its author wrote it and traceable under `jax.jit`.

    `cost` is in scalar operations over the contract's scope, `memory` in bytes; `most_memory`
    is what it may take when it is compiled.
    """

    identity: str
    structure: str
    form: Literal["tensor", "tree"]
    requests: tuple[str, ...]
    hyperparameters: Mapping[str, float]
    cost: int
    memory: int
    max_memory: int
    programs: Mapping[Any, tuple[CallingConvention, Block]]
    probes: tuple[Any, ...]  # which of them are to be tried
    max_loop_iterations: int

    def __call__(self, task_vectors: Mapping[str, Any] | Sequence[Any], /, **asked: Any) -> Any:
        """The merged task vector (float32; for a tree a dict from path to tensor).

        `task_vectors` is a dict by slot or a sequence in slot order, `asked` as for `run`. A
        `while` that used up its fuel makes the result NaN, which no caller admits.
        """
        result, exhausted = self.run(task_vectors, **asked)
        if exhausted is None:
            return result
        return jax.tree.map(lambda x: jnp.where(exhausted, jnp.nan, x), result)

    def run(
        self,
        task_vectors: Mapping[str, Any] | Sequence[Any],
        /,
        *,
        base: Any = None,
        key: Any = None,
        depth: Any = None,
        kind: str | None = None,
        **hyperparameters: Any,
    ) -> tuple[Any, Any]:
        """(result, whether a `while` used up its fuel; None where there is none)."""
        if unknown := set(hyperparameters) - set(self.hyperparameters):
            raise TypeError(f"no such hyperparameter: {', '.join(sorted(unknown))}")
        values = [
            jnp.asarray(hyperparameters.get(name, default), jnp.float32)
            for name, default in self.hyperparameters.items()
        ]
        convention, block = self.programs[self._select(task_vectors, kind)]
        inputs = convention.pack(task_vectors, base, key, depth, values)
        outputs, exhausted = run(block, inputs, self.max_loop_iterations)
        return convention.result(outputs), exhausted

    def _select(self, task_vectors: Any, kind: str | None) -> Any:
        values = task_vectors.values() if isinstance(task_vectors, Mapping) else task_vectors
        first = next(iter(values))
        if self.form == "tree":
            shapes = {path: jnp.shape(leaf) for path, leaf in first.items()}
            for name, (convention, _) in self.programs.items():
                if shapes == dict(zip(convention.paths or (), convention.shapes, strict=True)):
                    return name
            raise ValueError("the program was not traced for such a tree")
        name = (kind if "kind" in self.requests else None, jnp.shape(first))
        if name not in self.programs:
            raise ValueError(f"the program was not traced for {name[0] or 'tensors'} of {name[1]}")
        return name


def verify_ir(ir: str, signature: MergeSignature) -> VerifiedProgram:
    """Verify a message from a worker or a store; Refusal where it is not legal or too costly."""
    message = decode(ir, signature)
    limits = signature.limits
    names = list(message.hyperparameters)
    estimates: dict[Any, CostEstimate] = {}
    max_memory = 0
    for name, (convention, block) in message.programs.items():
        jaxpr = _verified(block, convention, names, limits.max_loop_iterations)
        slot = sum(int(np.prod(shape)) for shape in convention.shapes)
        most = limits.max_expansion * max(slot, 1 << 12)
        estimates[name] = estimate_cost(jaxpr, limits, most_elements=most)
        allowed = 8 * most  # twice the largest intermediate that there may be, in float32
        if estimates[name].memory > allowed:
            found = f"{estimates[name].memory:.3g} bytes alive at once; {allowed:.3g} are allowed"
            raise Refusal("too costly", "memory", f"the program keeps {found}")
        max_memory = max(max_memory, allowed)
        if estimates[name].iterations > limits.max_total_iterations:
            found = f"{estimates[name].iterations:.3g} rounds of loops; {limits.max_total_iterations:.3g} are allowed"
            raise Refusal("too costly", "loop-iterations", f"the program takes {found}")
    probes = _probes(message, signature, estimates)
    if message.form == "tree":
        cost = estimates["scope"].cost
    else:
        scope = signature.scope
        kinds = [t.kind if message.by_kind else None for t in scope]
        cost = sum(estimates[kind, t.shape].cost for kind, t in zip(kinds, scope, strict=True))
    budget = limits.cost_per_element * max(1 << 12, sum(t.size for t in signature.scope))
    if cost > budget:
        raise Refusal(
            "too costly",
            "cost",
            f"the program takes {cost:.3g} scalar operations over the model, trip counts included;"
            f" {budget:.3g} are allowed",
        )
    return VerifiedProgram(
        identity=identity_of(ir),
        structure=structure_of(ir),
        form=message.form,
        requests=_requests(message),
        hyperparameters=message.hyperparameters,
        cost=cost,
        memory=max(b.memory for b in estimates.values()),
        max_memory=max_memory,
        programs=message.programs,
        probes=probes,
        max_loop_iterations=limits.max_loop_iterations,
    )


def _probes(
    message: Message, signature: MergeSignature, estimates: Mapping[Any, CostEstimate]
) -> tuple[Any, ...]:
    """The programs that the parent will run on probe tensors; Refusal where one takes too long.

    Nothing ends such a run, and a program may do other things at a probe's shape than at others.
    """
    limits, found = signature.limits, []
    for small, real in trace_plan(signature, message.form, message.by_kind).probes:
        name = small if small in message.programs else real
        convention, _ = message.programs[name]
        if sum(int(np.prod(shape)) for shape in convention.shapes) > limits.max_probe_elements:
            text = "the program does not work at the smaller shapes on which it is to be tried"
            hint = "take lengths from the arguments' shapes, so that it works at any"
            raise Refusal("wrong signature", "probe", f"{text}; {hint}")
        if estimates[name].cost > limits.max_probe_cost:
            text = f"{estimates[name].cost:.3g} scalar operations on small tensors"
            raise Refusal("too costly", "probe", f"{text}; {limits.max_probe_cost:.3g} are allowed")
        found.append(name)
    return tuple(found)


def _verified(
    block: Block,
    convention: CallingConvention,
    hyperparameters: list[str],
    max_loop_iterations: int,
) -> Any:
    """The program's jaxpr as the parent traces it, its results checked against the layout."""
    try:
        jaxpr = jax.make_jaxpr(lambda *inputs: run(block, inputs, max_loop_iterations)[0])(
            *convention.avals(hyperparameters)
        )
    except Refusal:
        raise
    except Exception as error:  # whatever JAX objects to in a hostile message
        kind = type(error).__name__
        message = f"the worker's message does not trace ({kind})"
        raise Refusal("refused", "ir", message) from None
    for aval, shape in zip(jaxpr.out_avals, convention.shapes, strict=True):
        if aval.shape != shape or aval.dtype != np.float32:
            message = f"the result is {aval.str_short()} where float32{list(shape)} is expected"
            raise Refusal("wrong signature", "shape", message)
    if jaxpr.effects:
        raise Refusal("refused", "effects", "the program has side effects")
    return jaxpr


def _requests(message: Message) -> tuple[str, ...]:
    """What the programs really read besides the task vectors."""
    found = {"kind"} if message.by_kind else set()
    for convention, block in message.programs.values():
        atoms = [a for equation in block.equations for a in equation.operands]
        used = {a for a in (*atoms, *block.outputs) if type(a) is int}
        found |= {r for r in ("base", "key", "depth") if used & set(convention.position(r))}
    return tuple(sorted(found))


# --- binding ---------------------------------------------------------------------------------


# (equation, operands, fuel) to (results, whether a `while` used up its fuel; None: there is none).
Bind = Callable[[Equation, list[Any], int], tuple[list[Any], Any]]


def bind(
    equation: Equation, operands: list[Any], max_loop_iterations: int
) -> tuple[list[Any], Any]:
    """One equation on these operands."""
    if equation.name in _CONTROL:
        return _CONTROL[equation.name](equation, operands, max_loop_iterations)
    bound = ALLOWED[equation.name].bind(*operands, **equation.params)
    return list(bound) if isinstance(bound, (list, tuple)) else [bound], None


def run(
    block: Block, inputs: Sequence[Any], max_loop_iterations: int, bind: Bind = bind
) -> tuple[list[Any], Any]:
    """A block's equations on these inputs, one after the other: (outputs, exhausted or None)."""
    values = list(inputs)
    exhausted = jnp.zeros((), bool) if block.loops else None

    def read(atom: Atom) -> Any:
        if type(atom) is int:
            return values[atom]
        # Or XLA computes on constants while it compiles, a million times slower than after it.
        return lax.optimization_barrier(atom) if isinstance(atom, np.ndarray) else atom

    for equation in block.equations:
        results, flag = bind(equation, [read(a) for a in equation.operands], max_loop_iterations)
        if len(results) != equation.outputs:
            raise Refusal("refused", "ir", f"{equation.name} has another number of results")
        exhausted = exhausted if flag is None else flag | exhausted
        values.extend(results)
    return [jnp.asarray(read(a)) for a in block.outputs], exhausted


def _scan(
    equation: Equation, operands: list[Any], max_loop_iterations: int
) -> tuple[list[Any], Any]:
    p = equation.params
    body, carries = p["body"], p["carry"]
    consts, rest = operands[: p["consts"]], operands[p["consts"] :]

    def step(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        state, flag = carry
        outputs, exhausted = run(body, [*consts, *state, *xs], max_loop_iterations)
        flag = flag if exhausted is None else flag | exhausted
        return (tuple(outputs[:carries]), flag), tuple(outputs[carries:])

    flag = jnp.zeros((), bool) if body.loops else None
    initial = (tuple(jnp.asarray(x) for x in rest[:carries]), flag)
    xs = tuple(jnp.asarray(x) for x in rest[carries:])
    (state, flag), ys = lax.scan(step, initial, xs, p["length"], p["reverse"])
    return [*state, *ys], flag


def _while(
    equation: Equation, operands: list[Any], max_loop_iterations: int
) -> tuple[list[Any], Any]:
    p = equation.params
    first, second = p["condition_consts"], p["condition_consts"] + p["body_consts"]

    def wanted(state: tuple) -> Any:
        return run(p["condition"], [*operands[:first], *state], max_loop_iterations)[0][0]

    # The carry: what the program carries, fuel left, whether an inner loop ran out of its own.
    def condition(carry: tuple) -> Any:
        state, left, _ = carry
        return jnp.logical_and(wanted(state), left > 0)

    def step(carry: tuple) -> tuple:
        state, left, flag = carry
        outputs, exhausted = run(p["body"], [*operands[first:second], *state], max_loop_iterations)
        return tuple(outputs), left - 1, flag if exhausted is None else flag | exhausted

    initial = tuple(jnp.asarray(x) for x in operands[second:])
    start = (initial, jnp.int32(max_loop_iterations), jnp.zeros((), bool))
    state, _, flag = lax.while_loop(condition, step, start)
    return list(state), flag | wanted(state)  # still wanted: it ended for want of fuel


def _cond(
    equation: Equation, operands: list[Any], max_loop_iterations: int
) -> tuple[list[Any], Any]:
    branches = equation.params["branches"]
    loops = any(branch.loops for branch in branches)

    def branch(block: Block) -> Callable:
        def call(*inputs: Any) -> tuple:
            outputs, exhausted = run(block, inputs, max_loop_iterations)
            flag = jnp.zeros((), bool) if exhausted is None else exhausted
            return tuple(outputs), flag if loops else None

        return call

    index, *inputs = (jnp.asarray(x) for x in operands)
    outputs, flag = lax.switch(index, [branch(b) for b in branches], *inputs)
    return list(outputs), flag


_CONTROL: dict[str, Callable[[Equation, list[Any], int], tuple[list[Any], Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
