"""Memory of a merge in the tree form at the shapes of a 7B model, of which nothing is allocated."""

import pytest

from sdjax.sandbox.compiler.trial import try_merge
from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SHAPES = {"up_proj": (14336, 4096), "gate_proj": (14336, 4096), "down_proj": (4096, 14336)}
PATHS = {f"layers/{n}/mlp/{name}": SHAPES[name] for n in range(32) for name in SHAPES}
SLOTS = ("expert_1", "expert_2", "expert_3")
GB = 10**9

# All tensors of all experts in one array, several times.
FLAT = """
import jax.numpy as jnp

def merge_trees(task_vectors):
    flat = jnp.stack([
        jnp.concatenate([x.ravel() for x in tree.values()]) for tree in task_vectors.values()
    ])
    kept = jnp.where(jnp.abs(flat) > jnp.abs(flat).mean(1, keepdims=True), flat, 0)
    merged, start, result = jnp.median(kept, axis=0), 0, {}
    for path, x in task_vectors["expert_1"].items():
        result[path] = merged[start : start + x.size].reshape(x.shape)
        start += x.size
    return result
"""
SCALED = """
def merge_trees(task_vectors):
    return {path: 0.5 * x for path, x in task_vectors["expert_2"].items()}
"""


@pytest.fixture(scope="module")
def signature():
    kinds = {path: (path.split("/", 2)[2].replace("/", "."), s) for path, s in PATHS.items()}
    return MergeSignature.of(SLOTS, kinds)


def trial(memory):
    tensors = tuple(
        TrialTensor(path=path, shape=shape, base="bfloat16", experts=("bfloat16",) * 3)
        for path, shape in PATHS.items()
    )
    return MergeTrial(memory=memory, tensors=tensors, compiler="single use")


def refusal(source, signature, memory):
    program = verify_ir(trace_trusted(source, signature), signature)
    with pytest.raises(Refusal) as caught:
        try_merge(program, trial(memory), signature)
    assert (caught.value.verdict, caught.value.rule) == ("too costly", "memory")
    return caught.value.message


@pytest.mark.slow
def test_program_is_refused_before_it_is_compiled(signature, monkeypatch):
    monkeypatch.setattr("sdjax.sandbox.compiler.trial._compile", None)
    assert refusal(FLAT, signature, 16 * GB) == (
        "the program keeps 310 GB of arrays alive at once, but the machine has 16 GB"
    )


@pytest.mark.slow
def test_program_is_refused_before_it_runs(signature):
    # Four models of 11.3 GB, the result, and a float32 array of 22.5 GB that is rounded.
    assert refusal(SCALED, signature, 24 * GB) == (
        "the compiled merge needs 78.9 GB of memory at once, but the machine has 24 GB"
    )
