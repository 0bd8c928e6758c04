"""Bounds on the code that XLA generates for the operations that it fuses.

XLA's emitter for the CPU recurses along a chain of fused operations and may overflow its stack. The
longest chain is therefore bounded, in the units per element of primitive_costs.py and 16 units per
operation that moves elements: 1,250 products, 312 exponentials, 78 logarithms of the gamma function
or transpositions, 19 complex arcsines. The bounds were found with
`benchmarks/sandbox/fusion_limits.py`, which compiles chains of some 80 kinds in forked processes
with a stack of 8 MiB and the limits of a compiling worker, in a loop's body and outside of one,
with the options that sdjax uses. These overflowed: products with sums from 2,600 pairs on (625 are
admitted), sigmoids from 1,400 (312), transpositions times a number from 300 (73), pads and slices
times a number from 390 (37). Of the others, most were tried in a loop only; none of those
crashed at four times what is admitted, and some took more than the limit on processor time. A chain
continues through the bodies of loops and branches, each of which counts once.

In `x + x[::-1]` the value of x is read at two indices, and fusion emits its computation twice.
Twenty such steps in a row make a million copies, which take a minute and 4.6 GB to compile on a
CPU. Hence the copies are counted before anything is compiled, over the operations that XLA fuses:
elementwise operations and those that move elements.
"""

from collections import defaultdict
from typing import Any

from jax.extend.core import Literal

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.primitive_costs import table_units

MAX_COPIES = 50_000  # about two seconds of compilation
MAX_CHAIN = 1_250
INDEXING_UNITS = 16

INDEXING = frozenset(
    """broadcast_in_dim reshape squeeze rev transpose concatenate stack tile pad split slice
    dynamic_slice dynamic_update_slice gather""".split()  # noqa: SIM905
)
# Computed once and stored: reductions, sorts, products, factorizations, random bits, control flow.
MATERIALIZED = frozenset(
    """reduce sort top_k argmax argmin dot_general svd eigh qr cholesky lu triangular_solve fft
    cumsum cumprod cummax cummin cumlogsumexp random_bits random_split random_fold_in random_seed
    threefry2x32 scan while cond jit scatter scatter-add scatter-sub scatter-mul scatter-min
    scatter-max optimization_barrier""".split()  # noqa: SIM905
)


def is_materialized(name: str) -> bool:
    """Return whether XLA stores the results of a primitive rather than fusing it into others."""
    return name in MATERIALIZED or (name.startswith("reduce_") and name != "reduce_precision")


def check_codegen_size(jaxpr: Any) -> None:
    """Raise Refusal if a jaxpr, without its loops and branches, gives XLA too much to fuse."""
    _check_copies(jaxpr)
    if (length := _longest_chain(jaxpr, [0] * len(jaxpr.invars))[0]) > MAX_CHAIN:
        message = (
            f"a chain of elementwise operations is {length} products long; the limit is "
            f"{MAX_CHAIN}; put steps that repeat into jax.lax.fori_loop"
        )
        raise Refusal("too costly", "code-size", message)


def _longest_chain(jaxpr: Any, inputs: list[int]) -> tuple[int, list[int]]:
    """Return the length of the longest chain, and of those that end in the results.

    Args:
        jaxpr: the jaxpr.
        inputs: length of the chain that ends in each input.
    """
    length_at: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    longest = 0

    def read(variable: Any) -> int:
        return 0 if isinstance(variable, Literal) else length_at.get(variable, 0)

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [read(v) for v in equation.invars]
        if bodies := _bodies(name, equation.params, operands):
            # XLA removes loops of one iteration and branches whose predicate is known.
            chains = [_longest_chain(body, inputs) for body, inputs in bodies]
            length = max(chain for chain, _ in chains)
            results = [max(ends) for ends in zip(*(ends for _, ends in chains), strict=True)]
        elif is_materialized(name):
            length, results = 0, [0] * len(equation.outvars)
        else:
            avals = [v.aval for v in equation.invars]
            units = INDEXING_UNITS if name in INDEXING else table_units(name, avals)
            length = max(operands, default=0) + units
            results = [length] * len(equation.outvars)
        longest = max(longest, length)
        length_at.update(zip(equation.outvars, results, strict=True))
    return longest, [read(v) for v in jaxpr.outvars]


def _bodies(name: str, params: Any, operands: list[int]) -> list[tuple[Any, list[int]]]:
    """Return the jaxprs of a call, loop or branch, each with the operands that it reads."""
    if name in ("jit", "scan"):
        return [(params["jaxpr"].jaxpr, operands)]
    if name == "while":
        return [(params["body_jaxpr"].jaxpr, operands[params["cond_nconsts"] :])]
    return [(branch.jaxpr, operands[1:]) for branch in params.get("branches", ())]


def _check_copies(jaxpr: Any) -> None:
    """Raise Refusal if a jaxpr makes more than MAX_COPIES copies."""
    # Variable -> indices, as hashes, at which it is read. A scalar has one index.
    read_at: dict[Any, set[int]] = defaultdict(set)
    for variable in jaxpr.outvars:
        if not isinstance(variable, Literal):
            read_at[variable] = {0}
    copies = 0
    for number, equation in reversed(list(enumerate(jaxpr.eqns, 1))):
        name = equation.primitive.name
        indices = set().union(*(read_at.pop(v, set()) for v in equation.outvars))
        copies += len(indices)
        if copies > MAX_COPIES:
            message = "too many shifted, flipped or transposed uses of the same values in a row"
            raise Refusal("too costly", "code-size", message)
        indices = {hash(number)} if is_materialized(name) else indices
        for position, variable in enumerate(equation.invars):
            if isinstance(variable, Literal):
                continue
            if not variable.aval.shape:
                read_at[variable].add(0)
            elif name in INDEXING:
                read_at[variable].update(hash((number, position, index)) for index in indices)
            else:
                read_at[variable] |= indices
