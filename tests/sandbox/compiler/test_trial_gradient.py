"""The trial of a gradient compiles the executables that tuning compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import HEAD, merge

import sdjax
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.merge_gradient import hyperparameter_gradient
from sdjax.models.tree import flatten, unflatten
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.compiler.trial import try_merge
from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

TENSOR = merge(
    "return sum(w * task_vectors[name] for name, w in weight.items()) * (a if 'up' in kind else 1)",
    "task_vectors, kind, a: float = 0.5, weight: sdjax.PerExpert = 0.3",
    head=HEAD + "import sdjax\n",
)
TREE = (
    HEAD
    + "def merge_trees(task_vectors, a: float = 0.9):\n"
    + "    return jax.tree.map(lambda x, y: a * x + y, *list(task_vectors.values())[:2])\n"
)


@pytest.mark.parametrize(("source", "count"), [(TENSOR, 3), (TREE, 1)])
def test_tuning_compiles_what_the_trial_has_compiled(signature, monkeypatch, source, count):
    program = verify_ir(trace_trusted(source, signature), signature)
    tensors = tuple(
        TrialTensor(path=path, shape=t.shape, base="bfloat16", experts=("bfloat16",) * 3)
        for path, t in signature.paths
    )
    trial = MergeTrial(memory=1 << 40, tensors=tensors, compiler="quick", computes="gradient")
    rng = np.random.default_rng(0)
    models = [
        {path: jnp.asarray(rng.standard_normal(t.shape), "bfloat16") for path, t in signature.paths}
        for _ in range(4)
    ]
    texts = []
    compile_all = CompileCache._compile

    def recorded(cache, lowered):
        texts.extend((cache.quick, one.as_text()) for one in lowered)
        return compile_all(cache, lowered)

    monkeypatch.setattr(CompileCache, "_compile", recorded)
    try_merge(program, trial, signature)
    tried, texts = texts, []
    merger = sdjax.Merger(
        unflatten(models[0]),
        list(map(unflatten, models[1:])),
        slots=signature.slots,
        compile_cache=CompileCache(quick=True),
    )
    algorithm = dataclasses.replace(to_algorithm(program, name="other"), identity="other")
    cotangents = {path: jnp.ones(x.shape) for path, x in flatten(models[0]).items()}
    hyperparameter_gradient(merger, algorithm, cotangents, key=jax.random.key(0))
    assert len(texts) == count
    assert set(texts) == set(tried)
