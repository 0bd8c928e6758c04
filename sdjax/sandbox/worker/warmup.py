"""What the server traces before the first fork, so that a child meets warm caches.

The sources touch the functions that merge algorithms are commonly written with, `rare` all other
primitives of the allow-list.
"""

import ast
import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.sandbox.ir.primitives import ALLOWED, KEY_DTYPE
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.worker.trace import trace_source

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
_WHOLE = jax.ShapeDtypeStruct((6, 4), jnp.int32)
_WORD = jax.ShapeDtypeStruct((6, 4), jnp.uint32)
_KEY = jax.ShapeDtypeStruct((), KEY_DTYPE)
RARE = (_X, _WHOLE, _WORD, _KEY)


def rare(x: Any, n: Any, w: Any, key: Any) -> list[Any]:
    """Every primitive of the allow-list that no source below touches."""
    square = x.T @ x
    z = lax.complex(x, x)
    smooth = """acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf
        erfc exp2 expm1 lgamma log rsqrt sin sinh tan"""
    updates = [getattr(x.at[n[:, 0]], how) for how in ("add", "subtract", "multiply", "min", "max")]
    ordered = [ALLOWED[name].bind(x, x) for name in ("eq_to", "lt_to", "le_to", "add_any")]
    return [
        *(getattr(lax, name)(x) for name in smooth.split()),
        *(f(x, 0) for f in (lax.cumlogsumexp, lax.cummax, lax.cummin, lax.cumprod)),
        *(update(1.0) for update in updates),
        *ordered,
        *(lax.atan2(x, x), lax.nextafter(x, x), lax.rem(x, x), x <= 0, jnp.min(x), jnp.argmin(x)),
        *(~n, n & n, n ^ n, n << 1, n >> 1, lax.clz(n), lax.population_count(n)),
        *(jnp.all(x > 0), lax.reduce_xor(n, (0,)), lax.reduce_precision(x, 8, 7)),
        *(lax.conj(z), lax.imag(z), lax.real(z), jnp.fft.fft(x)),
        *(jnp.linalg.cholesky(square), *jnp.linalg.eigh(square), *jnp.linalg.qr(x)),
        *(*lax.linalg.lu(square), jnp.linalg.solve(square, x.T)),
        *(jnp.concatenate([x, x]), jnp.pad(x, 1), x[::-1], *jnp.split(x, 2), jnp.tile(x, (2, 1))),
        lax.dynamic_update_slice(x, x[:2], (n[0, 0], 0)),
        lax.cond(n[0, 0] > 0, lambda: x, lambda: -x),
        lax.while_loop(lambda v: v < 3, lambda v: v + 1, n[0, 0]),
        jax.random.fold_in(jax.random.split(key)[0], 1),
        *(jax.random.PRNGKey(0), jax.random.key_data(key), jax.random.key(0)),
        *(jax.random.wrap_key_data(w[0, :2], impl="threefry2x32"),),
        *ALLOWED["threefry2x32"].bind(w[0], w[1], w[2], w[3]),
    ]


def warm_up(signature: MergeSignature) -> None:
    """Trace all of it, whatever the contract allows to a program."""
    limits = dataclasses.replace(signature.limits, equations=2**31)
    signature = dataclasses.replace(signature, limits=limits)
    for source in SOURCES:
        trace_source(source, signature)
    jax.make_jaxpr(rare)(*RARE)
    _provoke_errors()


def _provoke_errors() -> None:
    """Raise the errors that programs commonly raise, so that their reports are loaded as well."""
    ast.parse("ｘ = 'é'")  # names beyond ASCII are normalised by a module of its own
    for mistake in (
        lambda x, key: x if x[0, 0] > 0 else -x,
        lambda x, key: float(x[0, 0]),
        lambda x, key: x @ x,
        lambda x, key: x[x > 0],
        lambda x, key: x + jnp.ones((3, 3)),
        lambda x, key: x.nothing,
    ):
        with contextlib.suppress(Exception):
            jax.make_jaxpr(mistake)(_X, _KEY)
