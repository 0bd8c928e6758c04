"""DARE with the election of signs: drop at random and rescale, then elect as TIES does.

Yu et al., "Language models are Super Mario", arXiv 2311.03099, with the election of Yadav et al.,
"TIES-Merging", arXiv 2306.01708. Parameters as in ``dare_linear`` and ``ties``; as in mergekit the
sum is not normalised by default.
"""

from __future__ import annotations

import jax

from sdjax.algorithms.dropping import drop_and_rescale
from sdjax.algorithms.mixing import elected_sum
from sdjax.merging.algorithm import PerExpert

MATHEMATICS = "τ = λ Σ_{j∈A} w_j t_j, t_j = (m_j ⊙ τ_j) / d_j, A = {j: sgn t_j = sgn Σ w_i t_i}"


def merge_models(
    task_vectors: dict[str, jax.Array],
    key: jax.Array,
    weight: PerExpert = 0.4,
    density: PerExpert = 0.5,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    elect: str = "weighted",
) -> jax.Array:
    dropped = {
        name: drop_and_rescale(vector, key, density[name], stream, rescale)
        for stream, (name, vector) in enumerate(task_vectors.items())
    }
    return scale * elected_sum(dropped, weight, normalize, elect)
