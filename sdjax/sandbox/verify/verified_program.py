"""Verification of untrusted IR, and the program that results from it.

`verify_ir` is the only gate. It decodes the IR, traces it over the tensors of the merge signature
(so JAX itself checks every shape and dtype), and computes array sizes, memory and cost from its own
jaxpr. Nothing that the worker claims is trusted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.calling_convention import CallingConvention, trace_plan
from sdjax.sandbox.ir.decode import Block, Message, decode
from sdjax.sandbox.ir.hashes import identity_of, structure_of
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.cost import CostEstimate, estimate_cost
from sdjax.sandbox.verify.interpreter import run_block

MIN_ELEMENTS = 1 << 12  # limits relative to tensor sizes treat smaller tensors as this large


@dataclass(frozen=True, kw_only=True, eq=False)
class VerifiedProgram:
    """A verified merge algorithm, callable like its source and traceable under `jax.jit`.

    Attributes:
        identity: hash of the IR. Equal programs have equal identities.
        structure: hash of the IR without the constants that can be tuned.
        form: "tensor" if it merges one tensor per call, "tree" if it merges all at once.
        requests: optional inputs that it reads: base, key, depth, kind.
        hyperparameters: default values of its float hyperparameters.
        cost: units (see primitive_costs.py) over all tensors in scope.
        memory: peak bytes alive at once in one array program.
        max_memory: bytes of temporary memory that a compiled array program may use.
        programs: one array program per tensor shape, or per kind and shape.
        probes: names of the array programs to run on probe tensors.
        max_loop_iterations: iterations after which a `while` loop is cut off.
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
    probes: tuple[Any, ...]
    max_loop_iterations: int

    def __call__(self, task_vectors: Mapping[str, Any] | Sequence[Any], /, **inputs: Any) -> Any:
        """Return the merged task vector.

        Args:
            task_vectors: task vectors (float32), as a dict by slot or a sequence in slot order. For
                the tree form, each one is a dict from tensor path to tensor.
            **inputs: optional inputs and hyperparameters, as for `run`.

        Returns:
            the merged task vector (float32, the shape of the task vectors), all NaN if a `while`
            loop was cut off.
        """
        result, exhausted = self.run(task_vectors, **inputs)
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
        """Run the program.

        Args:
            task_vectors: see `__call__`.
            base: tensor of the base model, or a dict from path to tensor.
            key: PRNG key.
            depth: position of the layer in [0, 1], a float32 scalar.
            kind: kind of the tensor, such as "mlp.down_proj".
            **hyperparameters: values that replace the defaults.

        Returns:
            the merged task vector, and a boolean scalar that says whether a `while` loop was cut
            off (None if the program has no `while` loop).

        Raises:
            ValueError: the program was not traced for these shapes.
            TypeError: a hyperparameter is unknown.
        """
        if unknown := set(hyperparameters) - set(self.hyperparameters):
            raise TypeError(f"unknown hyperparameter: {', '.join(sorted(unknown))}")
        values = [
            jnp.asarray(hyperparameters.get(name, default), jnp.float32)
            for name, default in self.hyperparameters.items()
        ]
        convention, block = self.programs[self._select(task_vectors, kind)]
        inputs = convention.pack(task_vectors, base, key, depth, values)
        outputs, exhausted = run_block(block, inputs, self.max_loop_iterations)
        return convention.result(outputs), exhausted

    def _select(self, task_vectors: Any, kind: str | None) -> Any:
        """Return the name of the array program for these task vectors."""
        values = task_vectors.values() if isinstance(task_vectors, Mapping) else task_vectors
        first = next(iter(values))
        if self.form == "tree":
            shapes = {path: jnp.shape(leaf) for path, leaf in first.items()}
            for name, (convention, _) in self.programs.items():
                if shapes == dict(zip(convention.paths or (), convention.shapes, strict=True)):
                    return name
            raise ValueError("the program was not traced for a tree of these paths and shapes")
        name = (kind if "kind" in self.requests else None, jnp.shape(first))
        if name not in self.programs:
            raise ValueError(f"the program was not traced for {name[0] or 'tensors'} of {name[1]}")
        return name


def verify_ir(ir: str, signature: MergeSignature) -> VerifiedProgram:
    """Verify IR from a worker or a store.

    Args:
        ir: IR as JSON text, untrusted.
        signature: expert slots, tensors and limits.

    Raises:
        Refusal: the IR is malformed, does not fit the signature, or exceeds a limit.
    """
    message = decode(ir, signature)
    limits = signature.limits
    estimates: dict[Any, CostEstimate] = {}
    for name, (convention, block) in message.programs.items():
        jaxpr = _trace(block, convention, list(message.hyperparameters), limits.max_loop_iterations)
        estimates[name] = bounded_estimate(jaxpr, convention, limits)
    probes = _probes(message, signature, estimates)
    return VerifiedProgram(
        identity=identity_of(ir),
        structure=structure_of(ir),
        form=message.form,
        requests=_requests(message),
        hyperparameters=message.hyperparameters,
        cost=total_cost(message.form, message.by_kind, signature, estimates),
        memory=max(estimate.memory for estimate in estimates.values()),
        max_memory=max(_max_memory(c, limits) for c, _ in message.programs.values()),
        programs=message.programs,
        probes=probes,
        max_loop_iterations=limits.max_loop_iterations,
    )


