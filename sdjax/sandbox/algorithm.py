"""Adapter from a verified program to a merge algorithm."""

from sdjax.merging.algorithm import Algorithm
from sdjax.sandbox.verify.verified_program import VerifiedProgram


def to_algorithm(program: VerifiedProgram, *, name: str) -> Algorithm:
    """Return the algorithm of a verified program; no source text is executed."""
    return Algorithm(
        name=name,
        identity=program.identity,
        form=program.form,
        function=program,
        requests=frozenset(program.requests),
        hyperparameters=dict(program.hyperparameters),
        traced=dict.fromkeys(program.hyperparameters, "float"),
    )
