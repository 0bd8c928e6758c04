"""Functions that the server traces before the first fork, so that workers start with warm caches.

SOURCES use the functions that merge algorithms are commonly written with; `rare_functions` use all
other primitives of the allow-list.
"""

import ast
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.sandbox.ir.parameters import KEY_DTYPE
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.worker.trace import trace_source
from sdjax.xla.reductions import sums

_TIES = """
import jax
import jax.numpy as jnp

def merge_models(task_vectors, key, base, depth, kind, scale: float = 0.5):
    stacked = jnp.stack(list(task_vectors.values()))
    kept = []
    for tau in task_vectors.values():
        threshold = jnp.quantile(jnp.abs(tau), 0.8)
        kept.append(jnp.where(jnp.abs(tau) >= threshold, tau, 0.0))
    trimmed = jnp.stack(kept)
    sign = jnp.sign(jnp.sum(trimmed, axis=0))
    agree = jnp.where(jnp.sign(trimmed) == sign, trimmed, 0.0)
    merged = jnp.sum(agree, axis=0) / jnp.maximum(jnp.sum(agree != 0, axis=0), 1)
    mask = jax.random.bernoulli(key, 0.5, merged.shape)
    noise = jax.random.normal(key, merged.shape) + jax.random.uniform(key, merged.shape)
    merged = jnp.where(mask, merged / 0.5, 0.0) + 0.0 * noise
    median = jnp.median(stacked, axis=0) + jnp.mean(stacked, axis=0) - jnp.std(stacked)
    norm = jnp.linalg.norm(merged) + jnp.sqrt(jnp.sum(jnp.square(base)) + 1e-8)
    weights = jax.nn.softmax(jnp.stack([jnp.linalg.norm(tau) for tau in kept]))
    merged = merged + jnp.tensordot(weights, stacked, axes=1) / norm + median
    merged = merged + jnp.einsum("i,i...->...", weights, stacked)
    merged = jnp.clip(merged, -1.0, 1.0) * jnp.maximum(scale, 0.1) * jnp.minimum(depth, 1.0)
    merged = merged + jax.nn.sigmoid(merged) * jnp.tanh(merged) + jnp.exp(-jnp.abs(merged))
    merged = merged + jax.nn.relu(merged) - jnp.power(jnp.abs(merged), 0.5) + jnp.log1p(merged ** 2)
    flat = merged.ravel()
    ranks = jnp.argsort(jnp.argsort(flat)).reshape(merged.shape) / flat.size
    merged = merged * ranks + jnp.cumsum(flat).reshape(merged.shape) + jnp.zeros_like(merged)
    top = jax.lax.top_k(flat, 2)[0][-1] + jnp.sort(flat)[-1] + flat[jnp.argmax(flat)]
    rows = jnp.max(merged, axis=-1, keepdims=True) + jnp.var(merged, axis=-1, keepdims=True)
    cosine = jnp.vdot(kept[0], kept[-1]) + jnp.sum(kept[0] * kept[-1])
    merged = jnp.where(jnp.isfinite(merged), merged, 0.0) + top + rows + cosine
    merged = jnp.nan_to_num(merged) * jnp.round(jnp.float32(0.3) + jnp.floor(depth))
    merged = jax.lax.fori_loop(0, 3, lambda i, x: 0.5 * (x + merged), merged)
    return merged + jnp.prod(jnp.array([0.1, 0.2])) + jnp.ones_like(merged)
"""
_LINEAR = """
import jax
import jax.numpy as jnp

def merge_models(task_vectors):
    total = sum(task_vectors.values()) / len(task_vectors)
    if total.ndim != 2:
        return total
    u, s, vt = jnp.linalg.svd(total, full_matrices=False)
    gram = total @ total.T
    low = (u * jnp.where(s > jnp.median(s), s, 0.0)) @ vt
    return low + 0.0 * jnp.trace(gram) + jnp.dot(total, total.T @ total)
"""
_DICT = """
import jax
import jax.numpy as jnp

def merge_models(task_vectors):
    merged = jnp.zeros_like(task_vectors[sorted(task_vectors)[0]])
    for name, tau in task_vectors.items():
        merged += 0.3 * tau
    merged = merged.at[0].set(0.0)
    return jax.tree.map(lambda x: x * 1.0, merged)
"""
SOURCES = (_TIES, _LINEAR, _DICT)


_X = jax.ShapeDtypeStruct((6, 4), jnp.float32)
_N = jax.ShapeDtypeStruct((6, 4), jnp.int32)
_W = jax.ShapeDtypeStruct((6, 4), jnp.uint32)
_KEY = jax.ShapeDtypeStruct((), KEY_DTYPE)
RARE_ARGUMENTS = (_X, _N, _W, _KEY)


def _gram(x: jax.Array) -> jax.Array:
    return x.T @ x


