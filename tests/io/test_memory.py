"""Peak memory of loading a model on two processes with half of it each."""

import textwrap

import jax
import numpy as np
import pytest

from sdjax.io.hf_checkpoint import write_model
from sdjax.models.config import ModelConfig
from sdjax.models.params import abstract_params

BOUND = 1.2  # of the bytes that the process keeps

CODE = """
    import gc, sys
    from sdjax.sharding.multihost import start_distributed
    assert start_distributed()
    import jax
    from sdjax.io.hf_checkpoint import load_model
    from sdjax.sharding.mesh import make_mesh

    def kilobytes(field):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    load_model(sys.argv[1], paths=["final_norm", "layers/0/attn/k_proj"], mesh=mesh)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    _, params = load_model(sys.argv[1], mesh=mesh)
    peak = (kilobytes("VmHWM") - before) * 1024
    kept = sum(shard.data.nbytes for leaf in jax.tree.leaves(params)
               for shard in leaf.addressable_shards)
    print("MEMORY", peak, kept)
"""


@pytest.mark.slow
def test_peak_memory_is_close_to_size_of_shards(tmp_path, two_processes):
    """Check that the peak stays below the size of the file."""
    config = ModelConfig(
        family="llama",
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=4,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=64,
    )
    params = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0.5), leaf.shape),
        abstract_params(config, np.float32),
    )
    write_model(tmp_path / "model", config, params)
    size = (tmp_path / "model/model.safetensors").stat().st_size
    code = tmp_path / "code.py"
    code.write_text(textwrap.dedent(CODE))
    for process in two_processes(code, tmp_path / "model"):
        printed, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        line = next(line for line in printed.splitlines() if line.startswith("MEMORY"))
        peak, kept = (int(number) for number in line.split()[1:])
        print(f"peak {peak / kept:.3f} of the {kept / 2**20:.0f} MiB kept, file {size / 2**20:.0f}")
        assert kept < 0.55 * size
        assert size > BOUND * kept
        assert peak <= BOUND * kept
