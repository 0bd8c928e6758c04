import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger
from sdjax.sandbox.merge_trial import MergeTrial
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.tuning.differentiability import blocking_operations
from sdjax.tuning.families import family_tunable
from sdjax.tuning.programs import MAX_CONSTANTS, program_tunable

SLOTS = ("expert_1", "expert_2")
PATHS = ("layers/0/mlp/up_proj", "layers/1/mlp/up_proj")
SOURCE = """\
import jax.numpy as jnp


def merge_models(task_vectors, depth):
    a, b = task_vectors.values()
    weights = [0.7, -0.3]  # found by hand
    return weights[0] * a + jnp.where(depth < 0.5, weights[1], 1 / 3) * b / max(2.0, 1.5)
"""
TRIAL = MergeTrial(memory=1 << 40, tensors=(), compiler="full")
OTHER = SOURCE.replace("0.7, -0.3", "0.2,  0.9").replace("< 0.5", "<  0.75").replace("1 / 3", "0.1")


@pytest.fixture(scope="module")
def sandbox():
    signature = MergeSignature.of(SLOTS, dict.fromkeys(PATHS, ("mlp.up_proj", (4, 6))))
    with Sandbox(signature, workers=1) as running:
        yield running


@pytest.fixture
def merger():
    rng = np.random.default_rng(0)
    base, *experts = (
        {path: jnp.asarray(rng.standard_normal((4, 6)), jnp.float32) for path in PATHS}
        for _ in range(3)
    )
    return Merger(base, experts, compile_cache=CompileCache())


@pytest.fixture(scope="module")
def tunable(sandbox):
    return program_tunable(SOURCE, sandbox, name="mine.py")


def test_a_program_is_tuned_by_its_constants(tunable, sandbox, merger):
    # `max` is Python's, which needs the numbers.
    assert {p.name: p.start for p in tunable.parameters} == {
        "weights_1": 0.7,
        "weights_2": -0.3,
        "c1": 0.5,
        "c2": 1 / 3,
    }
    values = np.array([0.123456789, 0.25, 0.75, 0.5])
    text = tunable.write(values)
    assert "weights = [0.123457, 0.25]  # found by hand" in text
    assert "depth < 0.75, weights[1], 0.5) * b / max(2.0, 1.5)" in text
    other = program_tunable(text, sandbox, name="tuned.py")
    assert list(other.start) == [0.123457, 0.25, 0.75, 0.5]
    assert other.bind(other.start).identity == tunable.bind(values).identity
    merged = [merger(t.bind(v)).params for t, v in ((tunable, values), (other, other.start))]
    for path in PATHS:
        np.testing.assert_array_equal(merged[0][path], merged[1][path])


def test_programs_that_differ_in_constants_share_their_executables(tunable, sandbox, merger):
    merger(tunable.bind(tunable.start))
    other = program_tunable(OTHER, sandbox, name="other.py")
    for one in (tunable, other):
        for shift in (0.0, 0.01, 0.02):
            merger(one.bind(one.start + shift))
    assert merger.compile_cache.compiled == 1


def test_the_parametric_form_merges_as_the_program_does(tunable, sandbox, merger):
    def direct(task_vectors, depth):
        a, b = task_vectors.values()
        return 0.7 * a + jnp.where(depth < 0.5, -0.3, 1 / 3) * b / max(2.0, 1.5)

    expected = merger(Algorithm.from_function(direct)).params
    merged = merger(tunable.bind(tunable.start)).params
    for path in PATHS:  # XLA multiplies by the reciprocal of a literal
        np.testing.assert_allclose(merged[path], expected[path], rtol=0, atol=1e-6)


def test_a_threshold_on_the_depth_has_no_gradient(tunable, merger):
    def total(values):
        return sum(jnp.sum(x) for x in merger(tunable.bind(values)).params.values())

    assert blocking_operations(total, 4) == {2: ("lt",)}
    gradient = jax.jit(jax.grad(total))(jnp.asarray(tunable.start, jnp.float32))
    assert gradient[2] == 0
    assert (np.asarray(gradient)[[0, 1, 3]] != 0).all()


