import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.merging.engine import Merger
from sdjax.merging.methods.registry import methods
from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
from sdjax.merging.recipe.model_card import Provenance
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.tuning.families import family_tunable
from sdjax.tuning.open_tunable import open_tunable


def away_from_start(tunable):
    """Return values between the start and a bound, different for each parameter."""
    share = np.linspace(0.1, 0.4, len(tunable.parameters))
    return tunable.start + share * (tunable.bounds[:, 1] - tunable.start - 1e-3)


FAST = {("linear:slope", "mlp"), ("kinds", "all")}
CASES = [
    pytest.param(what, scope, marks=() if (what, scope) in FAST else pytest.mark.slow)
    for what in ("weights", "linear:slope", "ties:layers", "kinds", "iso_c")
    for scope in ("all", "mlp", "layers/1/*")
    if (what, scope) != ("kinds", "layers/1/*")
]


@pytest.mark.parametrize(("what", "scope"), CASES)
def test_the_written_recipe_merges_as_in_memory(folders, tensors, model_set, what, scope):
    models = model_set(scope=scope)
    tunable = open_tunable(what, models)
    values = away_from_start(tunable)
    (folders / "tuned.yaml").write_text(tunable.write(values))
    merge_recipe(folders / "tuned.yaml", folders / "merged")
    by_recipe = tensors(folders / "merged")
    base, *experts = (tensors(folders / name) for name in ("base", "math", "code"))
    merged = Merger(base, experts, scope=scope)(tunable.bind(values)).params
    assert by_recipe.keys() == merged.keys()
    for name, tensor in merged.items():
        assert by_recipe[name].dtype == tensor.dtype
        if tensor.dtype == jnp.bfloat16:
            np.testing.assert_array_equal(by_recipe[name], np.asarray(tensor), err_msg=name)
        else:  # merges from disk are compiled with other options (`compile_for_single_use`)
            np.testing.assert_allclose(by_recipe[name], np.asarray(tensor), rtol=0, atol=1e-6)
    changed = {name for name in merged if (by_recipe[name] != base[name]).any()}
    assert changed == {name for name in base if scope == "all" or _in_scope(name, scope)}


def test_the_written_recipe_gives_every_tensor_the_same_bits(folders, tensors, model_set):
    models = model_set(scope="mlp")
    tunable = open_tunable("kinds", models)
    values = away_from_start(tunable)
    (folders / "tuned.yaml").write_text(tunable.write(values))
    merge_recipe(folders / "tuned.yaml", folders / "merged")
    merge_algorithm(
        tunable.bind(values),
        open_models("base", models.experts, folders),
        "mlp",
        folders / "by_algorithm",
        provenance=Provenance(method="tuned", file="tuned.yaml", text="", seed=0),
        key=jax.random.key(0),
    )
    by_recipe, by_algorithm = tensors(folders / "merged"), tensors(folders / "by_algorithm")
    assert by_recipe.keys() == by_algorithm.keys()
    for name, tensor in by_recipe.items():
        np.testing.assert_array_equal(tensor, by_algorithm[name], err_msg=name)


def test_a_scope_that_no_filter_selects_is_refused(model_set):
    tunable = open_tunable("kinds", model_set(scope="layers/1/*"))
    with pytest.raises(UserError, match="cannot express the scope"):
        tunable.write(tunable.start)


def _in_scope(name, scope):
    return f".{scope}." in name if scope == "mlp" else ".layers.1." in name


def test_numbers_belong_to_the_layer_and_the_kind_that_their_name_says(model_set):
    tunable = family_tunable("task_arithmetic", "kinds", model_set())
    names = [parameter.name for parameter in tunable.parameters]
    assert len(set(names)) == len(names) == 2 * (3 * 3 + 3)
    base = {path: jnp.zeros(2) for path in model_set().paths}
    experts = [{path: jnp.ones(2) * scale for path in base} for scale in (1.0, 100.0)]
    merger = Merger(base, experts)
    for position in (0, names.index("weight[expert_2, layer 1, mlp.up_proj]")):
        values = np.zeros(len(names))
        values[position] = 0.5
        params = merger(tunable.bind(values)).params
        changed = {path for path, x in params.items() if np.any(np.asarray(x))}
        expected = {"model.layers.1.mlp.up_proj.weight"} if position else changed
        assert changed == expected
        assert len(changed) == 1
    # The filter of up_proj is not part of gate_up_proj's name.
    assert params["model.layers.1.mlp.up_proj.weight"][0] == 50.0


