"""Valid candidates by name, and the helper that writes them."""

import textwrap

HEAD = "import jax\nimport jax.numpy as jnp\n"


def merge(body: str, signature: str = "task_vectors", head: str = HEAD) -> str:
    """Return source text of `merge_models` with the given parameters and body."""
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return f"{head}def merge_models({signature}):\n{body}\n"


def _sum(expression: str, signature: str = "task_vectors") -> str:
    return merge(f"return sum({expression} for tau in task_vectors.values())", signature)


TIES = merge(
    """
    kept = []
    for tau in task_vectors.values():
        threshold = jnp.quantile(jnp.abs(tau), 0.8)
        kept.append(jnp.where(jnp.abs(tau) >= threshold, tau, 0.0))
    trimmed = jnp.stack(kept)
    sign = jnp.sign(jnp.sum(trimmed, axis=0))
    agree = jnp.where(jnp.sign(trimmed) == sign, trimmed, 0.0)
    return 0.7 * jnp.sum(agree, axis=0) / jnp.maximum(jnp.sum(agree != 0, axis=0), 1)
    """
)

VALID = {
    "linear": _sum("0.3 * tau"),
    "ties": TIES,
    "dare": merge(
        """
        mask = jax.random.bernoulli(key, 0.5, task_vectors["expert_1"].shape)
        total = sum(task_vectors.values())
        return jnp.where(mask, total / 0.5, 0.0)
        """,
        "task_vectors, key",
    ),
    "normal noise": merge(
        """
        first, *rest = task_vectors.values()
        noise = jax.random.normal(key, first.shape)
        return sum(rest, first) + 1e-4 * noise
        """,
        "task_vectors, key",
    ),
    "own key": merge(
        """
        key = jax.random.PRNGKey(0)
        one, two = jax.random.split(key)
        tau = task_vectors["expert_2"]
        order = jax.random.permutation(two, tau.shape[0])
        return tau * jax.random.uniform(one, tau.shape) + 0.1 * tau[order]
        """
    ),
    "depth with where": _sum("jnp.where(depth < 0.5, 0.2, 0.4) * tau", "task_vectors, depth"),
    "branch on kind": merge(
        """
        factor = {"mlp.down_proj": 0.6}.get(kind, 0.3)
        if kind.endswith("up_proj"):
            factor = 0.1
        return factor * sum(task_vectors.values())
        """,
        "task_vectors, kind",
    ),
    "base": merge(
        """
        scale = jnp.linalg.norm(base) / (jnp.linalg.norm(task_vectors["expert_1"]) + 1e-6)
        return jnp.clip(scale, 0.0, 1.0) * sum(task_vectors.values())
        """,
        "task_vectors, base",
    ),
    "hyperparameters": merge(
        """
        kept = [jnp.where(jnp.abs(t) > limit, t, 0.0) for t in task_vectors.values()]
        return scale * sum(kept[:count])
        """,
        "task_vectors, scale: float = 0.4, limit: float = 0.001, count: int = 2",
    ),
    "softmax of norms": merge(
        """
        stacked = jnp.stack(list(task_vectors.values()))
        weights = jax.nn.softmax(jnp.sqrt(jnp.sum(stacked ** 2, axis=(1, 2))))
        return jnp.einsum("k,kij->ij", weights, stacked)
        """
    ),
    "svd": merge(
        """
        u, s, vt = jnp.linalg.svd(sum(task_vectors.values()), full_matrices=False)
        return (u[:, :4] * s[:4]) @ vt[:4]
        """
    ),
    "qr projection": merge(
        """
        q, _ = jnp.linalg.qr(task_vectors["expert_1"])
        other = task_vectors["expert_2"]
        return other - q @ (q.T @ other)
        """
    ),
    "eigh": merge(
        """
        total = sum(task_vectors.values())
        values, vectors = jnp.linalg.eigh(total @ total.T)
        return 0.1 * (vectors * (values > 0)) @ (vectors.T @ total)
        """
    ),
    "solve": merge(
        """
        total = sum(task_vectors.values())
        gram = total.T @ total + jnp.eye(total.shape[1])
        return total @ jnp.linalg.inv(gram) + jnp.linalg.solve(gram, total.T).T
        """
    ),
    "median": merge("return jnp.median(jnp.stack(list(task_vectors.values())), axis=0)"),
    "ranks": merge(
        """
        tau = sum(task_vectors.values())
        ranks = jnp.argsort(jnp.argsort(jnp.abs(tau).ravel()))
        return tau * (ranks.reshape(tau.shape) >= int(0.7 * tau.size))
        """
    ),
    "top-k": merge(
        """
        tau = sum(task_vectors.values())
        limit = jax.lax.top_k(jnp.abs(tau).reshape(-1), tau.size // 4)[0][-1]
        return jnp.where(jnp.abs(tau) >= limit, tau, jnp.zeros_like(tau))
        """
    ),
    "at set": merge(
        """
        out = jnp.zeros_like(task_vectors["expert_1"])
        for index, tau in enumerate(task_vectors.values()):
            out = out.at[index::3].set(tau[index::3])
        return out.at[0].add(0.001).at[1].multiply(2.0)
        """
    ),
    "fori loop": merge(
        """
        x = sum(task_vectors.values())
        return jax.lax.fori_loop(0, 10, lambda i, v: v - 0.1 * jnp.tanh(v), x)
        """
    ),
    "scan": merge(
        """
        stacked = jnp.stack(list(task_vectors.values()))
        def step(carry, tau):
            carry = 0.5 * carry + tau
            return carry, jnp.sum(tau)
        final, sums = jax.lax.scan(step, jnp.zeros_like(stacked[0]), stacked)
        return final * jnp.tanh(jnp.max(sums))
        """
    ),
    "while": merge(
        """
        x = sum(task_vectors.values())
        return jax.lax.while_loop(lambda v: jnp.max(jnp.abs(v)) > 1e-3, lambda v: 0.5 * v, x)
        """
    ),
    "cond": merge(
        """
        a, b, c = task_vectors.values()
        return jax.lax.cond(jnp.sum(a) > jnp.sum(b), lambda: a + c, lambda: b - c)
        """
    ),
    "vmap": merge(
        """
        a, b, _ = task_vectors.values()
        norm = jnp.linalg.norm
        cosine = jax.vmap(lambda x, y: jnp.vdot(x, y) / (norm(x) * norm(y) + 1e-8))
        return a + cosine(a, b)[:, None] * b
        """
    ),
    "grad": merge(
        """
        stacked = jnp.stack(list(task_vectors.values()))
        loss = lambda m: jnp.sum(jnp.sqrt(jnp.sum((stacked - m) ** 2, axis=(1, 2)) + 1e-6))
        m = jnp.mean(stacked, axis=0)
        for _ in range(3):
            m = m - 0.01 * jax.grad(loss)(m)
        return m
        """
    ),
    "einops and math": merge(
        """
        tau = sum(task_vectors.values())
        rows = reduce(tau, "o i -> o 1", "mean")
        return (tau - rows) / math.sqrt(len(task_vectors))
        """,
        head="import math\nimport jax.numpy as jnp\nfrom einops import rearrange, reduce\n",
    ),
    "jit and partial": merge(
        """
        return functools.reduce(lambda a, b: a + b, map(shrink, task_vectors.values()))
        """,
        head=HEAD
        + "import functools\n@functools.partial(jax.jit, static_argnames='power')\n"
        + "def shrink(x, power=2):\n    return jnp.sign(x) * jnp.abs(x) ** power\n",
    ),
    "top-level arrays": merge(
        "return sum(w * t for w, t in zip(WEIGHTS, task_vectors.values()))",
        head=HEAD + "WEIGHTS = jnp.array([0.1, 0.2, 0.3])\n",
    ),
    "numpy constants": merge(
        "return sum(w * t for w, t in zip(np.linspace(0.1, 0.5, 3), task_vectors.values()))",
        head="import numpy as np\n",
    ),
    "annotated": (
        "from typing import Dict\nimport jax\nimport jax.numpy as jnp\n\n"
        "def merge_models(task_vectors: Dict[str, jax.Array]) -> jax.Array:\n"
        '    """Average."""\n'
        "    _vals = [v for _, v in task_vectors.items()]\n"
        "    return jnp.mean(jnp.array(_vals), axis=0)\n"
    ),
    "bfloat16 result": _sum("(0.5 * tau).astype(jnp.bfloat16)"),
    "tree": HEAD
    + textwrap.dedent(
        """
        def merge_trees(task_vectors, base):
            norms = {}
            for slot, tree in task_vectors.items():
                norms[slot] = sum(jnp.sum(leaf ** 2) for leaf in tree.values())
            total = sum(norms.values())
            merged = {}
            for path in base:
                mean = sum(task_vectors[s][path] * norms[s] / total for s in task_vectors)
                merged[path] = mean + 0.001 * base[path]
            return merged
        """
    ),
}
