"""How much code XLA would write out for a program, where fusion repeats a value for every index.

In `x + x[::-1]` the value of x is wanted at two indices, and fusion writes its computation twice;
twenty such rounds make a million copies, a minute and 4.6 GB on a CPU. So the copies are counted
before anything is compiled, over what XLA fuses: element by element and by moving indices.
"""

from collections import defaultdict
from typing import Any

from jax.extend.core import Literal

from sdjax.sandbox.refusal import Refusal

MOST_COPIES = 50_000  # some two seconds of compilation

MOVES = frozenset(
    """broadcast_in_dim reshape squeeze rev transpose concatenate stack tile pad split slice
    dynamic_slice dynamic_update_slice gather""".split()  # noqa: SIM905
)
# Computed once and kept: reductions, sorts, products, factorisations, random bits, control flow.
KEPT = frozenset(
    """sort top_k argmax argmin dot_general svd eigh qr cholesky lu triangular_solve fft cumsum
    cumprod cummax cummin cumlogsumexp random_bits random_split random_fold_in random_seed
    threefry2x32 scan while cond jit scatter scatter-add scatter-sub scatter-mul scatter-min
    scatter-max optimization_barrier""".split()  # noqa: SIM905
)


def check_copies(jaxpr: Any) -> None:
    """Refusal where a jaxpr (without those inside it) makes more than MOST_COPIES."""
    # The indices, as hashes, at which a variable is wanted. A scalar has one.
    wanted: dict[Any, set[int]] = defaultdict(set)
    for variable in jaxpr.outvars:
        if not isinstance(variable, Literal):
            wanted[variable] = {0}
    total = 0
    for number, equation in reversed(list(enumerate(jaxpr.eqns, 1))):
        name = equation.primitive.name
        indices = set().union(*(wanted.pop(v, set()) for v in equation.outvars))
        total += len(indices)
        if total > MOST_COPIES:
            message = "values are used at too many shifted, flipped or transposed places in a row"
            raise Refusal("too costly", "code-size", message)
        if name in KEPT or name.startswith("reduce_"):
            indices = {hash(number)}
        for place, variable in enumerate(equation.invars):
            if isinstance(variable, Literal):
                continue
            if not variable.aval.shape:
                wanted[variable].add(0)
            elif name in MOVES:
                wanted[variable].update(hash((number, place, index)) for index in indices)
            else:
                wanted[variable] |= indices