def bounded_estimate(jaxpr: Any, convention: CallingConvention, limits: Limits) -> CostEstimate:
    """Return the cost of an array program, or of its gradient.

    Args:
        jaxpr: the array program.
        convention: its arguments.
        limits: limits on a candidate.

    Raises:
        Refusal: its arrays, its loops or the code that XLA would generate exceed a limit.
    """
    allowed = _max_memory(convention, limits)
    estimate = estimate_cost(jaxpr, limits, max_elements=allowed // 8)
    if estimate.memory > allowed:
        usage = f"the program keeps {estimate.memory:,} bytes alive at once"
        raise Refusal("too costly", "memory", f"{usage}; the limit is {allowed:,}")
    if estimate.iterations > limits.max_total_iterations:
        usage = f"the program's loops take {estimate.iterations:.3g} iterations in total"
        text = f"{usage}; the limit is {limits.max_total_iterations:.3g}"
        raise Refusal("too costly", "loop-iterations", text)
    return estimate


def _max_memory(convention: CallingConvention, limits: Limits) -> int:
    """Return the bytes of two float32 arrays of the maximum size."""
    return 8 * limits.max_expansion * max(convention.elements, MIN_ELEMENTS)


def _trace(
    block: Block,
    convention: CallingConvention,
    hyperparameters: list[str],
    max_loop_iterations: int,
) -> Any:
    """Trace a block and check that its results match the calling convention."""
    try:
        jaxpr = jax.make_jaxpr(lambda *inputs: run_block(block, inputs, max_loop_iterations)[0])(
            *convention.avals(hyperparameters)
        )
    except Refusal:
        raise
    except Exception as error:  # JAX may raise anything on hostile IR
        message = f"the worker's IR cannot be traced ({type(error).__name__})"
        raise Refusal("refused", "ir", message) from None
    for aval, shape in zip(jaxpr.out_avals, convention.shapes, strict=True):
        if aval.shape != shape or aval.dtype != np.float32:
            message = f"the result is {aval.str_short()}; expected float32{list(shape)}"
            raise Refusal("wrong signature", "shape", message)
    if jaxpr.effects:
        raise Refusal("refused", "effects", "the program has side effects")
    return jaxpr


def _probes(
    message: Message, signature: MergeSignature, estimates: Mapping[Any, CostEstimate]
) -> tuple[Any, ...]:
    """Return the names of the array programs to probe.

    Probe runs cannot be interrupted, and a candidate may compute something else at the shapes of
    the probe tensors, so their cost has its own limit.
    """
    limits, names = signature.limits, []
    for reduced, real in trace_plan(signature, message.form, message.by_kind).probes:
        name = reduced if reduced in message.programs else real
        convention, _ = message.programs[name]
        if convention.elements > limits.max_probe_elements:
            text = "the program does not work at the smaller shapes of the probe tensors"
            hint = "take sizes from the arguments' shapes"
            raise Refusal("wrong signature", "probe", f"{text}; {hint}")
        if estimates[name].cost > limits.max_probe_cost:
            usage = f"the program costs {estimates[name].cost:.3g} operations on small tensors"
            text = f"{usage}; the limit is {limits.max_probe_cost:.3g}"
            raise Refusal("too costly", "probe", text)
        names.append(name)
    return tuple(names)


def total_cost(
    form: str, by_kind: bool, signature: MergeSignature, estimates: Mapping[Any, CostEstimate]
) -> int:
    """Return the cost over all tensors in scope.

    Args:
        form: "tensor" or "tree".
        by_kind: whether there is an array program per kind and shape, not only per shape.
        signature: tensors and limits.
        estimates: estimate of each array program by name.

    Raises:
        Refusal: the cost exceeds its limit.
    """
    scope = signature.scope
    if form == "tree":
        cost = estimates["scope"].cost
    else:
        kinds = [tensor.kind if by_kind else None for tensor in scope]
        cost = sum(estimates[kind, t.shape].cost for kind, t in zip(kinds, scope, strict=True))
    elements = max(MIN_ELEMENTS, sum(tensor.size for tensor in scope))
    budget = signature.limits.cost_per_element * elements
    if cost > budget:
        usage = f"the program costs {cost:.3g} operations over the model with all iterations"
        raise Refusal("too costly", "cost", f"{usage}; the limit is {budget:.3g}")
    return cost


def _requests(message: Message) -> tuple[str, ...]:
    """Return the optional inputs that the array programs read."""
    requests = {"kind"} if message.by_kind else set()
    for convention, block in message.programs.values():
        atoms = [a for equation in block.equations for a in equation.operands]
        used = {a for a in (*atoms, *block.outputs) if type(a) is int}
        requests |= {r for r in ("base", "key", "depth") if used & set(convention.position(r))}
    return tuple(sorted(requests))
