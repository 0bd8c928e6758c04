"""XLA compile options for the CPU backend, limited to those that the installed XLA supports.

XLA drops options between releases and refuses to compile with an unknown one, so each option is
tried once on a trivial function before it is used.
"""

import functools
from collections.abc import Mapping

import jax

CompilerOptions = dict[str, str | bool]

# Compile with less work; the executable is as fast, except for large reductions and functions such
# as exp (see `merging.compile_cache.compile_for_single_use`).
_LEAN: CompilerOptions = {
    # XLA's fusion emitters double the time to compile. The XLA of JAX 0.12 has no alternative.
    "xla_cpu_use_fusion_emitters": False,
    # Splitting LLVM's work across threads costs more CPU time, and sdjax compiles several
    # executables at a time anyway.
    "xla_cpu_parallel_codegen_split_count": "1",
}
# For executables that run only a few times: two to three times slower.
_QUICK: CompilerOptions = _LEAN | {"xla_backend_optimization_level": "0"}


def lean_options() -> CompilerOptions:
    """Return options that compile faster and yield an executable of about the same speed."""
    return _supported(_LEAN)


def quick_options() -> CompilerOptions:
    """Return options that compile fastest, for executables that run only a few times."""
    return _supported(_QUICK)


def _supported(options: Mapping[str, str | bool]) -> CompilerOptions:
    return {name: value for name, value in options.items() if _is_supported(name, value)}


@functools.cache
def _is_supported(name: str, value: str | bool) -> bool:
    """Return whether the CPU compiler accepts an option; this takes about 20 ms per option."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except RuntimeError:  # "No such compile option", or a process without a CPU backend
        return False
    return True
