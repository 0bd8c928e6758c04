# ruff: noqa: E501 (source texts are easier to read on one line)
"""Honest programs in the styles of language models: (head, body, parameters).

ADMITTED must not be refused. REFUSED has the part of the message that says what to write instead.
"""

JAX = "import jax\nimport jax.numpy as jnp\n"
MEAN = "return sum(task_vectors.values()) / len(task_vectors)"
INPUT = "task_vectors"


def source(head, body, parameters):
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return f"{head}\ndef merge_models({parameters}):\n{lines}"


ADMITTED = {
    "typing": (
        "from typing import Any, Callable, Dict, Final, List, NamedTuple, Optional, Sequence, Tuple\n"
        "import jax.numpy as jnp\nfrom jax import Array\n"
        "class Part(NamedTuple):\n    name: str\n    weight: float = 1.0\n"
        "PARTS: List[Part] = [Part('expert_1', 0.6), Part('expert_2')]\nRATE: Final[float] = 0.5\n",
        "out: Any = None\nfor part in PARTS:\n    term = part.weight * task_vectors[part.name]\n"
        "    out = term if out is None else out + term\nreturn RATE * out",
        "task_vectors: Dict[str, Array], bias: Optional[float] = None",
    ),
    "modern typing": (
        "from __future__ import annotations\nfrom collections.abc import Mapping\nfrom typing import TYPE_CHECKING\n"
        "import jax.numpy as jnp\nfrom jax.typing import ArrayLike\nif TYPE_CHECKING:\n    from jax import Array\n"
        "def half(x: ArrayLike, y: int | None = None) -> 'Array':\n    return 0.5 * jnp.asarray(x)\n",
        "return half(sum(task_vectors.values()))",
        "task_vectors: Mapping[str, ArrayLike], scale: float = 0.5",
    ),
    "submodules": (
        "from jax import lax, numpy as jnp, random\nimport jax.numpy.linalg as jla\nfrom jax.numpy.linalg import norm, svd\n"
        "from jax.tree_util import tree_leaves, tree_map\nimport jax.scipy as jsp\nfrom jax.scipy.special import logsumexp\n",
        "keys = random.split(key, 3)\nx = sum(tree_leaves(tree_map(lambda t: 0.5 * t, task_vectors)))\n"
        "mask = random.bernoulli(keys[0], 0.7, x.shape)\n"
        "return jnp.where(mask, x, 0.0) * lax.rsqrt(1 + jla.norm(x) + norm(x)) + logsumexp(x) * jsp.stats.norm.cdf(1.0)",
        "task_vectors, key",
    ),
    "aliases of modules": (
        "import jax.numpy as jnp\nxp = jnp\nla = xp.linalg\n",
        "fn = xp.tanh\nreturn sum(fn(t) / (1 + la.norm(t)) for t in task_vectors.values())",
        INPUT,
    ),
    "names of modules": (
        "import math\nimport operator\nfrom jax import random\nimport jax.numpy as jnp\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Spec:\n    source: str\n    info: float = 0.3\n    random: float = 0.5\n    load: float = 1.0\n"
        "def rows(operator):\n    return operator.shape[0] * operator.size\n",
        "types, lib, core = ['expert_1', 'expert_2'], [], 1.0\nspec = Spec(source=types[0])\n"
        "total = sum(math.sum() * 0 + math for math in task_vectors.values()) / rows(task_vectors['expert_1'])\n"
        "return spec.info * task_vectors[spec.source] + spec.random * spec.load * total",
        INPUT,
    ),
    "dataclass": (
        "import jax.numpy as jnp\nfrom dataclasses import asdict, dataclass, field, replace\n"
        "@dataclass(frozen=True, slots=True, kw_only=True)\nclass Config:\n    density: float = 0.3\n"
        "    names: list = field(default_factory=lambda: ['expert_1', 'expert_2'])\n"
        "    def __post_init__(self):\n        assert 0 < self.density <= 1\n",
        "config = replace(Config(), density=0.5)\nassert asdict(config)['density'] == 0.5\n"
        "return config.density * sum(task_vectors[name] for name in config.names)",
        INPUT,
    ),
    "class": (
        "import jax.numpy as jnp\nfrom abc import ABC, abstractmethod\nfrom typing import ClassVar, Generic, TypeVar\nT = TypeVar('T')\n"
        "class Base(ABC, Generic[T]):\n    EPS: ClassVar[float] = 1e-8\n    def __init__(self, weights):\n        self._weights = weights\n"
        "    @abstractmethod\n    def __call__(self, vectors): ...\n"
        "class Merger(Base):\n    __slots__ = ('_weights',)\n    def __init__(self, weights):\n        super().__init__(weights)\n"
        "    @staticmethod\n    def unit(x, eps=1e-8):\n        return x / (jnp.sqrt(jnp.sum(x * x)) + eps)\n"
        "    @property\n    def total(self):\n        return sum(self._weights)\n    def __len__(self):\n        return len(self._weights)\n"
        "    def __call__(self, vectors):\n        return sum(w / self.total * self.unit(v) for w, v in zip(self._weights, vectors))\n",
        "merger = Merger([0.5, 0.25, 0.25])\nreturn merger(task_vectors.values()) / len(merger)",
        INPUT,
    ),
    "enum": (
        "from enum import Enum, auto\nclass Mode(Enum):\n    MEAN = auto()\n    SUM = 'sum'\nMODE = Mode.MEAN\n",
        "total = sum(task_vectors.values())\nreturn total / 3 if MODE is Mode.MEAN else total",
        INPUT,
    ),
    "functools": (
        "import functools\nimport itertools\nimport math\nimport operator\nfrom collections import OrderedDict, deque, namedtuple\n"
        "Stats = namedtuple('Stats', ['scale', 'count'])\ndef scaled(x, s):\n    return s * x\n"
        "@functools.lru_cache(maxsize=None)\ndef factor(i):\n    return 1.0 if i == 0 else 0.5 * factor(i - 1)\n",
        "stats = Stats(scale=1.0 / math.comb(3, 2), count=3)\npairs = itertools.combinations(sorted(task_vectors), 2)\n"
        "terms = deque(factor(i) * (task_vectors[a] + task_vectors[b]) for i, (a, b) in enumerate(pairs))\n"
        "table = OrderedDict(enumerate(map(functools.partial(scaled, s=stats.scale), terms)))\n"
        "return functools.reduce(operator.add, table.values())",
        INPUT,
    ),
    "decorator": (
        JAX
        + "import functools\ndef normalized(fn):\n    @functools.wraps(fn)\n    def wrapper(task_vectors, *args, **kwargs):\n"
        "        out = fn(task_vectors, *args, **kwargs)\n        print(f'{fn.__name__}: {out.shape}')\n"
        "        return out / (jnp.linalg.norm(out) + 1e-8)\n    return wrapper\n@normalized",
        MEAN,
        INPUT,
    ),
    "transformations": (
        JAX
        + "from functools import partial\n@partial(jax.jit, static_argnames=('k',))\ndef kept(x, k):\n"
        "    return jnp.where(jnp.abs(x) >= jax.lax.top_k(jnp.abs(x).ravel(), k)[0][-1], x, 0.0)\n"
        "@jax.custom_jvp\ndef clipped(x):\n    return jnp.clip(x, -1, 1)\n@clipped.defjvp\ndef clipped_jvp(primals, tangents):\n"
        "    return clipped(*primals), tangents[0]\n",
        "X = jnp.stack([kept(t, k=max(1, t.size // 3)) for t in task_vectors.values()])\n"
        "def loss(w):\n    return jnp.sum((jnp.tensordot(w, X, axes=1)[None] - X) ** 2)\nw = jnp.ones(3) / 3\nfor _ in range(2):\n"
        "    w = w - 1e-3 * jax.grad(loss)(w)\nrows = jax.vmap(lambda r: r / (1 + jnp.linalg.norm(r)))(X[0])\n"
        "with jax.named_scope('merge'):\n    return clipped(jnp.tensordot(w, X, axes=1)) + 0.0 * rows",
        INPUT,
    ),
    "control flow": (
        "import jax.numpy as jnp\nfrom jax import lax\n",
        "xs = jnp.stack(list(task_vectors.values()))\nout, _ = lax.scan(lambda c, x: (0.5 * c + 0.5 * x, None), jnp.zeros_like(xs[0]), xs)\n"
        "out = lax.fori_loop(0, 3, lambda i, y: 0.9 * y, out)\nout = lax.cond(jnp.sum(out) > 0, lambda y: y, lambda y: 0.5 * y, out)\n"
        "return jnp.select([out > 0.01, out < -0.01], [out, out], default=0.0)",
        INPUT,
    ),
    "kind and depth": (
        JAX,
        "match kind.split('.'):\n    case ['mlp', 'down_proj']:\n        w = 0.9\n    case ['mlp', *rest]:\n        w = 0.6\n    case _:\n        w = 0.3\n"
        "if (n := len(task_vectors)) > 2 and 'gate' in kind:\n    w /= n\nreturn jnp.where(depth < 0.5, w, 0.5 * w) * sum(task_vectors.values())",
        "task_vectors, kind, depth",
    ),
    "formats": (
        "import jax.numpy as jnp\n",
        "names = ['expert_{}'.format(1), 'expert_%d' % 2, f'expert_{3:d}']\nlabel = '{a:.2f} {0!r:>4}'.format(1, a=2.0)\n"
        "for name, t in task_vectors.items():\n    assert t.ndim >= 1, f'{name!r:>10} has {t.ndim:02d} axes'\n"
        "return sum(task_vectors[name] for name in names) * len(label) / 30",
        INPUT,
    ),
    "getattr": (
        "class State:\n    pass\n",
        "state = State()\nstate.total = sum(task_vectors.values())\nndim = getattr(state.total, 'ndim', 2)\n"
        "return state.total / (ndim + 2) if hasattr(state, 'total') else state.total",
        INPUT,
    ),
    "generators": (
        "def weighted(task_vectors):\n    for i, t in enumerate(task_vectors.values()):\n        yield t / (i + 1)\n"
        "def all_of(task_vectors):\n    yield from weighted(task_vectors)\n",
        "return sum(all_of(task_vectors)) / 2",
        INPUT,
    ),
    "main guard": (
        "import jax.numpy as jnp\n__all__ = ['merge_models']\n"
        "if __name__ == '__main__':\n    import time\n    print(merge_models({}), time.time())\n",
        MEAN,
        INPUT,
    ),
    "unicode": (
        '"""Uses eval, os.system and __import__? No: text only.\n\n~~~python\nopen("x")\n~~~\n"""\n',
        "# α·τ + β·ν\nα, β = 0.6, 0.4\nτ, ν = task_vectors['expert_1'], task_vectors['expert_2']\nreturn α * τ + β * ν",
        INPUT,
    ),
    "einops": (
        "import jax.numpy as jnp\nfrom einops import rearrange, reduce\n",
        "x = jnp.stack(list(task_vectors.values()))\nflat = rearrange(x, 'e ... -> e (...)')\nw = reduce(flat ** 2, 'e n -> e', 'sum') ** 0.5\n"
        "return jnp.einsum('e,e...->...', w / (w.sum() + 1e-8), x)",
        INPUT,
    ),
    "jaxtyping": (
        "from jaxtyping import Array, Float\ndef half(x: Float[Array, 'm n']) -> Float[Array, '*any']:\n    return 0.5 * x\n",
        "return half(sum(task_vectors.values()))",
        INPUT,
    ),
    "NumPy constants": (
        "import numpy as np\nimport jax.numpy as jnp\nW = np.array([0.5, 0.3, 0.2], dtype=np.float32)\n",
        "return jnp.tensordot(jnp.asarray(W), jnp.stack([task_vectors[k] for k in sorted(task_vectors.keys())]), axes=([0], [0]))",
        INPUT,
    ),
    "key at top level": (
        JAX + "KEY = jax.random.PRNGKey(42)\n",
        "a, b, c = task_vectors.values()\nreturn jnp.where(jax.random.uniform(KEY, a.shape) < 0.5, a, b) + 0.1 * c",
        INPUT,
    ),
    "copies": (
        "import copy\n",
        "return sum(copy.deepcopy(t) for t in copy.copy(task_vectors).values()) / 3",
        INPUT,
    ),
    "state and errors": (
        "calls = 0\ndef half(t, *, x=lambda a, b=0.5: a * b):\n    return x(t)\n",
        "global calls\ncalls += 1\ntry:\n    xs = [task_vectors[f'expert_{i}'] for i in (1, 2, 3)]\nexcept KeyError as error:\n"
        "    raise ValueError('missing') from error\nwhile len(xs) > 1:\n    xs.append(half(xs.pop() + xs.pop()))\nreturn xs[0] * calls",
        INPUT,
    ),
    "hyperparameters": (
        JAX,
        "weights = weights or [0.2, 0.3, 0.5]\nout = sum(w * t for w, t in zip(weights, task_vectors.values(), strict=True))\n"
        "return out / (jnp.linalg.norm(out) + eps) if normalize else alpha * out",
        "task_vectors, alpha=0.3, *, eps: float = 1e-8, normalize: bool = False, weights=None",
    ),
    "half precision": (
        "import jax.numpy as jnp\n",
        "return sum(t.astype(jnp.bfloat16) for t in task_vectors.values()) / 3",
        "task_vectors, base, key, depth",
    ),
    "robust mean": (
        "import jax.numpy as jnp\n",
        "x = jnp.stack(list(task_vectors.values()))\nmedian = jnp.median(x, axis=0)\nmad = jnp.median(jnp.abs(x - median), axis=0) + 1e-8\n"
        "w = jnp.where(jnp.abs(x - median) / mad < 2.5, 1.0, 0.0)\nreturn (w * x).sum(axis=0) / jnp.maximum(w.sum(axis=0), 1.0)",
        INPUT,
    ),
    "low rank": (
        "import jax.numpy as jnp\n",
        "u, s, vh = jnp.linalg.svd(sum(task_vectors.values()), full_matrices=False)\nk = max(1, s.shape[0] // 4)\nreturn (u[:, :k] * s[:k]) @ vh[:k]",
        INPUT,
    ),
}

