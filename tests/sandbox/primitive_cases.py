"""Functions that use every allowed primitive, with their arguments, by group."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as P

_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.standard_normal((6, 4)), jnp.float32)
Y = jnp.asarray(_rng.standard_normal((6, 4)), jnp.float32)
U = jnp.asarray(_rng.uniform(0.1, 0.9, (6, 4)), jnp.float32)
N = jnp.asarray(_rng.integers(-9, 9, (6, 4)), jnp.int32)
W = jnp.asarray(_rng.integers(0, 9, (6, 4)), jnp.uint32)
B = X > 0
KEY = jax.random.key(7)


def _each(names, *args):
    functions = [getattr(lax, name) for name in names.split()]
    return lambda *xs: [f(*xs) for f in functions], args


def _gram(x):
    return x.T @ x + jnp.eye(4)


# Group -> (function, arguments).
CASES = {
    "unary": _each(
        "neg sign floor ceil abs is_finite square exp exp2 expm1 sin cos tan tanh logistic cbrt"
        " asinh atan sinh cosh erf erfc lgamma digamma bessel_i0e bessel_i1e",
        X,
    ),
    "on (0, 1)": _each("log log1p sqrt rsqrt asin acos atanh erf_inv", U),
    "acosh": (lambda x: [lax.acosh(1 + x)], (U,)),
    "binary": _each("add sub mul div rem max min atan2 nextafter pow eq ne lt le gt ge", X, Y),
    "integers": _each(
        "bitwise_and bitwise_or bitwise_xor shift_left shift_right_logical shift_right_arithmetic",
        N,
        jnp.abs(N) % 8,
    ),
    "unary integers": _each("bitwise_not population_count clz", W),
    "total order": (lambda x, y: [p.bind(x, y) for p in (P.eq_to_p, P.lt_to_p, P.le_to_p)], (X, Y)),
    "ternary": (
        lambda x, y, b: [lax.clamp(-0.5, x, 0.5), jnp.where(b, x, y), lax.select_n(b, y, x)],
        (X, Y, B),
    ),
    "rounding": (
        lambda x: [
            lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
            lax.round(x),
            lax.integer_pow(x, 3),
            lax.integer_pow(x, -2),
            lax.reduce_precision(x, 8, 7),
        ],
        (X,),
    ),
    "types": (
        lambda x, n: (
            [x.astype(t) for t in (jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, bool)]
            + [n.astype(jnp.float32), lax.bitcast_convert_type(x, jnp.uint32)]
        ),
        (X, N),
    ),
    "complex": (
        lambda x, y: [
            jnp.abs(z := lax.complex(x, y)),
            lax.real(lax.conj(z)),
            lax.imag(z * z + (1 + 2j)),
        ],
        (X, Y),
    ),
    "shapes": (
        lambda x: [
            lax.broadcast_in_dim(x, (2, 6, 4), (1, 2)),
            x.reshape(3, 8),
            lax.iota(jnp.int32, 5),
            jnp.squeeze(x[:1]),
            x[::-1],
            x.T,
            jnp.concatenate([x, x], 1),
            jnp.pad(x, ((1, 2), (0, 1))),
            lax.pad(x, 0.0, ((-1, 0, 1), (0, 0, 0))),
            *jnp.split(x, [2, 3]),
            x[1:5:2],
            jnp.tile(x, (2, 1)),
            jnp.stack([x, x], 1),
        ],
        (X,),
    ),
    "positions": (
        lambda x, n: [
            lax.dynamic_slice(x, (n[0, 0], 1), (2, 2)),
            lax.dynamic_update_slice(x, x[:2], (n[0, 1], 0)),
            x[n[:, 0]],
            jnp.take(x, n[0], axis=0, mode="clip"),
            jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
            jnp.take(n, n[0], mode="fill", fill_value=7),
        ],
        (X, N),
    ),
    "updates": (
        lambda x, n: [
            x.at[n[:, 0]].set(1.0),
            x.at[n[:, 0]].add(x),
            x.at[n[:, 0]].subtract(x),
            x.at[1].multiply(2.0),
            x.at[n[:, 0]].min(x),
            x.at[n[:, 0]].max(x),
        ],
        (X, N),
    ),
    "reductions": (
        lambda x, b, n: [
            x.sum(0),
            x.sum(),
            x.max(1),
            x.min(0),
            x.prod(1),
            b.all(0),
            b.any(1),
            lax.reduce_xor(n, (0,)),
            *lax.reduce(
                (x, n, x),
                (jnp.float32(0.5), jnp.int32(-3), jnp.float32(-jnp.inf)),
                lambda a, b: (lax.add(b[0], a[0]), lax.min(a[1], b[1]), lax.max(a[2], b[2])),
                (0,),
            ),
            x.argmax(0),
            x.argmin(1),
        ],
        (X, B, N),
    ),
    "running": (
        lambda x: [
            lax.cumsum(x, 0),
            lax.cumprod(x, 1),
            lax.cummax(x, 0, True),
            lax.cummin(x, 1),
            lax.cumlogsumexp(x, 0),
        ],
        (X,),
    ),
    "order": (
        lambda x, y: [
            jnp.sort(x, 0),
            jnp.argsort(x, 1),
            *lax.sort((x, y), num_keys=2),
            *lax.top_k(x, 2),
            jnp.quantile(x, 0.3),
            jnp.median(x, 1),
        ],
        (X, Y),
    ),
    "products": (
        lambda x, y: [
            x @ y.T,
            jnp.einsum("ij,ij->i", x, y),
            jnp.tensordot(x, y),
            jnp.matmul(x, y.T, precision="highest"),
            lax.dot(
                x.astype(jnp.bfloat16), y.T.astype(jnp.bfloat16), preferred_element_type=jnp.float32
            ),
        ],
        (X, Y),
    ),
    "factorisations": (
        lambda x: [
            *jnp.linalg.svd(x, full_matrices=False),
            jnp.linalg.svd(x, compute_uv=False),
            *jnp.linalg.eigh(_gram(x)),
            *jnp.linalg.qr(x),
            jnp.linalg.cholesky(_gram(x)),
            *lax.linalg.lu(_gram(x)),
            jnp.linalg.solve(_gram(x), x.T),
            jax.scipy.linalg.solve_triangular(_gram(x), x.T, lower=True),
        ],
        (X,),
    ),
    "fourier": (lambda x: [jnp.fft.fft2(x).real, jnp.fft.irfft(jnp.fft.rfft(x)[:, :2], 4)], (X,)),
    "random": (
        lambda k: [
            jax.random.normal(k, (5, 3)),
            jax.random.bernoulli(k, 0.3, (9,)),
            jax.random.uniform(jax.random.split(k)[1], (4,)),
            jax.random.randint(jax.random.fold_in(k, 3), (6,), 0, 9),
            jax.random.permutation(jax.random.PRNGKey(3), 8),
            jax.random.key_data(k),
            jax.random.uniform(jax.random.key(5)),
        ],
        (KEY,),
    ),
    "threefry": (lambda w: P.threefry2x32_p.bind(w[0], w[1], w[2], w[3]), (W,)),
    "new in JAX 0.12": (
        lambda x, u: [
            jnp.log2(u),
            jnp.polyval(jnp.array([0.5, -1.0, 2.0]), x),
            *x,
            *jnp.unstack(x, axis=1),
            jax.grad(lambda v: jnp.sum(jnp.arctanh(v)))(u),
        ],
        (X, U),
    ),
    "add_any": (lambda x, y: [P.add_jaxvals_p.bind(x, y)], (X, Y)),
    "calls": (
        lambda x: [
            jax.nn.relu(x),
            jax.nn.gelu(x),
            jax.nn.silu(x),
            jax.nn.logsumexp(x, 0),
            jax.checkpoint(jnp.sin)(x),
            jax.grad(lambda v: jnp.sum(jnp.tanh(v) ** 2))(x),
            jnp.diag(x @ x.T),
            jax.vmap(jnp.linalg.norm)(x),
        ],
        (X,),
    ),
    "scan": (
        lambda x: [
            lax.fori_loop(0, 5, lambda i, v: v * 0.9 + i, x),
            *lax.scan(lambda c, r: (c + r, c * r), x[0], x, reverse=True),
            lax.map(jnp.sum, x),
        ],
        (X,),
    ),
    "while": (
        lambda x: [
            lax.while_loop(lambda v: jnp.sum(v**2) > 1e-2, lambda v: v * 0.7, x),
            lax.fori_loop(0, (x[0, 0] * 0).astype(int) + 3, lambda i, v: v + i, x),
        ],
        (X,),
    ),
    "cond": (
        lambda x: [
            lax.cond(x.sum() > 0, lambda v: v + 1, lambda v: v * 2, x),
            lax.switch(x.argmax() % 3, [jnp.sin, jnp.cos, jnp.tanh], x),
        ],
        (X,),
    ),
    "nested": (
        lambda x: [
            lax.fori_loop(
                0,
                3,
                lambda i, v: lax.cond(
                    i > 1,
                    lambda w: lax.while_loop(lambda q: q.max() > 0.1, lambda q: q * 0.5, w),
                    lambda w: w - 0.1,
                    v,
                ),
                x,
            )
        ],
        (X,),
    ),
    "constants": (
        lambda x: [
            x * np.arange(4, dtype=np.float32),
            x + jnp.array([1.5, -0.0, np.inf, 2.5]),
            x + jnp.bfloat16(1.1),
            x + np.float32("nan"),
        ],
        (X,),
    ),
}
