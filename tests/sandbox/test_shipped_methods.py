"""One algorithm API: the shipped methods' files are admitted as they stand, and merge the same."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.engine import default_slots, merge
from sdjax.merging.methods.registry import methods
from sdjax.merging.signature import STATISTICS
from sdjax.models.tree import flatten, unflatten
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_source

TENSORS = {"layers/0/mlp/up_proj": ("mlp.up_proj", (16, 8)), "norm": ("norm", (8,))}
KEY = jax.random.key(3)
ON_DATA = [n for n, method in methods().items() if method.algorithm.requests & set(STATISTICS)]
DATA_FREE = [name for name in methods() if name not in ON_DATA]


def signature_for(method, **parameters) -> MergeSignature:
    signature = MergeSignature.of(default_slots(min(3, method.schema.max_models or 3)), TENSORS)
    return dataclasses.replace(signature, parameters=tuple(parameters.items()))


def source_of(method) -> str:
    return Path(method.algorithm.function.__code__.co_filename).read_text()


def models(count):
    rng = np.random.default_rng(0)
    tensors = jnp.asarray(rng.standard_normal((count, 16, 8)), jnp.float32)
    return [unflatten({"layers/0/mlp/up_proj": tensor}) for tensor in tensors]


def assert_same_merge(program, algorithm):
    base, *experts = models(1 + len(next(iter(program.programs.values()))[0].slots))
    verified = to_algorithm(program, name="verified").bind(
        **{k: v for k, v in algorithm.hyperparameters.items() if k in algorithm.traced}
    )
    assert verified.traced == {k: algorithm.traced[k] for k in verified.traced}
    new, expected = (
        flatten(merge(base, experts, one, scope="all", key=KEY).params)
        for one in (verified, algorithm)
    )
    for path, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(new[path]), np.asarray(tensor), strict=True)


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_shipped_method_is_verified_as_it_stands(name):
    signature = signature_for(methods()[name])
    program = verify_ir(trace_source(source_of(methods()[name]), signature), signature)
    expected = {
        p.name for p in methods()[name].hyperparameters if p.type in ("float", "per_expert")
    }
    assert to_algorithm(program, name=name).traced.keys() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_FREE)
def test_sandbox_admits_every_shipped_method_and_merges_the_same_tensors(name):
    method = methods()[name]
    with Sandbox(signature_for(method), workers=1) as sandbox:
        verdict = sandbox.judge(source_of(method))
    assert verdict.verdict == "admitted", verdict.message
    assert_same_merge(verdict.program, method.bind())


@pytest.mark.parametrize("name", ON_DATA)
def test_programs_do_not_receive_statistics(name):
    with pytest.raises(Refusal, match=f"`{'fisher' if name == 'fisher' else 'gram'}`: programs do"):
        trace_source(source_of(methods()[name]), signature_for(methods()[name]))


def test_values_are_set_without_a_new_trace_by_number_list_or_mapping():
    ties = methods()["ties"]
    signature = signature_for(ties, elect="plain", normalize=False)
    program = verify_ir(trace_source(source_of(ties), signature), signature)
    by_slot = {"expert_1": 0.9, "expert_2": 0.1, "expert_3": 0.5}
    values = {"weight": by_slot, "density": [0.3, 0.6, 0.9], "scale": 0.7}
    assert_same_merge(program, ties.bind(**values, elect="plain", normalize=False))
