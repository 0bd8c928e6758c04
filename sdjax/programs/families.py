"""Which families of operations a merge program belongs to, read from its syntax tree.

The source is never executed. An abstract interpreter walks it and keeps, for every value, which
experts it depends on, its rank and a few tags (a magnitude, a sign, a dot product, ...). The
operations where such values meet tell the families. It follows assignments, loops (walked twice,
so that accumulators are known), comprehensions, helper functions and lambdas; what it does not
know yields a plain value, never an error.
"""

import ast

from sdjax.programs.grammar_reader import Reader

FAMILIES: dict[str, str] = {
    "weighted_sum": "experts added up, at least one with a constant coefficient of its own",
    "subset": "not every expert is used",
    "mean": "the mean of experts",
    "scaling": "a sum of experts, or each expert of a loop, times one constant",
    "interpolation": "a chain of interpolations between experts",
    "norm_balance": "experts divided or weighted by norms or spreads",
    "sign_gate": "entries kept or weighted by the agreement of signs",
    "magnitude_trim": "entries kept by a threshold on their magnitude",
    "clip": "entries limited to a range",
    "row_mean": "row or column means, broadcast",
    "saturation": "tanh",
    "sign_only": "signs times one size",
    "centre": "the tensor's mean subtracted",
    "soft_gate": "entries weighted by an exponential or sigmoid",
    "power": "entries times their own magnitude",
    "extremes": "the elementwise larger or smaller of two experts",
    "cosine_weight": "strength from the cosine or dot product of two experts",
    "depth_ramp": "strength that depends on the layer's depth",
    "base_relative": "the seed's tensor is used",
    "max_magnitude": "elementwise, the expert of larger magnitude (held out of training)",
    "projection_removal": "one expert's projection on another taken away (held out of training)",
}
HELD_OUT: frozenset[str] = frozenset({"max_magnitude", "projection_removal"})


def families_of(source: str, *, slots: int = 3) -> frozenset[str]:
    """The families found in `source`, a merge program over `slots` experts.

    Never raises: text that does not parse has no families.
    """
    try:
        return Reader(slots).read(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
