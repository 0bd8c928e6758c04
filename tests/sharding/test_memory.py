"""Memory of devices, and executables that need more."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import sdjax
from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.sharding import memory
from sdjax.sharding.memory import (
    MemoryLimitExceeded,
    compiled_memory,
    exhaustion_reported,
    memory_of,
    require_fit,
)

SHAPE = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)


@pytest.fixture
def small_host(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 10_000_000)


def device(platform, process=0, stats=None):
    return SimpleNamespace(
        platform=platform, process_index=process, memory_stats=lambda: stats, id=0
    )


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([device("cpu")] * 8, 10_000_000),  # share the memory of the host
        ([device("cpu"), device("cpu", 1)], 20_000_000),
        ([device("tpu", stats={"bytes_limit": 16})] * 8, 128),
        ([device("tpu", n // 4, {"bytes_limit": 16}) for n in range(8)], 128),
        ([device("gpu", stats={})] * 2, 10_000_000),
    ],
)
def test_memory_of_devices(small_host, monkeypatch, devices, expected):
    monkeypatch.setattr(jax, "local_devices", lambda backend: devices[:1])
    assert memory_of(devices) == expected


def test_memory_of_an_executable(small_host):
    def compile_sum(count):
        return jax.jit(lambda *x: sum(x)).lower(*[SHAPE] * count).compile()

    assert compiled_memory(compile_sum(1)) == 8_000_000
    require_fit(compile_sum(1))
    assert compiled_memory(compile_sum(2)) == 12_000_000
    with pytest.raises(MemoryLimitExceeded) as error:
        require_fit(compile_sum(2))
    assert str(error.value) == (
        "the compiled merge needs 0.012 GB of memory at once, but the machine has 0.01 GB; merge "
        "fewer tensors or models, or use a machine with more memory"
    )


@pytest.mark.parametrize("form", ["merge_models", "merge_trees"])
def test_merge_that_does_not_fit_is_refused_before_it_runs(monkeypatch, form):
    def merge_models(task_vectors):
        return sum(task_vectors.values())

    def merge_trees(task_vectors):
        return task_vectors["expert_1"]

    function = {"merge_models": merge_models, "merge_trees": merge_trees}[form]
    base = {"a": jnp.zeros((300, 300)), "b": jnp.zeros((300, 300))}
    expert = {"a": jnp.ones((300, 300)), "b": jnp.ones((300, 300))}
    monkeypatch.setattr(memory, "host_memory", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"^the compiled merge needs 0\.00\d+ GB of memory at once"):
        sdjax.merge(base, [expert], Algorithm.from_function(function))
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 40)
    assert sdjax.merge(base, [expert], Algorithm.from_function(function)).finite


def test_exhaustion_is_reported():
    error = jax.errors.JaxRuntimeError
    with (
        pytest.raises(MemoryLimitExceeded, match="more memory than is free"),
        exhaustion_reported(),
    ):
        raise error("RESOURCE_EXHAUSTED: Out of memory allocating 15700000000 bytes.")
    with pytest.raises(error, match="INTERNAL"), exhaustion_reported():
        raise error("INTERNAL: other")


def test_executable_is_analyzed_once(monkeypatch):
    executable = jax.jit(lambda x: x + 1).lower(SHAPE).compile()
    calls = []
    analyze = type(executable).memory_analysis

    def counted(self):
        calls.append(self)
        return analyze(self)

    monkeypatch.setattr(type(executable), "memory_analysis", counted)
    assert compiled_memory(executable) == compiled_memory(executable) > 0
    assert calls == [executable]
