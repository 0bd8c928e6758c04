"""Job of the workers that compile: takes verified IR, probes it or tries a merge with it.

These are the first processes in which a program is compiled and run. XLA may crash, hang or take
all memory there. The code is sdjax's own, but a program may exploit XLA, so the parent treats the
replies as untrusted.
"""

import ctypes
import importlib
import json
import os
from collections.abc import Callable
from typing import Any

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature

# JAX imports these when it first lowers or runs a program, where no file can be read any more.
_LAZILY_IMPORTED = (
    "jax.experimental.multihost_utils",
    "jaxlib.mlir.dialects.builtin",
    "jaxlib.mlir.dialects.mhlo",
    "scipy.linalg",
)

MAX_CORES = 8
_M_ARENA_MAX = -8  # of malloc.h


def prepare(signature_json: str) -> Callable[[bytes], bytes]:
    """Import what a worker needs and return the function that it runs.

    Args:
        signature_json: result of `MergeSignature.to_json`.
    """
    os.environ["JAX_PLATFORMS"] = "none"  # a backend's threads would not survive a fork
    import jax

    from sdjax.sandbox.compiler import probe, trial

    del probe, trial  # warm for `_answer`
    jax.config.update("jax_platforms", "none")
    jax.config.update("jax_traceback_filtering", "off")
    for name in _LAZILY_IMPORTED:
        importlib.import_module(name)
    signature = MergeSignature.from_json(signature_json)
    return lambda request: json.dumps(_answer(request, signature)).encode()


def start() -> None:
    """Start the CPU backend, whose threads exist before the filter of system calls is applied."""
    os.environ["NPROC"] = "1"  # threads of XLA: other workers use the other cores
    _limit_address_space()
    import jax
    import jax.numpy as jnp

    from sdjax.xla.compiler_options import quick_options

    jax.config.update("jax_platforms", "cpu")
    # XLA looks up what the processor can do at the first product of more than a few elements.
    x = jnp.ones((64, 64))
    product = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x)
    jax.block_until_ready(product.compile(compiler_options=quick_options())(x))


def _limit_address_space() -> None:
    """Keep the address space that threads reserve independent of the number of cores.

    LLVM starts a thread per core that this process may use, and glibc reserves 64 MiB per thread
    that allocates.
    """
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid() % len(cores)  # different cores for different workers
    os.sched_setaffinity(0, (cores + cores)[first : first + MAX_CORES])
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _answer(request: bytes, signature: MergeSignature) -> dict[str, Any]:
    from sdjax.sandbox.compiler.probe import probe
    from sdjax.sandbox.compiler.trial import try_merge
    from sdjax.sandbox.merge_trial import MergeTrial
    from sdjax.sandbox.verify.verified_program import verify_ir

    fields = json.loads(request)
    try:
        program = verify_ir(fields["ir"], signature)
        if fields["trial"] is not None:
            try_merge(program, MergeTrial.from_json(fields["trial"]), signature)
            return {}
        findings = probe(program, signature)
        return {"fingerprint": findings.fingerprint, "notes": findings.notes}
    except Refusal as refusal:
        return {"verdict": refusal.verdict, "rule": refusal.rule, "message": refusal.message}
    except MemoryError:
        os._exit(1)  # earlier programs may have taken the memory; the next process tells
