"""Bound on the code that XLA generates if fusion duplicates a value for every index.

In `x + x[::-1]` the value of x is read at two indices, and fusion emits its computation twice.
Twenty such steps in a row make a million copies, which take a minute and 4.6 GB to compile on a
CPU. Hence the copies are counted before anything is compiled, over the operations that XLA fuses:
elementwise operations and those that move elements.
"""

from collections import defaultdict
from typing import Any

from jax.extend.core import Literal

from sdjax.sandbox.refusal import Refusal

MAX_COPIES = 50_000  # about two seconds of compilation

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


def check_codegen_size(jaxpr: Any) -> None:
    """Raise Refusal if a jaxpr, without its sub-jaxprs, makes more than MAX_COPIES copies."""
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
        if name in MATERIALIZED or name.startswith("reduce_"):
            indices = {hash(number)}
        for position, variable in enumerate(equation.invars):
            if isinstance(variable, Literal):
                continue
            if not variable.aval.shape:
                read_at[variable].add(0)
            elif name in INDEXING:
                read_at[variable].update(hash((number, position, index)) for index in indices)
            else:
                read_at[variable] |= indices
