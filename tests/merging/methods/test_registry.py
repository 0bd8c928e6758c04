import jax
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.merging.methods.registry import algorithm, methods
from sdjax.merging.signature import STATISTICS

NAMES = [
    "linear",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "passthrough",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "model_stock",
    "sce",
    "arcee_fusion",
    "nearswap",
    "ram",
    "ramplus_tl",
    "tsv",
    "iso_c",
    "iso_cts",
    "subspace_boosting",
    "svc",
    "opcm",
    "wudi",
    "doge",
    "magmax",
    "consensus",
    "pcb",
    "lines",
    "expo",
    "fisher",
    "regmean",
    "self_developing_a",
]


def test_methods_lists_every_method():
    assert list(methods()) == NAMES
    ties = methods()["ties"]
    assert ties.summary.startswith("TIES: ")
    assert {p.name: p.default for p in ties.hyperparameters} == {
        "weight": 1.0,
        "density": 0.2,
        "scale": 1.0,
        "normalize": True,
        "elect": "weighted",
        "rescale": "none",
        "keep_ties": False,
    }
    assert [p.type for p in ties.hyperparameters][:3] == ["per_expert", "per_expert", "float"]
    for method in methods().values():
        assert method.formula.startswith("τ")
        assert "\n" not in method.formula


def test_methods_trace_for_any_number_of_dimensions():
    identities = {algorithm(name).identity for name in NAMES}
    assert len(identities) == len(NAMES)
    for method in methods().values():
        bound = method.bind()
        for shape in [(7,), (4, 6), (2, 3, 4)]:
            slots = ("a", "b", "c")[: method.schema.max_models]
            vectors = tuple(jax.ShapeDtypeStruct(shape, np.float32) for _ in slots)

            def run(vectors, arguments, bound=bound, slots=slots):
                requested = dict.fromkeys(STATISTICS)
                requested |= {"key": jax.random.key(0), "base": vectors[0], "depth": 0.5}
                return bound.call(slots, vectors, arguments, requested)

            out = jax.eval_shape(run, vectors, bound.hyperparameter_arrays(slots))
            assert (out.shape, out.dtype) == (shape, np.float32)


def test_unknown_method_raises_user_error():
    with pytest.raises(UserError, match="no merge method 'tie'; did you mean ties"):
        algorithm("tie")


def test_recipe_schemas_name_existing_hyperparameters():
    for method in methods().values():
        names, schema = {p.name for p in method.hyperparameters}, method.schema
        mentioned = {*schema.param_names, *schema.defaults, *schema.required, *schema.choices}
        assert mentioned <= names, method.name
        keys = [schema.recipe_key(name) for name in names]
        assert len({*keys, *schema.ignored}) == len(keys) + len(schema.ignored)
        assert "arXiv" in (method.algorithm.function.__globals__["__doc__"]) or method.name in (
            "slerp",
            "nuslerp",
            "multislerp",
            "passthrough",
            "arcee_fusion",
            "nearswap",
        )


def test_methods_with_published_evidence_against_them_say_so():
    cautious = {name for name, method in methods().items() if method.caution}
    assert cautious == {"tsv", "iso_c", "subspace_boosting"}
    assert all("arXiv 2511.21437" in methods()[name].caution for name in cautious)
