"""Programs that the server traces before the first fork, so that a child meets warm caches.

Together they touch the functions that merge algorithms are commonly written with.
"""

import ast
import contextlib

import jax
import jax.numpy as jnp

from sdjax.sandbox.primitives import KEY_DTYPE

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


def provoke_errors() -> None:
    """Raise the errors that programs commonly raise, so that their reports are loaded as well."""
    ast.parse("ｘ = 'é'")  # names beyond ASCII are normalised by a module of its own
    x = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    key = jax.ShapeDtypeStruct((), KEY_DTYPE)
    for mistake in (
        lambda x, key: x if x[0, 0] > 0 else -x,
        lambda x, key: float(x[0, 0]),
        lambda x, key: x @ x,
        lambda x, key: x[x > 0],
        lambda x, key: x + jnp.ones((3, 3)),
        lambda x, key: x.nothing,
    ):
        with contextlib.suppress(Exception):
            jax.make_jaxpr(mistake)(x, key)
