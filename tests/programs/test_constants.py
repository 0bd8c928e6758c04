import ast

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.programs.constants import find_constants
from sdjax.programs.grammar import sample_candidate
from sdjax.programs.parametric import parametric_form, with_values
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.tuning.programs import identity_without_defaults

SLOTS = ("expert_1", "expert_2", "expert_3")
SIGNATURE = MergeSignature.of(SLOTS, {"layers/0/mlp/up_proj": ("mlp.up_proj", (4, 6))})
HEAD = "import jax\nimport jax.numpy as jnp\nimport math\nimport numpy as np\n"


def program(expression, before="", parameters="task_vectors, depth"):
    body = f"    a, b, c = task_vectors.values()\n    return {expression}\n"
    return f"{HEAD}{before}\n\ndef merge_models({parameters}):\n{body}"


def starts(source):
    return {constant.name: constant.start for constant in find_constants(source, SLOTS)}


def verified(source):
    return verify_ir(trace_trusted(source, SIGNATURE), SIGNATURE)


def merged(source, **values):
    rng = np.random.default_rng(0)
    vectors = {slot: jnp.asarray(rng.standard_normal((4, 6)), jnp.float32) for slot in SLOTS}
    base, found = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32), verified(source)
    inputs = {"base": base, "depth": jnp.float32(0.3)}
    asked = {name: x for name, x in inputs.items() if name in found.requests}
    return np.asarray(found(vectors, **asked, **values))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0.7 * a - 0.5 * b", [0.7, 0.5]),
        ("-0.5 * a + .25 * b + 1e-1 * c", [-0.5, 0.25, 0.1]),
        ("1 / 3 * a + 2 / 3 * b", [1 / 3, 2 / 3]),
        ("a / 2.5", [2.5]),
        ("jnp.where(depth < 0.5, 0.6, 0.1) * c", [0.5, 0.6, 0.1]),
        ("jnp.tensordot(jnp.array([0.5, 0.3, 1]), jnp.stack([a, b, c]), axes=1)", [0.5, 0.3, 1.0]),
        ('sum({"a": 0.5, "b": 0}[k] * v for k, v in zip("ab", (a, b)))', [0.5, 0.0]),
        ("(1.0 - depth) * a + 1.0 / (1.0 + jnp.exp(-b)) * b", []),
        ("jnp.where(depth < 0.5, 1.0, 0.3) * a", [0.5, 1.0, 0.3]),
        ("a / jnp.where(a > 0, a, 1.0) + jnp.where(b > 0, 1.0, -1.0) + jnp.clip(c, -1.0, 1.0)", []),
        ("a ** 2 + jnp.abs(b) ** 0.5 + jnp.power(c, 3.0)", []),
        ("a / (jnp.linalg.norm(a) + 1e-8) + b / jnp.maximum(jnp.std(b), 1e-4)", []),
        ("jnp.clip(a, -1e9, 1e9)[0:2, ...].sum() * 2 * b / 3", []),
        ("a * math.sqrt(0.5) + b * np.float32(0.3) + c * int(0.5 * 7)", []),
        ("a if 0.5 * len(task_vectors) > 1 else b", []),
        ("jnp.mean(jnp.stack([a, b]), axis=(0,)) + (c + 1) / 2", []),
        (
            "jnp.round(100.0 * a * 0.7) + (0.5 * b).round(1) + jnp.round(a=0.3 * c, decimals=2)",
            [100.0, 0.7, 0.5, 0.3],
        ),
        ("jnp.reshape(jnp.array([0.5, 0.3, 0.2, 0.1]), (4, 1)) * a", [0.5, 0.3, 0.2, 0.1]),
        ("jnp.repeat(jnp.array([0.5, 0.3]), 3) * a", [0.5, 0.3]),
        ("jnp.tile(A=0.4 * a, reps=(1, 1)) + jnp.broadcast_to(0.6, b.shape) * b", [0.4, 0.6]),
        ("jnp.roll(0.4 * a, int(0.5 * 2)) + (0.6 * b).reshape(-1).reshape(b.shape)", [0.4, 0.6]),
        ("jnp.split(0.4 * a, 2)[0].sum() * b + jnp.expand_dims(0.6 * c, 0)[0]", [0.4, 0.6]),
        ("jax.lax.top_k(0.4 * a, 6)[0] + jnp.arange(0.0, 0.6, 0.1)", [0.4]),
        ("sum(w * v for i, (w, v) in enumerate(zip((0.4, 0.6), (a, b))))", [0.4, 0.6]),
        ("a * round(0.7 * 3)", []),
    ],
)
def test_use_decides_what_is_tunable(expression, expected):
    source = program(expression)
    assert list(starts(source).values()) == expected
    constants = find_constants(source, SLOTS)
    form = parametric_form(source, constants)
    assert form.count(": float=") == len(expected)
    if expected:
        np.testing.assert_allclose(merged(form), merged(source), rtol=2e-6, atol=1e-6)
    else:
        assert form == ast.unparse(ast.parse(source)) + "\n"


def test_bounds_follow_from_use():
    source = program("jnp.where(depth < 0.5, 0.6 * a, b / 2.5) + jnp.quantile(c, q=0.9) + 3.0 * c")
    bounds = {c.start: (c.low, c.high) for c in find_constants(source, SLOTS)}
    assert bounds == {
        0.5: (0, 1),
        0.6: (0.6 - 1.2, 0.6 + 1.2),
        2.5: (0.625, 10),
        0.9: (0, 1),
        3.0: (-3, 9),
    }