REFUSED = {
    "torch": ("import torch\n", MEAN, INPUT, "use jax.numpy"),
    "another package": ("import optax\n", MEAN, INPUT, "available: jax, numpy, math"),
    "random": ("import random\n", MEAN, INPUT, "use jax.random with the input `key`"),
    "np.random": (
        "import numpy as np\n",
        "return np.random.rand() * task_vectors['expert_1']",
        INPUT,
        "`np.random` is not allowed; use jax.random with the input `key`",
    ),
    "tree_map": (
        JAX,
        "return jax.tree_map(abs, task_vectors)['expert_1']",
        INPUT,
        "use jax.tree.map",
    ),
    "star": ("from jax.numpy import *\n", MEAN, INPUT, "use `import jax.numpy as NAME`"),
    "module as a value": (
        "import jax.numpy as jnp\ndef f(x, xp=jnp):\n    return xp.tanh(x)\n",
        MEAN,
        INPUT,
        "`jnp` is a module; use its members",
    ),
    "getattr": (
        "import jax.numpy as jnp\n",
        "return getattr(jnp, mode)(task_vectors['expert_1'])",
        "task_vectors, mode: str = 'tanh'",
        "`getattr` is not allowed, except with the attribute as a string",
    ),
    "format": ("", "return '{0.x}'.format(task_vectors)", INPUT, "use an f-string"),
    "keyword arguments": ("", MEAN, "task_vectors, **kwargs", "name the inputs that are needed"),
    "unknown input": ("", MEAN, "task_vectors, alpha", "`alpha` needs a default"),
    "dynamic shape": (
        JAX,
        "return jnp.unique(task_vectors['expert_1'])",
        INPUT,
        "pass size=, or use jnp.where",
    ),
    "names of experts": (
        "",
        "return task_vectors['math']",
        INPUT,
        "the experts in task_vectors are expert_1, expert_2, expert_3",
    ),
    "in place": ("", "x = task_vectors['expert_1']\nx[0] = 0\nreturn x", INPUT, "x.at[index].set"),
}
