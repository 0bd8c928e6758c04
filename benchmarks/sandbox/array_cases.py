"""Operations that move elements, reductions, linear algebra, random bits and control flow."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.sandbox.cost_case import REAL, Case, ControlFlowCase, case_of, draw, several, square
from sdjax.sandbox.ir.parameters import KEY_IMPL


def shape_cases() -> Iterator[Case]:
    """Yield operations that move elements, and indexing."""

    def matrix(n: int) -> list[Any]:
        return [draw("normal", square(n), "float32")]

    yield case_of(
        "broadcast_in_dim", "rows",
        lambda n: [draw("normal", square(n)[1:], "float32")],
        lambda xs: {"shape": (xs[0].size, xs[0].size), "broadcast_dimensions": (1,)},
    )  # fmt: skip
    yield case_of(
        "broadcast_in_dim", "columns",
        lambda n: [draw("normal", square(n)[1:], "float32")],
        lambda xs: {"shape": (xs[0].size, xs[0].size), "broadcast_dimensions": (0,)},
    )  # fmt: skip
    yield case_of("reshape", "", matrix, lambda xs: {"new_sizes": (xs[0].size,)})
    yield Case(
        primitive="iota", label="", make=lambda n, kinds: [np.zeros(n, np.float32)],
        params=lambda xs: {"dtype": jnp.dtype("float32"), "shape": xs[0].shape, "dimension": 0},
    )  # fmt: skip
    yield case_of("squeeze", "", lambda n: [draw("normal", (n, 1), "float32")], dimensions=(1,))
    for axis in (0, 1):
        yield case_of("rev", f"axis {axis}", matrix, dimensions=(axis,))
    yield case_of("transpose", "", matrix, permutation=(1, 0))
    yield case_of(
        "transpose", "of many axes",
        lambda n: [draw("normal", (2,) * 7 + (max(1, n >> 7),), "float32")],
        permutation=(7, 6, 5, 4, 3, 2, 1, 0),
    )  # fmt: skip
    for axis in (0, 1):
        for count in (2, 256):
            yield case_of(
                "concatenate", f"{count}, axis {axis}",
                lambda n, c=count: several(n, c),
                dimension=axis,
            )  # fmt: skip
    yield case_of(
        "stack", "64",
        lambda n: [draw("normal", square(n // 64 + 1), "float32", k) for k in range(64)], axis=1,
    )  # fmt: skip
    yield case_of(
        "tile", "", lambda n: [draw("normal", square(n // 64 + 1), "float32")], reps=(8, 8)
    )
    yield case_of(
        "pad", "interior", lambda n: [draw("normal", square(n // 4 + 1), "float32"), np.float32(0)],
        padding_config=((0, 0, 1), (0, 0, 1)),
    )  # fmt: skip
    yield case_of("split", "", matrix, lambda xs: {"sizes": (1, xs[0].shape[1] - 1), "axis": 1})
    yield case_of(
        "slice", "strided", matrix,
        lambda xs: {"start_indices": (0, 0), "limit_indices": xs[0].shape, "strides": (1, 2)},
    )  # fmt: skip
    yield case_of(
        "dynamic_slice", "", lambda n: [*matrix(n), np.int32(1), np.int32(1)],
        lambda xs: {"slice_sizes": tuple(max(1, s - 1) for s in xs[0].shape)},
    )  # fmt: skip
    yield case_of(
        "dynamic_update_slice", "",
        lambda n: [*matrix(n), draw("normal", tuple(max(1, s - 1) for s in square(n)), "float32"),
                   np.int32(1), np.int32(1)],
    )  # fmt: skip
    yield from _indexing_cases()


def _indices(n: int, bound: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, max(1, bound), (n, 1)).astype(np.int32)


def _indexing_cases() -> Iterator[Case]:
    modes = lax.GatherScatterMode
    for label, window in (("elements", 1), ("rows of 64", 64)):

        def gathered(n: int, w: int = window) -> list[Any]:
            rows = max(1, n // w)
            return [draw("normal", (rows, w), "float32"), _indices(rows, rows)]

        for mode in (modes.PROMISE_IN_BOUNDS, modes.FILL_OR_DROP):
            yield case_of(
                "gather", f"{label}, {mode.name.split('_')[0].lower()}", gathered,
                dimension_numbers=lax.GatherDimensionNumbers((1,), (0,), (0,)),
                slice_sizes=(1, window), unique_indices=False, indices_are_sorted=False,
                mode=mode, fill_value=0 if "FILL" in mode.name else None,
            )  # fmt: skip

        def scattered(n: int, dtype: str = "float32", w: int = window) -> list[Any]:
            rows = max(1, n // w)
            return [draw("normal", (rows, w), dtype), _indices(rows, rows),
                    draw("normal", (rows, w), dtype, 2)]  # fmt: skip

        for name in ("", "-add", "-sub", "-mul", "-min", "-max"):
            for dtype in ("float32", "complex64") if name in ("-add", "-mul") else ("float32",):
                yield case_of(
                    "scatter" + name, f"{label}, {dtype}",
                    lambda n, f=scattered, d=dtype: f(n, d),
                    dimension_numbers=lax.ScatterDimensionNumbers((1,), (0,), (0,)),
                    indices_are_sorted=False, unique_indices=False, mode=modes.FILL_OR_DROP,
                )  # fmt: skip


def reduction_cases() -> Iterator[Case]:
    """Yield reductions, running reductions and sorts along each axis."""

    def matrix(n: int, dtype: str) -> list[Any]:
        return [draw("normal", square(n), dtype)]

    for name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
        for dtype in (*REAL, "int32", "complex64"):
            for axes in ((0,), (1,), (0, 1)):
                yield case_of(
                    name, f"{dtype}, axes {axes}", lambda n, d=dtype: matrix(n, d), axes=axes
                )
    for name in ("reduce_and", "reduce_or", "reduce_xor"):
        for axes in ((0,), (1,)):
            dtype = "int32" if name == "reduce_xor" else "bool"
            yield case_of(name, f"axes {axes}", lambda n, d=dtype: matrix(n, d), axes=axes)
    for count in (2, 16):
        yield case_of(
            "reduce", f"{count} operands",
            lambda n, c=count: [*several(n, c), *[np.float32(0)] * c],
            lambda xs: {"axes": (0,), "reducers": ("add", "max") * (len(xs) // 4)},
        )  # fmt: skip
    for name in ("argmax", "argmin"):
        for dtype in (*REAL, "int32"):
            for axis in (0, 1):
                yield case_of(
                    name, f"{dtype}, axis {axis}", lambda n, d=dtype: matrix(n, d), axes=(axis,),
                    index_dtype=jnp.dtype("int32"),
                )  # fmt: skip
    for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        for dtype in (*REAL, "int32", "complex64"):
            for axis in (0, 1):
                yield case_of(
                    name, f"{dtype}, axis {axis}", lambda n, d=dtype: matrix(n, d), axis=axis,
                    reverse=False,
                )  # fmt: skip
        yield case_of(
            name, "one long axis", lambda n: [draw("normal", (n,), "float32")], axis=0,
            reverse=True,
        )  # fmt: skip
    for count, keys in ((1, 1), (2, 1), (4, 4)):
        for axis in (0, 1):
            yield case_of(
                "sort", f"{count} operands, axis {axis}",
                lambda n, c=count: several(n, c),
                dimension=axis, is_stable=True, num_keys=keys,
            )  # fmt: skip
        yield case_of(
            "sort", f"{count} operands of equal keys, long axis",
            lambda n, c=count: [*[np.zeros(n // c + 1, np.float32)] * (c - 1),
                                draw("normal", (n // c + 1,), "float32")],
            dimension=0, is_stable=True, num_keys=keys,
        )  # fmt: skip
    for dtype in ("bfloat16", "float16", "int8"):
        yield case_of(
            "sort", f"{dtype}, long axis", lambda n, d=dtype: [draw("normal", (n,), d)],
            dimension=0, is_stable=True, num_keys=1,
        )  # fmt: skip
        yield case_of(
            "top_k", f"{dtype}, k = half", lambda n, d=dtype: [draw("normal", (n,), d)],
            lambda xs: {"k": max(1, xs[0].size // 2), "axis": 0},
        )  # fmt: skip
    for k in (1, 0):
        yield case_of(
            "top_k", f"k = {k or 'half'}", lambda n: [draw("normal", (n,), "float32")],
            lambda xs, k=k: {"k": k or max(1, xs[0].size // 2), "axis": 0},
        )  # fmt: skip


def linear_algebra_cases() -> Iterator[Case]:
    """Yield products, factorizations of one matrix and of many small ones, and transforms."""

    def product(n: int, dtype: str, kind: str) -> list[Any]:
        side = max(1, round((n / 4) ** 0.5))
        shapes = {
            "square": ((side, side), (side, side)),
            "long": ((4, max(1, n // 8)), (max(1, n // 8), 4)),
            "outer": ((max(1, n // 8), 1), (1, 8)),
            "vector": ((side, side), (side, 1)),
            "batch": ((max(1, n // 8), 2, 2), (max(1, n // 8), 2, 2)),
        }[kind]
        return [draw("normal", shape, dtype, i) for i, shape in enumerate(shapes)]

    for dtype in (*REAL, "int32", "int8", "complex64"):
        for kind in ("square", "long", "outer", "vector", "batch"):
            batch = ((0,), (0,)) if kind == "batch" else ((), ())
            axes = ((2,), (1,)) if kind == "batch" else ((1,), (0,))
            yield case_of(
                "dot_general", f"{dtype}, {kind}",
                lambda n, d=dtype, k=kind: product(n, d, k),
                dimension_numbers=(axes, batch), precision=None, preferred_element_type=None,
            )  # fmt: skip
    yield from _factorization_cases()
    for label, length in {"power of two": 64, "prime": 61, "long prime": 4093}.items():
        for kind in ("FFT", "RFFT", "IRFFT"):
            dtype = "float32" if kind == "RFFT" else "complex64"
            yield case_of(
                "fft", f"{kind}, {label}",
                lambda n, d=dtype, m=length, h=kind == "IRFFT":
                    [draw("normal", (max(1, n // m), m // 2 + 1 if h else m), d)],
                fft_type=getattr(lax.FftType, kind), fft_lengths=(length,),
            )  # fmt: skip


FACTORIZATIONS = {
    "svd": {"full_matrices": True, "compute_uv": True},
    "eigh": {"lower": True, "sort_eigenvalues": True},
    "qr": {"full_matrices": True},
    "cholesky": {},
    "lu": {},
    "triangular_solve": {
        "left_side": True, "lower": True, "transpose_a": False, "conjugate_a": False,
        "unit_diagonal": False,
    },
}  # fmt: skip
MATRICES = {
    "positive definite": lambda x, side: x @ np.conj(np.swapaxes(x, -1, -2)) + np.eye(side),
    "normal": lambda x, side: x,
    "rank one": lambda x, side: x[..., :1] * np.conj(np.swapaxes(x[..., :1], -1, -2)),
    "graded": lambda x, side: x * np.logspace(0, -40, side)[:, None],
    "overflowing": lambda x, side: x * 4e37,
    "denormal": lambda x, side: x * 1e-42,
    "growing": lambda x, side: np.tril(0 * x.real - 1, -1) + 1e-3 * np.eye(side) + 0 * x,
}


def _factorization_cases() -> Iterator[Case]:
    for label, sides in {"one": None, "many of 2 x 2": 2, "many of 16 x 16": 16}.items():
        for dtype in ("float32", "complex64"):

            def matrices(
                n: int, kinds: Sequence[str], side: int | None = sides, dtype: str = dtype
            ) -> list[Any]:
                # A matrix of 2^18 elements would take seconds.
                side = side or max(1, min(128, math.isqrt(n)))
                x = draw("normal", (max(1, min(n, 1 << 14) // side**2), side, side), dtype)
                with np.errstate(all="ignore"):
                    return [MATRICES[kinds[0]](x, side).astype(dtype)]

            for name, params in FACTORIZATIONS.items():
                count = 2 if name == "triangular_solve" else 1
                yield Case(
                    primitive=name,
                    label=f"{label}, {dtype}",
                    make=lambda n, kinds, f=matrices, c=count: f(n, kinds) * c,
                    params=lambda xs, p=params: p,
                    values=[(kind,) for kind in MATRICES],
                )


def random_cases() -> Iterator[Case]:
    """Yield random bits and keys: the first operand holds a key's words, the second a shape."""

    def key(n: int, kinds: Any = None) -> list[Any]:
        return [np.arange(2, dtype=np.uint32), np.zeros((n, 0), np.uint32)]

    def words(n: int) -> list[Any]:
        return [np.arange(2 * n, dtype=np.uint32).reshape(n, 2)]

    def shape(operands: list[Any]) -> tuple[int, ...]:
        return operands[1].shape[:1]

    for width in (8, 16, 32):
        yield case_of(
            "random_bits", f"{width} bits", key,
            lambda xs, w=width: {"bit_width": w, "shape": shape(xs)},
        )  # fmt: skip
    yield case_of("random_split", "", key, lambda xs: {"shape": shape(xs)})
    yield case_of("random_unwrap", "", words)
    yield case_of("random_wrap", "", words, impl=KEY_IMPL)
    yield case_of("random_fold_in", "", lambda n: [*key(n), np.int32(3)])
    yield case_of("random_seed", "", lambda n: [np.arange(n, dtype=np.int32)], impl=KEY_IMPL)
    yield case_of(
        "threefry2x32", "", lambda n: [np.arange(n, dtype=np.uint32) + i for i in range(4)]
    )


