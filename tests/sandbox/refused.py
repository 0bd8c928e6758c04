"""Candidates that the sandbox refuses: (name, source, verdict, rule or None for any)."""

from catalogue import HEAD, VALID, merge

REFUSED = [
    ("empty", "", "refused", "syntax"),
    ("prose", "Here is a program that merges the models.", "refused", "syntax"),
    ("fence", "```python\ndef merge_models(t):\n    return t\n```", "refused", "syntax"),
    ("unclosed", "def merge_models(t:\n    return 0", "refused", "syntax"),
    ("nul", "def merge_models(t):\n    return '\0'", "refused", "encoding"),
    ("surrogate", "def merge_models(t):\n    return '\udcff'", "refused", "encoding"),
    ("huge", "# " + "x" * 40_000 + "\ndef merge_models(t): return t", "refused", "size"),
    ("deep", "def merge_models(t):\n    return " + "(" * 3000 + ")" * 3000, "refused", "syntax"),
    ("deep unary", "x = " + "-" * 20_000 + "1", "refused", None),
    ("no function", "import jax.numpy as jnp\n", "refused", "entry-point"),
    ("two functions", VALID["linear"] * 2, "refused", "entry-point"),
    ("os", "import os\ndef merge_models(t): return os.getpid()", "refused", "import"),
    ("from os", "from os import path\n" + VALID["linear"], "refused", "import"),
    ("torch", "import torch\n" + VALID["linear"], "refused", "import"),
    ("engine", "from sdjax.merging.engine import merge\n" + VALID["linear"], "refused", "import"),
    ("registry", "from sdjax import load_model\n" + VALID["linear"], "refused", "import"),
    ("sdjax", "import sdjax\n" + merge("return sdjax.load_model('x')"), "refused", "attribute"),
    (
        "api module",
        "import sdjax.merging.algorithm as a\n" + merge("return a.jax"),
        "refused",
        None,
    ),
    ("relative", "from . import x\n" + VALID["linear"], "refused", "import"),
    ("star", "from jax.numpy import *\n" + VALID["linear"], "refused", "import"),
    ("hidden import", merge("import subprocess\nreturn 0"), "refused", "import"),
    ("callback import", "from jax import pure_callback\n" + VALID["linear"], "refused", "import"),
    ("open", merge("return open('/etc/passwd').read()"), "refused", "name"),
    ("eval", merge("return eval('1')"), "refused", "name"),
    ("dunder import", merge("return __import__('os')"), "refused", "dunder"),
    ("dunder class", merge("return ().__class__.__base__"), "refused", "private-attribute"),
    ("private", merge("return jnp._src"), "refused", "private-attribute"),
    ("format", merge("return '{0.x}'.format(jnp)"), "refused", "attribute"),
    ("typing.sys", "import typing\n" + merge("return typing.sys.modules"), "refused", "attribute"),
    ("callback", merge("return jax.pure_callback(len, 1, 2)"), "refused", "attribute"),
    ("jax debug", merge("jax.debug.print('x')\nreturn 0"), "refused", "attribute"),
    ("devices", merge("return jax.devices()"), "refused", "attribute"),
    ("numpy file", "import numpy as np\n" + merge("return np.load('x')"), "refused", "attribute"),
    ("long path", merge("return jax.numpy.load('x')"), "refused", "attribute"),
    (
        "annotation in a string",
        merge("return x", "task_vectors, x: \"__import__('os').getpid() and float\" = 0.7"),
        "refused",
        None,
    ),
    ("unicode look-alike", merge("return ｅｖａｌ('1')"), "refused", "name"),
    ("no parameters", "def merge_models(): return 0", "refused", "signature"),
    ("starred", "def merge_models(*t): return 0", "refused", "signature"),
    ("no default", "def merge_models(t, alpha): return 0", "refused", "signature"),
    (
        "branch on depth",
        merge(
            "if depth > 0.5:\n    return task_vectors['expert_1']\nreturn task_vectors['expert_2']",
            "task_vectors, depth",
        ),
        "refused",
        "traced-branch",
    ),
    (
        "branch on value",
        merge("x = task_vectors['expert_1']\nreturn x if x.sum() > 0 else -x"),
        "refused",
        "traced-branch",
    ),
    (
        "float of tensor",
        merge("return float(task_vectors['expert_1'].sum())"),
        "refused",
        "concrete-value",
    ),
    (
        "mask index",
        merge("x = task_vectors['expert_1']\nreturn x[x > 0]"),
        "refused",
        "concrete-value",
    ),
    (
        "numpy on tensor",
        "import numpy as np\n" + merge("return np.abs(task_vectors['expert_1'])"),
        "refused",
        "concrete-value",
    ),
    ("in place", merge("x = task_vectors['expert_1']\nx[0] = 0\nreturn x"), "refused", "in-place"),
    ("torch call", merge("return torch.zeros(3)"), "refused", "exception"),
    ("unknown expert", merge("return task_vectors['math']"), "refused", "exception"),
    ("raises", merge("raise SystemExit(0)"), "refused", "exception"),
    ("endless recursion", merge("return merge_models(task_vectors)"), "refused", "recursion"),
    (
        "gamma",
        merge(
            "x = task_vectors['expert_1']\nreturn x * jax.random.gamma(key, 2.0, x.shape)",
            "task_vectors, key",
        ),
        "refused",
        "primitive",
    ),
    ("shape", merge("return task_vectors['expert_1'].T"), "wrong signature", "shape"),
    ("scalar", merge("return 0.5"), "wrong signature", "shape"),
    ("dict", merge("return task_vectors"), "wrong signature", "tree"),
    ("none", merge("pass"), "wrong signature", "tree"),
    ("text", merge("return 'merged'"), "wrong signature", "type"),
    (
        "integers",
        merge("return jnp.sign(task_vectors['expert_1']).astype(int)"),
        "wrong signature",
        "type",
    ),
    ("tree for tensor", HEAD + "def merge_trees(t): return 0.0", "wrong signature", "tree"),
    ("tree lacks a path", HEAD + "def merge_trees(t): return {}", "wrong signature", "tree"),
    ("nan", merge("return jnp.log(task_vectors['expert_1'])"), "non-finite", "non-finite"),
    (
        "zero by zero",
        merge("x = task_vectors['expert_1']\nreturn x / jnp.abs(x)"),
        "non-finite",
        "non-finite",
    ),
    (
        "overflow",
        merge("return jnp.exp(1e6 * task_vectors['expert_1'])"),
        "non-finite",
        "non-finite",
    ),
    (
        "unrolled",
        merge("x = task_vectors['expert_1']\nfor _ in range(2000):\n    x = x + 1.0\nreturn x"),
        "too costly",
        "equations",
    ),
    (
        "long loop",
        merge(
            "x = task_vectors['expert_1']\n"
            "return jax.lax.fori_loop(0, 10**9, lambda i, v: v * 0.5, x)"
        ),
        "too costly",
        "loop-iterations",
    ),
    (
        "nested loops",
        merge(
            "loop = jax.lax.fori_loop\nx = task_vectors['expert_1']\n"
            "inner = lambda i, v: loop(0, 999, lambda j, w: w * 0.9, v)\n"
            "return loop(0, 999, inner, x)"
        ),
        "too costly",
        "cost",
    ),
    (
        "allocation",
        merge("return jnp.zeros((10**5, 10**5)).sum() + task_vectors['expert_1']"),
        "too costly",
        "elements",
    ),
    (
        "constant",
        "import numpy as np\n"
        + merge("return task_vectors['expert_1'] + jnp.asarray(np.arange(490_000.0)).sum()"),
        "too costly",
        "constants",
    ),
    (
        "many tensors alive",
        merge(
            "x = jnp.tile(task_vectors['expert_1'], (32, 1))\n"
            "kept = [jnp.sin(x * i) for i in range(100)]\n"
            "total = sum(a * b for a, b in zip(kept, kept[::-1]))\n"
            "return total[: task_vectors['expert_1'].shape[0]]"
        ),
        "too costly",
        "memory",
    ),
    (
        "host memory",
        merge("x = [0] * 10**10\nreturn task_vectors['expert_1']"),
        "too costly",
        "memory",
    ),
    (
        "endless while",
        merge(
            "x = task_vectors['expert_1']\n"
            "return jax.lax.while_loop(lambda v: True, lambda v: v * 0.5, x)"
        ),
        "too costly",
        "loop-iterations",
    ),
    (
        "a loop in a condition",
        merge(
            "x = task_vectors['expert_1']\nloop = jax.lax.while_loop\n"
            "inner = lambda v: loop(lambda w: w > 1.0, lambda w: w * 0.5, jnp.max(v)) > 0.5\n"
            "return loop(inner, lambda v: v * 0.5, x)"
        ),
        "refused",
        "nesting",
    ),
    (
        "endless integers",
        merge(
            "n = jax.lax.while_loop(lambda i: i >= 0, lambda i: i * 0, 0)\n"
            "return n + task_vectors['expert_1']"
        ),
        "too costly",
        "loop-iterations",
    ),
    (
        "endless loop in Python",
        "while True:\n    pass\n" + VALID["linear"],
        "too costly",
        "steps",
    ),
    (
        "endless comprehension",
        "import itertools\n" + merge("return sum(0.0 for _ in itertools.count())"),
        "too costly",
        "steps",
    ),
    (
        "exponential recursion",
        merge("f = lambda n: 1.0 if n < 1 else f(n - 1) + f(n - 1)\nreturn f(40)"),
        "too costly",
        "steps",
    ),
    ("endless host work", "sum(range(10**12))\n" + VALID["linear"], "timed out", "cpu"),
]