def test_a_slope_is_a_line_in_depth(model_set):
    tunable = family_tunable("task_arithmetic", "slope", model_set())
    algorithm = tunable.bind(np.array([0.0, 1.0, 0.5, 0.5]))
    weights = [algorithm.at("any.name", depth).hyperparameters["weight"] for depth in (0, 0.5, 1)]
    assert weights == [(0.0, 0.5), (0.5, 0.5), (1.0, 0.5)]
    assert algorithm.at("any.name", -1.0).hyperparameters["weight"] == (0.0, 0.5)


def test_other_values_compile_nothing(model_set):
    base = {path: jnp.zeros((2, 2)) for path in model_set().paths}
    experts = [{path: jnp.ones((2, 2)) for path in base} for _ in range(2)]
    merger = Merger(base, experts)
    for family in ("weights", "slope", "layers", "kinds"):
        tunable = family_tunable("task_arithmetic", family, model_set())
        merger(tunable.bind(away_from_start(tunable)))
        assert tunable.bind(tunable.start).identity == methods()["task_arithmetic"].bind().identity
    assert merger.compile_cache.compiled == 1


def test_gradients_reach_every_number(model_set):
    base = {path: jnp.zeros(2) for path in model_set().paths}
    experts = [{path: jnp.ones(2) for path in base} for _ in range(2)]
    merger = Merger(base, experts)
    tunable = family_tunable("task_arithmetic", "kinds", model_set())

    @jax.jit
    def total(values):
        return sum(x[0] for x in merger(tunable.bind(values)).params.values())

    gradient = jax.grad(total)(jnp.asarray(tunable.start, jnp.float32))
    np.testing.assert_allclose(gradient, 1.0)


NOTHING_TO_TUNE = ("karcher", "model_stock", "arcee_fusion", "ram", "wudi")


@pytest.mark.parametrize("name", methods())
def test_every_method_has_numbers_within_bounds_or_says_so(model_set, name):
    one = methods()[name].schema.max_models == 1
    models = model_set(experts={"expert_1": "math"}) if one else model_set()
    if name in NOTHING_TO_TUNE:
        with pytest.raises(UserError, match="no number to tune"):
            open_tunable(name, models)
        return
    tunable = open_tunable(name, models)
    for values in (tunable.start, tunable.bounds[:, 1]):
        assert tunable.bind(values).identity == tunable.bind(tunable.start).identity
        assert tunable.write(values)


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("wieghts", {}, "no method or family 'wieghts'; did you mean weights?"),
        ("nope", {}, "no method or family 'nope'; families: weights, slope, layers, kinds; `sdjax"),
        ("ties:layer", {}, "no family 'layer'; did you mean layers?"),
        ("layers", {"paths": ("a", "b")}, "layers needs the layers, but no tensor in scope is"),
        ("slope", {"paths": ("layers/0/mlp/up_proj",)}, "slope needs at least two layers"),
        ("nearswap", {}, "nearswap takes exactly 1 expert, not 2"),
        ("nuslerp", {"experts": {"a": "x"}}, "nuslerp takes exactly 2 experts, not 1"),
        ("weights", {"experts": {}}, "task_arithmetic takes at least 1 expert, not 0"),
        ("ram", {}, "ram has no number to tune (hyperparameters: epsilon)"),
        ("sce", {"scope": "mlp"}, "sce: its recipes always merge all tensors"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(model_set, what, changes, message):
    with pytest.raises(UserError) as raised:
        open_tunable(what, model_set(**changes))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_normalized_weights_cannot_sum_to_zero(model_set):
    for what, low in (("weights", -1.0), ("linear", 0.01), ("ties", 0.01)):
        tunable = open_tunable(what, model_set())
        assert {p.low for p in tunable.parameters if p.name.startswith("weight")} == {low}
        tunable.bind(tunable.bounds[:, 0])


def test_a_start_outside_its_bounds_is_refused(model_set):
    with pytest.raises(UserError, match=r"density\[expert_1\]: the bounds \[0, 1\] exclude"):
        family_tunable("ties", "weights", model_set(), starts={"density": 2.0})
