"""Fisher: average the experts element by element, weighted by the Fisher information.

Matena, Raffel, "Merging models with Fisher-weighted averaging", arXiv 2111.09832. An element counts
for an expert as much as a change of it would change the expert's predictions on its own data. It
needs statistics (`sdjax stats MODEL --data FILE`) of every model. Where no expert's Fisher
information exceeds `floor`, the result is their average; the authors' floor of 1e-6 is above the
values of large models.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = Σ w_j F_j ⊙ τ_j / Σ w_j F_j, F_j = mean over examples of (∂ log p / ∂θ)²"
RECIPE = RecipeSchema(base="optional")


def merge_models(
    task_vectors: TaskVectors,
    fisher: TaskVectors | None,
    weight: PerExpert = 1.0,
    floor: float = 1e-30,
) -> Tensor:
    """Return the average of the task vectors, weighted by each element's information."""
    if fisher is None:
        return weighted_sum(task_vectors, weight, normalize=True)
    shares = {name: weight[name] * jnp.maximum(fisher[name], floor) for name in task_vectors}
    total = jnp.asarray(sum(shares.values()))
    merged = sum(shares[name] * vector for name, vector in task_vectors.items())
    return merged / jnp.where(total == 0, 1.0, total)