def test_no_more_constants_than_the_limit_are_tuned(sandbox, caplog):
    terms = " + ".join(f"{i / 100 + 0.5} * a" for i in range(MAX_CONSTANTS + 3))
    source = (
        f"def merge_models(task_vectors):\n    a, b = task_vectors.values()\n    return {terms}\n"
    )
    with caplog.at_level(logging.WARNING):
        tunable = program_tunable(source, sandbox, name="long.py")
    assert len(tunable.parameters) == MAX_CONSTANTS
    assert "long.py: 32 of its 35 constants are tuned" in caplog.text


def test_constants_without_effect_are_left_out(sandbox):
    body = "unused = 0.7\n    a, b = task_vectors.values()\n    return 0.5 * a"
    source = f"def merge_models(task_vectors, rate: float = 0.1):\n    {body}\n"
    tunable = program_tunable(source, sandbox, name="mine.py")
    assert [parameter.name for parameter in tunable.parameters] == ["c1"]
    assert tunable.write(np.array([0.25])) == source.replace("0.5", "0.25")


CHAIN = """\
import jax.numpy as jnp


def merge_models(task_vectors):
    x = 0.5 * task_vectors["expert_1"]
    for _ in range(270):
        x = jnp.sin(x)
    return x
"""


@pytest.mark.parametrize(
    ("source", "failing", "tried", "reason"),
    [
        (SOURCE, None, ["merge", "gradient"], None),
        (SOURCE, "gradient", ["merge", "gradient"], "compiler (crash): XLA crashed"),
        # Only the merge may be compiled.
        (
            CHAIN,
            None,
            ["merge"],
            "too costly (code-size): a chain of elementwise operations is 1352",
        ),
    ],
)
def test_refusal_of_the_gradient_leaves_a_tunable(
    sandbox, monkeypatch, source, failing, tried, reason
):
    seen = _fail_trials(sandbox, monkeypatch, failing)
    tunable = program_tunable(source, sandbox, name="mine.py", trial=TRIAL)
    assert [trial.computes for trial in seen] == tried
    assert {trial.compiler for trial in seen} == {"full"}
    assert (tunable.gradient_refusal or "").startswith(reason or "")
    assert (tunable.gradient_refusal is None) == (reason is None)


def test_gradient_that_no_search_uses_is_not_tried(sandbox, monkeypatch):
    seen = _fail_trials(sandbox, monkeypatch, "gradient")
    tunable = program_tunable(SOURCE, sandbox, name="mine.py", trial=TRIAL, with_gradient=False)
    assert [trial.computes for trial in seen] == ["merge"]
    assert tunable.gradient_refusal is None


def test_refusal_of_the_merge_is_an_error(sandbox, monkeypatch):
    _fail_trials(sandbox, monkeypatch, "merge")
    with pytest.raises(UserError, match=r"^mine\.py: compiler \(crash\): XLA crashed$"):
        program_tunable(SOURCE, sandbox, name="mine.py", trial=TRIAL)


def _fail_trials(sandbox, monkeypatch, failing):
    """Have the trial of the merge, or of the gradient, refused; return the trials to come."""
    seen = []

    def try_merge(ir, trial):
        seen.append(trial)
        return Refusal("compiler", "crash", "XLA crashed") if trial.computes == failing else None

    monkeypatch.setattr(sandbox, "try_merge", try_merge)
    return seen


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return a + b", "mine.py: no constant to tune; write a weight as a number"),
        ("return a * sorted([0.5, 0.3])[0]", "mine.py: its constants cannot be tuned; as hyperpar"),
        ("return open('x')", "mine.py: refused (name): line 3: `open` is not allowed"),
    ],
)
def test_a_program_that_cannot_be_tuned_is_refused_in_one_line(sandbox, body, message):
    source = f"def merge_models(task_vectors):\n    a, b = task_vectors.values()\n    {body}\n"
    with pytest.raises(UserError) as raised:
        program_tunable(source, sandbox, name="mine.py")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_method_without_a_base_is_written_as_a_program(sandbox, model_set):
    tunable = family_tunable("slerp", "weights", model_set(experts={"a": "x", "b": "y"}))
    assert [(p.name, p.start, p.low, p.high) for p in tunable.parameters] == [("t", 0.5, 0.0, 1.0)]
    text = tunable.write(np.array([0.3]))
    assert "t: float = 0.3" in text
    assert sandbox.judge(text).admitted
    assert tunable.bind(np.array([0.3])).hyperparameters == {"t": 0.3}
    with pytest.raises(UserError, match="slerp: its recipes subtract no base"):
        family_tunable("slerp", "layers", model_set())
