"""Sharding rules."""

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sdjax.models.params import param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.sharding.rules import batch_sharding, sharding_of, shardings
from sdjax.testing import tiny_config


def mesh(**sizes) -> AbstractMesh:
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


@pytest.mark.parametrize(
    ("shape", "axes", "sizes", "expected"),
    [
        ((64, 32), ("intermediate", "hidden"), {"fsdp": 2, "tensor": 4}, ("tensor", "fsdp")),
        ((32, 64), ("hidden", "intermediate"), {"fsdp": 2, "tensor": 4}, ("fsdp", "tensor")),
        ((66, 32), ("intermediate", "hidden"), {"fsdp": 2, "tensor": 4}, (None, "fsdp")),
        ((64, 32), ("intermediate", "hidden"), {"tensor": 8}, ("tensor", None)),
        ((64, 32), ("intermediate", "hidden"), {"data": 8}, (None, None)),
        ((64, 64), ("intermediate", "heads"), {"tensor": 4}, ("tensor", None)),
        ((64, 32), ("unknown", "hidden"), {"fsdp": 2, "tensor": 4}, (None, "fsdp")),
        ((64,), ("hidden",), {"fsdp": 2}, ()),
    ],
)
def test_dimension_is_split_if_divisible(shape, axes, sizes, expected):
    assert sharding_of(shape, axes, mesh(**sizes)).spec == PartitionSpec(*expected)


def test_custom_rules():
    found = sharding_of(
        (8, 8), ("intermediate", "hidden"), mesh(tensor=4), rules={"hidden": "tensor"}
    )
    assert found.spec == PartitionSpec(None, "tensor")


def test_shape_and_axes_of_different_length_raise_value_error():
    with pytest.raises(ValueError, match="zip"):
        sharding_of((8, 8), ("mlp",), mesh(tensor=4))


def test_shardings_of_model_parameters():
    config = tiny_config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_kv_heads=1,
        head_dim=2,
        max_seq_len=16,
    )
    found = flatten(shardings(unflatten(param_specs(config)), mesh(fsdp=2, tensor=4)))
    assert found.keys() == param_specs(config).keys()
    expected = {
        "embed": (None, "fsdp"),  # 50 tokens are not divisible by 4
        "layers/1/attn/q_proj": ("tensor", "fsdp"),
        "layers/1/attn/k_proj": (None, "fsdp"),  # 1 head of size 2
        "layers/1/attn/o_proj": ("fsdp", "tensor"),
        "layers/1/mlp/down_proj": ("fsdp", "tensor"),
        "final_norm": (),
    }
    for path, spec in expected.items():
        assert found[path].spec == PartitionSpec(*spec), path


def test_batch_sharding():
    assert batch_sharding(mesh(data=2, tensor=2), 6).spec == PartitionSpec("data")
    assert batch_sharding(mesh(data=4), 6).spec == PartitionSpec()
    assert batch_sharding(mesh(tensor=2), 6).spec == PartitionSpec()
