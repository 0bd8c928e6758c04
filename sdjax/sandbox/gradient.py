"""Limits on the gradient of a verified program in its hyperparameters.

Tuning compiles the gradient, which is a larger array program than the merge: a chain of n
operations has about 3n in its gradient, and a loop stores what its backward pass reads in every
iteration. It is therefore held to the limits of a program before anything compiles it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.sandbox.ir.calling_convention import CallingConvention
from sdjax.sandbox.ir.decode import Block
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.cost import CostEstimate
from sdjax.sandbox.verify.interpreter import run_block
from sdjax.sandbox.verify.verified_program import VerifiedProgram, bounded_estimate, total_cost
from sdjax.xla.differentiation import NOT_DIFFERENTIABLE


def check_gradient(program: VerifiedProgram, signature: MergeSignature) -> bool:
    """Check the gradient of a program as `verify_ir` checks the program; it is only traced.

    Args:
        program: a program with hyperparameters.
        signature: tensors and limits.

    Returns:
        whether JAX can differentiate the program, at some of its shapes at least.

    Raises:
        Refusal: the gradient exceeds a limit.
    """
    estimates, differentiable = {}, False
    for name, (convention, block) in program.programs.items():
        try:
            jaxpr = _trace(block, convention, program)
        except NOT_DIFFERENTIABLE:
            estimates[name] = CostEstimate(0, 0)
            continue
        except Refusal:
            raise
        except Exception as error:  # JAX may raise anything on hostile IR
            message = f"its gradient cannot be traced ({type(error).__name__})"
            raise Refusal("refused", "ir", message) from None
        estimates[name] = bounded_estimate(jaxpr, convention, signature.limits)
        differentiable = True
    total_cost(program.form, "kind" in program.requests, signature, estimates)
    return differentiable


def weighted_sum(outputs: Sequence[jax.Array], weights: Sequence[jax.Array]) -> jax.Array:
    """Return a scalar whose derivative in each output is the weight: arrays of the same shapes."""
    pairs = zip(outputs, weights, strict=True)
    return jnp.sum(jnp.stack([jnp.sum(x.astype(jnp.float32) * w) for x, w in pairs]))


def _trace(block: Block, convention: CallingConvention, program: VerifiedProgram) -> Any:
    avals = convention.avals(list(program.hyperparameters))
    first = len(avals) - len(program.hyperparameters)
    weights = [jax.ShapeDtypeStruct(shape, np.float32) for shape in convention.shapes]

    def total(values: Any, others: Any, weights: Any) -> jax.Array:
        outputs, _ = run_block(block, [*others, *values], program.max_loop_iterations)
        return weighted_sum(outputs, weights)

    return jax.make_jaxpr(jax.value_and_grad(total))(avals[first:], avals[:first], weights)