def rare_functions() -> dict[str, Callable[..., Any]]:
    """Return functions of RARE_ARGUMENTS that use every primitive absent from SOURCES, by name."""
    unary = """acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf
        erfc exp2 expm1 lgamma log rsqrt sin sinh tan""".split()  # noqa: SIM905
    cumulative = ("cumlogsumexp", "cummax", "cummin", "cumprod")
    updates = ("add", "subtract", "multiply", "min", "max")
    return {
        **{name: lambda x, n, w, key, f=name: getattr(lax, f)(x) for name in unary},
        **{name: lambda x, n, w, key, f=name: getattr(lax, f)(x, 0) for name in cumulative},
        **{
            f"at {name}": lambda x, n, w, key, f=name: getattr(x.at[n[:, 0]], f)(1.0)
            for name in updates
        },
        **{
            name: lambda x, n, w, key, f=name: ALLOWED[f].bind(x, x)  # type: ignore[misc]
            for name in ("eq_to", "lt_to", "le_to", "add_any", "polynomial")
        },
        **{
            name: lambda x, n, w, key, f=name: ALLOWED[f].bind(x)  # type: ignore[misc]
            for name in ("log2", "one_minus_square")
        },
        "binary": lambda x, n, w, key: [lax.atan2(x, x), lax.nextafter(x, x), lax.rem(x, x)],
        "comparison": lambda x, n, w, key: [x <= 0, jnp.min(x), jnp.argmin(x)],
        "integers": lambda x, n, w, key: [~n, n & n, n ^ n, n << 1, n >> 1],
        "bits": lambda x, n, w, key: [lax.clz(n), lax.population_count(n)],
        "reductions": lambda x, n, w, key: [jnp.all(x > 0), lax.reduce_xor(n, (0,)), sums([x, x])],
        "precision": lambda x, n, w, key: lax.reduce_precision(x, 8, 7),
        "complex": lambda x, n, w, key: [
            f(lax.complex(x, x)) for f in (lax.conj, lax.imag, lax.real)
        ],
        "fft": lambda x, n, w, key: jnp.fft.fft(x),
        "cholesky": lambda x, n, w, key: jnp.linalg.cholesky(_gram(x)),
        "eigh": lambda x, n, w, key: jnp.linalg.eigh(_gram(x)),
        "qr": lambda x, n, w, key: jnp.linalg.qr(x),
        "lu": lambda x, n, w, key: lax.linalg.lu(_gram(x)),
        "solve": lambda x, n, w, key: jnp.linalg.solve(_gram(x), x.T),
        "shapes": lambda x, n, w, key: [jnp.concatenate([x, x]), jnp.pad(x, 1), x[::-1]],
        "parts": lambda x, n, w, key: [*jnp.split(x, 2), jnp.tile(x, (2, 1)), *x],
        "dynamic slice": lambda x, n, w, key: lax.dynamic_update_slice(x, x[:2], (n[0, 0], 0)),
        "cond": lambda x, n, w, key: lax.cond(n[0, 0] > 0, lambda: x, lambda: -x),
        "while": lambda x, n, w, key: lax.while_loop(lambda v: v < 3, lambda v: v + 1, n[0, 0]),
        "split key": lambda x, n, w, key: jax.random.fold_in(jax.random.split(key)[0], 1),
        "keys": lambda x, n, w, key: [jax.random.PRNGKey(0), jax.random.key(0)],
        "key data": lambda x, n, w, key: jax.random.key_data(key),
        "wrap key": lambda x, n, w, key: jax.random.wrap_key_data(w[0, :2], impl="threefry2x32"),
        "threefry": lambda x, n, w, key: ALLOWED["threefry2x32"].bind(w[0], w[1], w[2], w[3]),  # type: ignore[misc]
    }


def warm_up(signature: MergeSignature) -> None:
    """Trace all sources and functions, without the equation limit of candidates.

    If JAX lacks or changes a primitive, only that part of the caches stays cold.
    """
    limits = dataclasses.replace(signature.limits, equations=2**31)
    signature = dataclasses.replace(signature, limits=limits, parameters=())
    for source in SOURCES:
        with contextlib.suppress(Refusal):
            trace_source(source, signature)
    for function in rare_functions().values():
        with contextlib.suppress(Exception):  # a different JAX version may raise anything
            jax.make_jaxpr(function)(*RARE_ARGUMENTS)
    _provoke_errors()


def _provoke_errors() -> None:
    """Raise the errors that candidates commonly raise, so that their reports are cached too."""
    ast.parse("ｘ = 'é'")  # Python imports a module to normalize names that are not ASCII
    for erroneous in (
        lambda x, key: x if x[0, 0] > 0 else -x,
        lambda x, key: float(x[0, 0]),
        lambda x, key: x @ x,
        lambda x, key: x[x > 0],
        lambda x, key: x + jnp.ones((3, 3)),
        lambda x, key: x.nothing,
    ):
        with contextlib.suppress(Exception):
            jax.make_jaxpr(erroneous)(_X, _KEY)
