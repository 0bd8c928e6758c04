"""Modules that candidates may import, and their members that candidates may use.

Workers import all of them before the first fork, since a confined process reads no files.
"""

import collections
import collections.abc
import copy
import dataclasses
import enum
import functools
import numbers
import operator
import typing

import einops


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The algorithm API and the operations that the shipped methods are written with. None of these
# modules reaches files, weights, the registry or the engine (an import contract).
SDJAX_MEMBERS = {
    "sdjax": _words("PerExpert"),
    "sdjax.merging.algorithm": _words("PerExpert TaskVectors Tensor"),
    "sdjax.merging.method": _words("RecipeSchema SUBSPACE_CAUTION"),
    "sdjax.merging.operations.adam": _words("adam"),
    "sdjax.merging.operations.geometry": _words(
        "forbid_gradient gram linear_combination nearest_orthonormal slerp_weights"
    ),
    "sdjax.merging.operations.mixing": _words(
        """ELECT_CHOICES RESCALE_CHOICES changed_elements elected_sum keep_and_rescale
        sign_agreement weighted_sum"""
    ),
    "sdjax.merging.operations.random": _words("bernoulli bits uniform"),
    "sdjax.merging.operations.ranks": _words("outranks rank_fraction"),
    "sdjax.merging.operations.sparsify": _words(
        "random_drop random_drop_by_rank trim trim_both_ends"
    ),
    "sdjax.merging.operations.topk_threshold": _words(
        "kth_largest_magnitudes largest_mask magnitude_band_masks topk_masks"
    ),
    "sdjax.xla.reductions": _words("count_true reproducible_sum sums"),
    "jaxtyping": _words("Array Bool Float Float32 Int Int32 Key UInt32"),
}
# Modules that have other modules as attributes, which do not belong to their API.
PUBLIC_MEMBERS = {
    module.__name__: frozenset(module.__all__)
    for module in (
        *(collections, collections.abc, copy, dataclasses, einops, enum, functools, numbers),
        *(operator, typing),
    )
}
IMPORTS = _words(
    """jax jax.numpy jax.numpy.fft jax.numpy.linalg jax.lax jax.lax.linalg jax.nn jax.random
    jax.scipy jax.scipy.linalg jax.scipy.special jax.scipy.stats jax.tree jax.tree_util jax.typing
    abc math itertools numpy numpy.linalg __future__"""
).union(PUBLIC_MEMBERS, SDJAX_MEMBERS)
# Module -> its members that may be used; of the other modules, all but those refused below.
MEMBERS = {
    # The other members access the host, the devices or the file system.
    "jax": _words(
        """numpy lax nn random scipy vmap jit grad value_and_grad jacfwd jacrev hessian jvp vjp tree
        tree_util checkpoint remat custom_jvp custom_vjp eval_shape Array ShapeDtypeStruct typing
        named_scope"""
    ),
    "jax.scipy": _words("linalg special stats"),
    "abc": _words("ABC ABCMeta abstractmethod"),
    **PUBLIC_MEMBERS,
    **SDJAX_MEMBERS,
}
NUMPY_MEMBERS_REFUSED = _words(
    """fromfile tofile load save savez savez_compressed memmap loadtxt savetxt genfromtxt fromregex
    DataSource ctypeslib ctypes random f2py testing lib core distutils open_memmap frombuffer
    show_config get_include source info lookfor"""
)
# What to write instead of a module or member that language models often use.
REPLACEMENTS = {
    "numpy.random": "use jax.random with the input `key`",
    "random": "use jax.random with the input `key`",
    "scipy": "use jax.scipy",
    "torch": "use jax.numpy",
    "jax.tree_map": "use jax.tree.map",
    "jax.tree_multimap": "use jax.tree.map",
}
_COMMON = "jax, numpy, math, functools, itertools, collections, dataclasses, typing, einops"


def member_allowed(module: str, name: str) -> bool:
    """Return whether a candidate may use a member of a module."""
    if name.startswith("_"):
        return False
    if module in MEMBERS:
        return name in MEMBERS[module]
    return module not in ("numpy", "jax.numpy") or name not in NUMPY_MEMBERS_REFUSED


def not_allowed(text: str, path: str) -> str:
    """Return the message on an import or a member, with what to use instead.

    Args:
        text: what the candidate wrote.
        path: the module or member, such as "numpy.random".
    """
    hint = REPLACEMENTS.get(path) or REPLACEMENTS.get(path.partition(".")[0])
    if hint is None and path.partition(".")[0] not in IMPORTS:
        hint = f"available: {_COMMON}"
    return f"`{text}` is not allowed{f'; {hint}' if hint else ''}"
