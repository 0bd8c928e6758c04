"""The grammar: validity, faults, variety; and the families of its programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.programs.constants import find_constants
from sdjax.programs.families import FAMILIES, HELD_OUT, families_of
from sdjax.programs.grammar import RandomCandidate, sample_candidate
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SHAPE = (8, 6)
FORBIDDEN = ("os", "sys", "subprocess", "socket", "torch")


@functools.cache
def samples(
    count: int = 5000, seed: int = 7, held_out: bool = False
) -> tuple[RandomCandidate, ...]:
    rng = np.random.default_rng(seed)
    return tuple(sample_candidate(rng, allow_held_out=held_out) for _ in range(count))


@functools.cache
def families_in(source: str, slots: int = 3) -> frozenset[str] | None:
    """Return the families of a program; None if the sandbox refuses it."""
    names = tuple(f"expert_{n + 1}" for n in range(slots))
    tensors = {"layers/0/mlp/up_proj": ("mlp.up_proj", SHAPE)}
    if "kind" in source:  # shapes alone do not reveal the kind
        tensors["layers/0/mlp/gate_proj"] = ("mlp.gate_proj", SHAPE)
        tensors["layers/0/mlp/down_proj"] = ("mlp.down_proj", SHAPE)
    signature = MergeSignature.of(names, tensors)
    try:
        return families_of(verify_ir(trace_trusted(source, signature), signature))
    except Refusal:
        return None


@functools.cache
def detected(count: int = 1000) -> tuple[tuple[RandomCandidate, frozenset[str]], ...]:
    """Return the sound programs among the first samples, with the families read from their IR."""
    sound = [program for program in samples()[:count] if not program.fails]
    found = [(program, families_in(program.text)) for program in sound]
    assert all(families is not None for _, families in found)
    return tuple((program, families) for program, families in found if families is not None)


@functools.cache
def inputs(slots: int = 3) -> tuple[dict, dict]:
    rng = np.random.default_rng(5)

    def draw(scale: float) -> jax.Array:
        return jnp.asarray(rng.normal(size=SHAPE) * scale, jnp.float32)

    scales = (0.01, 0.013, 0.03, 0.02, 0.008)[:slots]
    vectors = {f"expert_{i}": draw(scale) for i, scale in enumerate(scales, start=1)}
    return vectors, {"base": draw(0.1), "depth": jnp.float32(0.4)}


def run(text: str, slots: int = 3) -> np.ndarray | str:
    """Return the merged tensor or the reason for refusal. Only for programs of the grammar."""
    if any(f"import {module}" in text for module in FORBIDDEN):
        return "forbidden import"
    vectors, extras = inputs(slots)
    try:
        namespace: dict = {}
        exec(compile(text, "program", "exec"), namespace)
        function = namespace["merge_models"]
        requests = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        static = {"kind": "mlp.down_proj"}

        def merged(vectors: dict, extras: dict) -> jax.Array:
            return function(vectors, **{name: (extras | static)[name] for name in requests})

        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (vectors, extras))
        traced = jax.make_jaxpr(merged)(*abstract)
    except Exception as error:
        return repr(error)
    if [(a.shape, a.dtype) for a in traced.out_avals] != [(SHAPE, jnp.float32)]:
        return "wrong shape"
    leaves = jax.tree.leaves((vectors, extras))
    result = np.asarray(jax.core.eval_jaxpr(traced.jaxpr, traced.consts, *leaves)[0])
    return result if np.isfinite(result).all() else "not finite"


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[RandomCandidate, np.ndarray | str]]:
    return [(program, run(program.text)) for program in samples()[:320]]


def test_sound_programs_run_and_faulty_ones_fail(outcomes):
    sound = [result for program, result in outcomes if not program.fails]
    broken = [(program.text, result) for program, result in outcomes if program.fails]
    refused = [result for result in sound if isinstance(result, str)]
    assert len(refused) <= 0.005 * len(sound), refused[:3]
    assert 0.06 <= len(broken) / len(outcomes) <= 0.16
    assert [text for text, result in broken if not isinstance(result, str)] == []


def test_results_are_distinct_and_vary_in_strength(outcomes):
    results = [r for program, r in outcomes if not program.fails and not isinstance(r, str)]
    same = {tuple(np.round(r.ravel() * 1e5).astype(int)) for r in results}
    assert len(same) >= 0.8 * len(results)
    vectors, _ = inputs()
    size = np.mean([float(jnp.linalg.norm(v)) for v in vectors.values()])
    low, middle, high = np.percentile([np.linalg.norm(r) / size for r in results], (5, 50, 95))
    assert low < 0.4 < middle < 1.0
    assert high > 1.4


def test_texts_are_distinct_and_short():
    texts = [program.text for program in samples()]
    assert len(set(texts)) >= 0.95 * len(texts)
    lengths = np.array([len(text) for text in texts])
    assert 150 <= lengths.mean() <= 260
    assert lengths.max() <= 420
    assert not any(text.endswith("\n") for text in texts)


def test_import_only_if_used():
    for program in samples():
        if not program.fails:
            assert program.text.startswith("import jax.numpy as jnp\n") == ("jnp." in program.text)


def test_same_seed_gives_the_same_programs():
    assert samples(50, 3) == samples.__wrapped__(50, 3)
    assert samples(50, 3) != samples(50, 4)


def test_share_of_failures():
    assert 0.09 <= np.mean([program.fails for program in samples()]) <= 0.13


def missing_labels(program: RandomCandidate, families: frozenset[str]) -> frozenset[str]:
    """Return the labels that are not found, except for what the IR cannot tell.

    A "weighted_sum" whose coefficients happen to be equal, `0.2 * a + 0.2 * b`, has the same IR as
    a loop that adds `0.2 * v`, which is "scaling", and the weights of an interpolation of experts
    that were scaled before, in some kinds, do not sum to one.
    """
    missing = program.families - families
    if "kind_gate" in families:
        missing -= {"interpolation"}
    return missing - {"weighted_sum"} if "scaling" in families else missing


def test_detected_families_cover_the_labels():
    for program, families in detected():
        assert not missing_labels(program, families), program.text
    assert sum(not program.families <= families for program, families in detected()) <= 8


def test_every_training_family_occurs_and_held_out_ones_never():
    counts: dict[str, int] = {}
    for _, families in detected():
        for family in families:
            counts[family] = counts.get(family, 0) + 1
    assert not HELD_OUT & counts.keys()
    assert counts.keys() == FAMILIES.keys() - HELD_OUT
    assert min(counts.values()) >= 8, counts


def test_rare_families_are_not_found_where_they_are_not():
    exact = FAMILIES.keys() - {"weighted_sum", "scaling", "interpolation"}
    for program, families in detected():
        assert families & exact == program.families & exact, program.text


def test_gates_of_single_experts_are_frequent():
    gate = re.compile(r"^ +(a|b|c|x|y|z|t1|t2|t3) = (.*depth|.*kind|\S+ \* \1$)", re.MULTILINE)
    gates = [len(gate.findall(p.text)) for p in samples() if not p.fails]
    assert np.mean([count >= 1 for count in gates]) >= 1 / 3
    assert np.mean([count >= 2 for count in gates]) >= 0.1


def test_numbers_are_tunable():
    for program in samples()[:150]:
        if not program.fails:
            numbers = re.findall(r"\d+\.\d+", program.text)
            found = len(find_constants(program.text, ("expert_1", "expert_2", "expert_3")))
            assert len(numbers) - numbers.count("1.0") <= found <= len(numbers), program.text


def test_kind_is_found_whether_or_not_the_shape_tells_it():
    source = BODY.replace("task_vectors)", "task_vectors, kind)")
    source += 'return a + (0.2 if kind == "mlp.down_proj" else 0.7) * b'
    assert "kind_gate" in (families_in(source) or ())
    tensors = {
        f"layers/0/mlp/{name}": (f"mlp.{name}", shape)
        for name, shape in (("up_proj", SHAPE), ("down_proj", SHAPE[::-1]))
    }
    signature = MergeSignature.of(("expert_1", "expert_2", "expert_3"), tensors)
    for text, expected in ((source, True), (source.replace("0.2", "0.7"), False)):
        program = verify_ir(trace_trusted(text, signature), signature)
        assert ("kind_gate" in families_of(program)) == expected


def test_two_of_three_experts_and_low_weights_are_frequent():
    sound = [program for program in samples() if not program.fails]
    assert 0.25 <= np.mean(["subset" in program.families for program in sound]) <= 0.45


def test_broken_programs_have_no_families():
    assert not any(program.families for program in samples() if program.fails)


def test_held_out_families_on_request():
    drawn = [program for program in samples(340, 5, True) if not program.fails]
    for family in HELD_OUT:
        assert sum(family in program.families for program in drawn) >= 12
    for program in drawn:
        families = families_in(program.text)
        assert families is not None
        assert families & HELD_OUT == program.families & HELD_OUT, program.text
    chosen = [program for program in drawn if program.families & HELD_OUT][:20]
    assert all(not isinstance(run(program.text), str) for program in chosen)


@pytest.mark.parametrize("slots", [2, 5])
def test_other_numbers_of_slots(slots):
    rng = np.random.default_rng(1)
    for _ in range(20):
        program = sample_candidate(rng, slots=slots)
        assert isinstance(run(program.text, slots), str) == program.fails, program.text
        if not program.fails:
            families = families_in(program.text, slots)
            assert families is not None
            assert not missing_labels(program, families), program.text


def test_slots_out_of_range():
    with pytest.raises(ValueError, match="between 2 and 5, not 1"):
        sample_candidate(np.random.default_rng(0), slots=1)


BODY = "def merge_models(task_vectors):\n    a, b, c = task_vectors.values()\n    "


@pytest.mark.parametrize(
    ("body", "present", "absent"),
    [
        ("return jnp.where(jnp.abs(a) > jnp.abs(b), a, b)", "max_magnitude", "magnitude_trim"),
        ("k = jnp.abs(a) >= jnp.abs(b)\n    return k * a + (1 - k) * b", "max_magnitude", "power"),
        ("return jnp.where(a**2 > b**2, a, b)", "max_magnitude", "sign_gate"),
        (
            "m = a\n    for v in [b, c]:\n        m = jnp.where(jnp.abs(v) > jnp.abs(m), v, m)\n"
            "    return m",
            "max_magnitude",
            "magnitude_trim",
        ),
        ("return b - jnp.vdot(a, b) / jnp.vdot(a, a) * a", "projection_removal", "center"),
        (
            "p = jnp.sum(a * b)\n    n = jnp.sum(a * a)\n    return a + 0.5 * (b - p * a / n)",
            "projection_removal",
            "sign_gate",
        ),
        ("return a + jnp.sum(a * b) / jnp.sum(b * b) * b", "cosine_weight", "projection_removal"),
        ("return a - 0.5 * jnp.mean(a)", "center", "projection_removal"),
        (
            "return jnp.where(jnp.abs(a) > jnp.quantile(jnp.abs(a), 0.8), a, 0)",
            "magnitude_trim",
            "max_magnitude",
        ),
        ("return jnp.sign(a) * jnp.maximum(jnp.abs(a) - 0.1, 0)", "magnitude_trim", "power"),
        ("return jnp.where(jnp.sign(a) == jnp.sign(b), a, c)", "sign_gate", "subset"),
        ("return jnp.mean(jnp.stack([a, b, c]), axis=0)", "mean", "row_mean"),
        (
            "f = lambda v: v / jnp.linalg.norm(v)\n    return f(a) + f(b)",
            "norm_balance",
            "saturation",
        ),
        ("return 0.4 * a + 0.2 * jnp.tanh(b)", "saturation", "mean"),
        ("return 0.4 * a + 0.2 * c", "subset", "scaling"),
        ("return sum(0.3 * v for v in task_vectors.values())", "scaling", "weighted_sum"),
        (
            # The IR has one coefficient per expert, and the first is zero.
            "return sum(0.1 * i * v for i, (k, v) in enumerate(task_vectors.items()))",
            "weighted_sum",
            "subset",
        ),
        ("b = b + jnp.mean(b, 0)\n    return 0.3 * (a + b + c)", "scaling", "weighted_sum"),
        ("return a / 2 + (b + 0.5 * jnp.tanh(b)) / 2", "interpolation", "weighted_sum"),
        ("return (a + b - 0.4 * jnp.mean(b, 0) + c) / 3", "mean", "weighted_sum"),
        ("return (a + b) / 2 + 0.1 * c", "mean", "interpolation"),
        (
            "return jnp.average(jnp.stack([a, b, c]), 0, weights=jnp.array([0.2, 0.3, 0.5]))",
            "mean",
            "subset",
        ),
        (
            "return jnp.average(jnp.stack([a, b, c]), 0, weights=jnp.array([0.2, 0.3, 0.5]))",
            "weighted_sum",
            "norm_balance",
        ),
    ],
)
def test_families_of_programs_outside_the_grammar(body, present, absent):
    families = families_in("import jax.numpy as jnp\n\n" + BODY + body)
    assert families is not None
    assert present in families
    assert absent not in families
