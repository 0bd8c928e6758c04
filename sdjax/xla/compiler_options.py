"""XLA compile options for the CPU backend, limited to those that the installed XLA supports.

XLA drops options between releases and refuses to compile with an unknown one, so options are
tried once on a trivial function before they are used.
"""

import functools
import math
import re
from collections.abc import Mapping

import jax

CompilerOptions = dict[str, str | bool]

# Compile with less work; the executable is as fast, except for large reductions and functions such
# as exp (see `compile_for_single_use`).
_LEAN: CompilerOptions = {
    # XLA's fusion emitters double the time to compile. The XLA of JAX 0.12 has no alternative.
    "xla_cpu_use_fusion_emitters": False,
    # Splitting LLVM's work across threads costs more CPU time, and sdjax compiles several
    # executables at a time anyway.
    "xla_cpu_parallel_codegen_split_count": "1",
}
# For executables that run only a few times: two to three times slower.
_QUICK: CompilerOptions = _LEAN | {"xla_backend_optimization_level": "0"}

# Number of elements above which splitting an operation across the cores pays off.
LARGE = 2**22

# StableHLO operations that only the fusion emitters split across the cores, or compute faster.
_REDUCTIONS = re.compile(r"stablehlo\.(reduce|while|sort|gather|dot_general)\b")
_TRANSCENDENTALS = re.compile(
    r"(stablehlo|chlo)\.(exp|log|sin|cos|tan|tanh|pow|atan|a?sinh?|a?cosh?|erf)\w* .*tensor<\d+x\d"
)


def lean_options() -> CompilerOptions:
    """Return options that compile faster and yield an executable of about the same speed."""
    return _supported(_LEAN)


def quick_options() -> CompilerOptions:
    """Return options that compile fastest, for executables that run only a few times."""
    return _supported(_QUICK)


def compile_for_single_use(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile an executable that runs only a few times, as in a merge from disk.

    XLA's fusion emitters for the CPU double the compile time. With them every operation is split
    across the cores, not only elementwise ones, and functions such as exp are faster. They are
    therefore used only for large reductions and for such functions. Results equal those of the
    default options up to the last bit of float32.
    """
    text, shapes = lowered.as_text(), [x.shape for x in jax.tree.leaves(lowered.args_info)]
    large = max(map(math.prod, shapes), default=0) >= LARGE
    emitters = (large and _REDUCTIONS.search(text)) or _TRANSCENDENTALS.search(text)
    lean = jax.default_backend() == "cpu" and not emitters
    return lowered.compile(compiler_options=lean_options() if lean else None)


def _supported(options: Mapping[str, str | bool]) -> CompilerOptions:
    names = tuple(options.items())
    if _is_supported(names):  # one trial for all of them, which succeeds on most versions
        return dict(options)
    return {name: value for name, value in names if _is_supported(((name, value),))}


@functools.cache
def _is_supported(options: tuple[tuple[str, str | bool], ...]) -> bool:
    """Return whether the CPU compiler accepts these options; a trial takes about 20 ms."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0).lower().compile(compiler_options=dict(options))
    except RuntimeError:  # "No such compile option", or a process without a CPU backend
        return False
    return True
