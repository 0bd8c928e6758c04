import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.models.fingerprint import fingerprint


def tree(dtype=np.float32) -> dict:
    values = np.arange(24, dtype=np.float32).reshape(4, 6) / 7
    return {"layers": {"0": {"down_proj": jnp.asarray(values.astype(dtype))}}}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[2, 3].add(1e-6),
        lambda x: x.at[0, 0].set(-0.0),
        lambda x: x[::-1],
        lambda x: x.at[0, 1].set(x[0, 2]).at[0, 2].set(x[0, 1]),
        lambda x: x.reshape(6, 4),
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jax.lax.bitcast_convert_type(x, jnp.int32),
    ],
    ids=["value", "sign of zero", "rows", "swap", "shape", "dtype", "same bits as integers"],
)
def test_every_change_changes_the_fingerprint(change):
    params = tree()
    changed = jax.tree.map(change, params)
    assert fingerprint(changed) != fingerprint(params)
    assert fingerprint(jax.tree.map(jnp.copy, params)) == fingerprint(params)


def test_path_is_part_of_the_fingerprint():
    params = tree()
    assert fingerprint({"layers": {"1": params["layers"]["0"]}}) != fingerprint(params)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.int32, np.bool_]
)
def test_dtypes(dtype):
    params = tree(dtype)
    changed = jax.tree.map(lambda x: x.at[3, 5].set(x[0, 0]), params)
    assert fingerprint(params) == fingerprint(tree(dtype))
    assert fingerprint(params) != fingerprint(changed)


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_both_halves_of_eight_bytes_count(dtype):
    with jax.enable_x64(True):
        halves = [2**40, 1]
        params = {"a": jnp.asarray(np.array([3, 5 + 2**41], np.int64).view(dtype))}
        for half in halves:
            bits = np.array([3, 5 + 2**41 + half], np.int64)
            assert fingerprint({"a": jnp.asarray(bits.view(dtype))}) != fingerprint(params)
        swapped = np.array([3, 2 + (5 << 40)], np.int64)
        assert fingerprint({"a": jnp.asarray(swapped.view(dtype))}) != fingerprint(params)


def test_scalars_and_empty_tensors():
    assert fingerprint({"a": jnp.float32(1)}) != fingerprint({"a": jnp.float32(2)})
    assert fingerprint({"a": jnp.zeros((0, 3))}) != fingerprint({"a": jnp.zeros((0, 4))})


def test_fingerprint_is_the_same_on_any_mesh():
    params = tree()
    for size in [size for size in (1, 2) if size**2 <= jax.device_count()]:
        devices = np.array(jax.devices()[: size**2]).reshape(size, size)
        mesh = Mesh(devices, ("data", "tensor"))
        for spec in (PartitionSpec(), PartitionSpec("data", "tensor"), PartitionSpec(None, "data")):
            placed = jax.device_put(params, NamedSharding(mesh, spec))
            assert fingerprint(placed) == fingerprint(params)
