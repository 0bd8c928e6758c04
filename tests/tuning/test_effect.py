"""Numbers that have no effect on a merge stay at their initial values."""

import jax
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.merging.engine import Merger
from sdjax.tuning.differentiability import blocking_operations
from sdjax.tuning.effect import representative_merges, without_idle_numbers
from sdjax.tuning.open_tunable import open_tunable, read_named_merge
from tests.tuning.conftest import SHAPES

GENOME = """\
genome:
  models: [math, code]
  merge_method: ties
  base_model: base
  filters: [mlp]
"""


@pytest.fixture
def genome(tmp_path, model_set):
    """Return a genome with numbers for the MLPs and for everything else."""
    path = tmp_path / "genome.yaml"
    path.write_text(GENOME)
    named = read_named_merge(str(path))
    return open_tunable(str(path), model_set(base=named.base, experts=named.experts))


def merger(*, changed):
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    experts = [
        {name: x + (np.float32(i) if changed in name else 0) for name, x in base.items()}
        for i in (1, 2)
    ]
    return Merger(base, experts)


def test_numbers_of_tensors_that_no_expert_changes_are_not_tuned(genome):
    key, merge = jax.random.key(0), merger(changed=".mlp.")
    tuned, notes = without_idle_numbers(genome, merge, key)
    assert [parameter.name for parameter in tuned.parameters] == [
        f"{key}[{model}, mlp]" for model in ("math", "code") for key in ("weight", "density")
    ]
    assert notes == (
        "weight[math], density[math], weight[code] and 1 more have no effect on the merge and stay "
        "at their initial values",
    )
    values = np.array([0.2, 0.9, 0.7, 0.8])
    every = genome.start
    every[[genome.parameters.index(parameter) for parameter in tuned.parameters]] = values
    assert tuned.write(values) == genome.write(every)
    merged, expected = (merge(t.bind(v)).params for t, v in ((tuned, values), (genome, every)))
    assert all(np.array_equal(merged[name], expected[name]) for name in SHAPES)
    # The analysis follows each of the others.
    blocked = blocking_operations(representative_merges(merge, tuned, key), 4)
    assert sorted(blocked) == [1, 3]


def test_all_numbers_are_kept_if_they_have_an_effect(genome):
    assert without_idle_numbers(genome, merger(changed=""), jax.random.key(0)) == (genome, ())


def test_experts_that_are_the_base_are_refused(genome):
    with pytest.raises(UserError, match=r"genome.yaml: the merge depends on none of its numbers"):
        without_idle_numbers(genome, merger(changed="no such tensor"), jax.random.key(0))
