"""Shared test setup: CPU only, no network, and little optimization for faster compilation."""

import logging
import os
import socket
import subprocess
import sys
import types

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

# Shapes and dtypes in the signatures of these packages are checked while the tests run.
# In sdjax.merging only some modules are: a method's `float` hyperparameters arrive as arrays, and
# `engine.merge` reports wrong arguments as user errors itself.
TYPE_CHECKED: tuple[str, ...] = (
    "sdjax.models",
    "sdjax.decoding",
    "sdjax.training",
    "sdjax.merging.operations.adam",
    "sdjax.merging.operations.geometry",
    "sdjax.merging.operations.mixing",
    "sdjax.merging.operations.sparsify",
    "sdjax.merging.operations.random",
    "sdjax.merging.operations.ranks",
    "sdjax.merging.recipe.tokenizer_plan",
    "sdjax.merging.model_tree",
    "sdjax.merging.signature",
    "sdjax.xla.matmul",
    "sdjax.xla.reductions",
    "sdjax.merging.tensor_program",
    "sdjax.merging.operations.topk_threshold",
)
# An int is accepted as a float, as in PEP 484; the hook needs the name of an importable function.
typechecker = types.ModuleType("sdjax_typechecker")
typechecker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[typechecker.__name__] = typechecker
install_import_hook(TYPE_CHECKED, "sdjax_typechecker.check")


@pytest.fixture(autouse=True)
def restore_logging():
    """Undo what a command or a worker's job configured in this process."""
    yield
    logging.disable(logging.NOTSET)
    logger = logging.getLogger("sdjax")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def two_processes():
    """Return a function that starts Python twice, as two processes with two devices each."""
    started = []

    def start(*arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
            "SDJAX_COORDINATOR": f"127.0.0.1:{port}",
            "SDJAX_PROCESS_COUNT": "2",
        }
        pair = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={**environment, "SDJAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        started.extend(pair)
        return pair

    yield start
    for process in started:
        process.kill()
        process.communicate()