def control_flow_cases() -> Iterator[Case]:
    """Yield loops and branches that compute nothing, and a chain on a row that is broadcast."""

    def two(n: int, kinds: Any) -> list[Any]:
        return [draw("normal", square(n), "float32", i) for i in range(2)]

    def chain(x: Any, y: Any) -> list[Any]:
        row = x[0]
        for _ in range(100):
            row = row * row + 0.3
        return [row[None, :] + y]

    def counted(x: Any, y: Any) -> Any:
        return lax.while_loop(lambda v: v[0] < 129, lambda v: (v[0] + 1, v[2], v[1]), (0, x, y))

    functions = {
        ("scan", "carry that is swapped"): lambda x, y: lax.fori_loop(
            0, 20, lambda i, v: (v[1], v[0]), (x, y)
        ),
        ("scan", "rows read and written"): lambda x, y: [
            lax.scan(lambda c, r: (c + 1, r[0] * r[1]), 0.0, (x, y))[1]
        ],
        ("while", "129 iterations, carry that is swapped"): counted,
        ("cond", "choice of operands"): lambda x, y: lax.cond(
            x[0, 0] > 0, lambda a, b: (a, b), lambda a, b: (b, a), x, y
        ),
        ("scan", "row that is computed again by a broadcast"): chain,
    }
    for (primitive, label), function in functions.items():
        yield ControlFlowCase(primitive=primitive, label=label, make=two, function=function)


def array_cases() -> list[Case]:
    """Return all cases of this file."""
    return [
        *shape_cases(),
        *reduction_cases(),
        *linear_algebra_cases(),
        *random_cases(),
        *control_flow_cases(),
    ]
