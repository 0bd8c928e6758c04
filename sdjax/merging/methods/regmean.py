"""RegMean: the linear maps that best reproduce each expert's outputs on its own data.

Jin et al., "Dataless knowledge fusion by merging weights of language models", arXiv 2212.09849. For
every linear map this is a regression with a closed solution, which needs the inputs' Gram matrices
alone (`sdjax stats MODEL --data FILE` of every model; means over tokens, so that the amounts of
data do not matter). Elements off their diagonals are multiplied by `alpha`, 0.9 in most of the
paper's experiments and 0.1 for T5. All other tensors are averaged.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = (Σ w_j τ_j G_j) (Σ w_j G_j)⁻¹, G_j = α mean(x xᵀ) + (1 - α) diag, x the map's inputs"
RECIPE = RecipeSchema(base="optional", unit_interval=("alpha",))
# Added to every Gram matrix, relative to the sum of their diagonals and absolutely, so that the sum
# has full rank, and the weights of inputs that are always zero are averaged.
_RIDGE, _TINY = 1e-6, 1e-30


def merge_models(
    task_vectors: TaskVectors,
    gram: dict[str, Float32[Array, "in in"]] | None,
    alpha: float = 0.9,
    weight: PerExpert = 1.0,
) -> Tensor:
    """Return the solution of the regression, or the average of a tensor without inputs."""
    if gram is None:
        return weighted_sum(task_vectors, weight, normalize=True)
    names, size = list(task_vectors), next(iter(gram.values())).shape[0]
    diagonal = sum(weight[name] * jnp.diagonal(gram[name]) for name in names)  # [in]
    ridge = _RIDGE * jnp.asarray(diagonal) / sum(weight[name] for name in names) + _TINY
    identity = jnp.eye(size)
    inputs, outputs = jnp.zeros(()), jnp.zeros(())
    for name in names:
        own = gram[name] * jnp.where(identity > 0, 1.0, alpha) + ridge * identity
        inputs = inputs + weight[name] * own
        outputs = outputs + weight[name] * task_vectors[name] @ own
    # With a diagonal of ones the system is as well conditioned as scaling can make it.
    scale = jnp.sqrt(jnp.diagonal(inputs))
    scale = jnp.where(scale > 0, scale, 1.0)
    solution = jnp.linalg.solve(inputs / scale[:, None] / scale, (outputs / scale).T)
    return solution.T / scale
