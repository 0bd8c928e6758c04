"""Meshes, and a model on eight simulated devices."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest

from sdjax.core.errors import UserError
from sdjax.sharding.config import MeshConfig
from sdjax.sharding.mesh import make_mesh


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 1}, "unknown axis 'model'; the axes are data, fsdp, tensor"),
        ({}, "no axis given"),
        ({"data": 3, "tensor": -1}, "does not match 1 device;"),
        ({"data": -1, "tensor": -1}, "one of them may be -1"),
        ({"data": 0}, "every size must be 1 or more"),
        ({"tensor": 7}, "does not match 1 device;"),
    ],
)
def test_invalid_sizes_raise_user_error(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, devices=jax.devices()[:1])


def test_one_device():
    mesh = make_mesh({"tensor": 1, "data": -1}, devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "tensor": 1}


def test_model_on_eight_devices(tmp_path):
    """Run in a subprocess, since the number of host devices is fixed when JAX starts.

    Each device reads only its own shards, once; the logits are identical to those on one device.
    """
    code = """
        import sys
        from functools import partial
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType
        from sdjax.io import hf_checkpoint
        from sdjax.io.safetensors_reader import SafetensorsReader
        from sdjax.models.config import ModelConfig
        from sdjax.testing import tiny_config
        from sdjax.models.params import init_params, param_specs
        from sdjax.models.transformer import forward, unembed
        from sdjax.models.tree import flatten, unflatten
        from sdjax.sharding.config import MeshConfig
        from sdjax.sharding.mesh import make_mesh
        from sdjax.sharding.rules import shardings

        assert dict(make_mesh().shape) == {"tensor": 8}
        mesh = make_mesh({"tensor": 2, "data": 2, "fsdp": -1})
        assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}, mesh
        assert mesh.axis_types == (AxisType.Auto,) * 3

        config = tiny_config()
        folder = sys.argv[1]
        params = init_params(config, jax.random.key(0), jnp.float32)
        hf_checkpoint.write_model(folder, config, params)

        reads = []
        original = SafetensorsReader.read_box
        def counted(self, name, box):
            part = original(self, name, box)
            reads.append((name, part.size))
            return part
        SafetensorsReader.read_box = counted
        _, sharded = hf_checkpoint.load_model(folder, mesh=mesh)
        sizes = [size for name, size in reads if name == "model.layers.0.mlp.up_proj.weight"]
        assert sizes == [12 * 8] * 4, sizes
        up = flatten(sharded)["layers/0/mlp/up_proj"]
        assert len(up.addressable_shards) == 8 and up.addressable_shards[0].data.shape == (12, 8)

        _, plain = hf_checkpoint.load_model(folder)
        for path, leaf in flatten(plain).items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(sharded)[path]))
        fused = ModelConfig(**{**vars(config), "family": "phi3"})
        fused_params = init_params(fused, jax.random.key(0), jnp.float32)
        placed = jax.device_put(fused_params, shardings(unflatten(param_specs(fused)), mesh))
        gate_up = placed["layers"]["0"]["mlp"]["gate_up_proj"]
        assert gate_up.addressable_shards[0].data.shape == (24, 8)
        tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 64)
        positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)

        @partial(jax.jit, static_argnames="config")
        def logits(params, config):
            hidden, _ = forward(params, None, tokens, config=config, positions=positions)
            return unembed(params, hidden, config=config)
        np.testing.assert_allclose(logits(sharded, config), logits(plain, config), atol=2e-6)
        np.testing.assert_allclose(
            logits(placed, fused), logits(fused_params, fused), atol=2e-6)
        hf_checkpoint.write_model(folder + "-again", config, sharded)
        first, second = (open(f"{f}/model.safetensors", "rb").read()
                         for f in (folder, folder + "-again"))
        assert first == second
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_config_fills_axes_without_a_size():
    assert MeshConfig().make(default_axis="tensor") is None
    with pytest.raises(UserError, match="data=1, fsdp=8, tensor=-1 does not match 1 device;"):
        MeshConfig(fsdp=8).make(default_axis="tensor")
    with pytest.raises(UserError, match="data=2, fsdp=-1, tensor=1 does not match 1 device;"):
        MeshConfig(data=2).make(default_axis="fsdp")
    with pytest.raises(UserError, match="data=-1, fsdp=2, tensor=1 does not match 1 device;"):
        MeshConfig(data=-1, fsdp=2).make(default_axis="tensor")
