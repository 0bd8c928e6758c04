"""Starting several processes: settings, and two real processes on the CPU."""

import textwrap

import jax
import pytest

from sdjax.core.errors import UserError
from sdjax.sharding.multihost import is_main_process, start_distributed


def test_start_without_coordinator_does_nothing():
    assert start_distributed(environment={}) is False
    assert start_distributed(environment={"TPU_WORKER_HOSTNAMES": "localhost"}) is False
    assert not jax.distributed.is_initialized()
    assert is_main_process()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SDJAX_COORDINATOR": "a:1"}, "SDJAX_PROCESS_COUNT=None: must be set to a whole"),
        (
            {"SDJAX_COORDINATOR": "a:1", "SDJAX_PROCESS_COUNT": "two"},
            "SDJAX_PROCESS_COUNT='two': must be set to a whole",
        ),
        (
            {"SDJAX_COORDINATOR": "a:1", "SDJAX_PROCESS_COUNT": "2"},
            "SDJAX_PROCESS_ID=None: must be set to a whole",
        ),
        (
            {"SDJAX_COORDINATOR": "a:1", "SDJAX_PROCESS_COUNT": "2", "SDJAX_PROCESS_ID": "2"},
            "SDJAX_PROCESS_ID=2: must be from 0 to",
        ),
        (
            {"SDJAX_COORDINATOR": "a", "SDJAX_PROCESS_COUNT": "2", "SDJAX_PROCESS_ID": "0"},
            "SDJAX_COORDINATOR='a': give host:port",
        ),
    ],
)
def test_invalid_settings_raise_user_error(environment, message):
    with pytest.raises(UserError, match=message):
        start_distributed(environment=environment)
    assert not jax.distributed.is_initialized()


@pytest.mark.slow
def test_two_processes_load_compute_and_write(tmp_path, two_processes):
    """Check that each process reads only its shards and results equal those of one process."""
    code = """
        import sys
        from sdjax.sharding.multihost import is_main_process, start_distributed
        assert start_distributed()
        import jax, jax.numpy as jnp, numpy as np
        from jax.experimental import multihost_utils
        from sdjax.io.hf_checkpoint import load_model, write_model
        from sdjax.models.transformer import forward, unembed
        from sdjax.models.tree import flatten
        from sdjax.sharding.mesh import make_mesh

        assert (jax.process_count(), jax.device_count()) == (2, 4)
        assert is_main_process() == (jax.process_index() == 0)
        folder = sys.argv[1]
        mesh = make_mesh({"fsdp": 2, "tensor": 2})
        config, params = load_model(folder, mesh=mesh)
        up = flatten(params)["layers/0/mlp/up_proj"]
        assert not up.is_fully_addressable and len(up.addressable_shards) == 2
        tokens = jnp.arange(18).reshape(2, 9)
        positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

        @jax.jit
        def logits(params):
            hidden, _ = forward(params, None, tokens, config=config, positions=positions)
            return unembed(params, hidden, config=config)
        found = multihost_utils.process_allgather(logits(params), tiled=True)
        _, alone = load_model(folder)
        np.testing.assert_allclose(found, jax.jit(logits)(alone), atol=2e-6)
        write_model(folder + "-again", config, params)
        first, second = (open(f"{f}/model.safetensors", "rb").read()
                         for f in (folder, folder + "-again"))
        assert first == second
    """
    from sdjax.io.hf_checkpoint import write_model
    from sdjax.models.params import init_params
    from sdjax.testing import tiny_config

    config = tiny_config()
    params = init_params(config, jax.random.key(0), jax.numpy.float32)
    write_model(tmp_path / "model", config, params)
    processes = two_processes("-c", textwrap.dedent(code), tmp_path / "model")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