def test_existing_hyperparameters_are_parameters():
    parameters = (
        "task_vectors, scale: float = 1, rate=0.25, eps: float = 1e-8, n: int = 2, "
        "weight: PerExpert = 0.4, density: 'PerExpert' = (0.1, 0.2, 0.3)"
    )
    source = program("scale * rate * (weight['expert_1'] * a + density['expert_2'] * b + eps) / n")
    source = source.replace("task_vectors, depth", parameters)
    source = source.replace(
        "import math", "from sdjax.merging.algorithm import PerExpert\nimport math"
    )
    constants = find_constants(source, SLOTS)
    names = [(c.name, c.expert) for c in constants]
    experts = range(3)
    assert names[:2] == [("scale", None), ("rate", None)]
    assert names[2:] == [(key, i) for key in ("weight", "density") for i in experts]
    form = parametric_form(source, constants)
    assert set(verified(form).hyperparameters) == {
        *("scale", "rate", "eps"),
        *(f"{key}.{i + 1}" for key in ("weight", "density") for i in experts),
    }
    tuned = with_values(source, constants, [2.0, 0.5, 0.1, 0.2, 0.3, 0.1, 0.2, 0.7])
    assert "scale: float = 2.0, rate=0.5, eps: float = 1e-8, n: int = 2" in tuned
    assert "weight: PerExpert = (0.1, 0.2, 0.3), density: 'PerExpert' = (0.1, 0.2, 0.7)" in tuned
    expected = merged(form, scale=2.0, rate=0.5, **{"weight.1": 0.1, "density.2": 0.2})
    np.testing.assert_allclose(merged(tuned), expected, rtol=1e-6)


def test_names_come_from_the_program_and_shadow_nothing():
    before = "ALPHA = 0.5\ndef f(v, k=0.3):\n    return k * jnp.tanh(v * 1.5)\n"
    source = program("ALPHA * f(a, k=0.9) + w[0] * b + d['x'] * c + e * a", before).replace(
        "    return ALPHA",
        "    w = [0.1, 0.2]\n    d = {'x': 0.4}\n    c1, e = c, 0.6\n    return ALPHA",
    )
    assert list(starts(source)) == ["ALPHA_1", "k_1", "c2", "w_1", "w_2", "d_x", "e_1", "k_2"]
    form = parametric_form(source, find_constants(source, SLOTS))
    function = ast.parse(form).body[-1]
    assert [node.name for node in function.body if isinstance(node, ast.FunctionDef)] == ["f"]
    np.testing.assert_array_equal(merged(form), merged(source))
    assert (merged(form, ALPHA_1=0.6) != merged(source)).any()


@pytest.mark.parametrize(
    "before",
    [
        "a = 0.5\ndef f(v):\n    return a * v\n",  # `a` is another value inside the function
        "k = 0.5\ndef f(v):\n    global k\n    return k * v\n",
    ],
)
def test_a_helper_that_cannot_move_keeps_its_constants(before):
    source = program("0.7 * f(a)", before)
    constants = find_constants(source, SLOTS)
    assert [constant.start for constant in constants] == [0.7]
    np.testing.assert_array_equal(merged(parametric_form(source, constants)), merged(source))


def test_tuned_numbers_keep_comments_and_layout():
    source = (
        "def merge_models(task_vectors):\r\n"
        '    a, b, c = task_vectors.values()  # é "0.5"\r\n'
        "    é = 0.5 * a; return (é - 0.7*b  # 0.7\r\n"
        "        + -0.5 * c + 1/3*a)\r\n"
    )
    constants = find_constants(source, SLOTS)
    assert with_values(source, constants, [c.start for c in constants]) == source
    tuned = with_values(source, constants, [-0.25, -1.5, 0.125, 0.25])
    expected = source.replace("é = 0.5", "é = (-0.25)").replace("- 0.7*b", "- (-1.5)*b")
    assert tuned == expected.replace("-0.5 * c", "0.125 * c").replace("1/3", "0.25")
    np.testing.assert_allclose(
        merged(tuned),
        merged(parametric_form(source, constants), c1=-0.25, c2=-1.5, c3=0.125, c4=0.25),
    )


def check_drawn(count, seed):
    """Check random programs of the grammar; return how many had constants."""
    rng, tuned = np.random.default_rng(seed), 0
    for _ in range(count):
        candidate = sample_candidate(rng, allow_held_out=True)
        constants = [] if candidate.fails else find_constants(candidate.text, SLOTS)
        if not constants:
            continue
        tuned += 1
        form = parametric_form(candidate.text, constants)
        np.testing.assert_array_equal(merged(form), merged(candidate.text))
        text = with_values(candidate.text, constants, [c.start + 0.015 for c in constants])
        text = "# other layout\n" + text.replace("(", "( ")
        others = find_constants(text, SLOTS)
        assert [constant.name for constant in others] == [constant.name for constant in constants]
        traces = [trace_trusted(one, SIGNATURE) for one in (form, parametric_form(text, others))]
        assert len(set(map(identity_without_defaults, traces))) == 1
    return tuned


def test_forms_of_random_programs_merge_alike_and_share_their_identity():
    assert check_drawn(8, seed=0) >= 6


@pytest.mark.slow
def test_forms_of_hundreds_of_random_programs():
    assert check_drawn(400, seed=1) >= 340


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def merge_models(task_vectors:\n", "line 1: "),
        ("x = 0.5\n", "no function merge_models"),
        ("-" * 20_000 + "0.5", "nested too deeply"),
        (program("+".join(["0.5 * a"] * 3_000)), "nested too deeply"),
    ],
)
def test_source_that_cannot_be_read_is_refused(source, message):
    with pytest.raises(UserError) as raised:
        find_constants(source, SLOTS)
    assert message in str(raised.value)
