"""`sdjax merge --algorithm` with zoo models."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.cli.merge import merge_algorithm_file
from sdjax.cli.open_algorithm import parse_parameters, source_of_method
from sdjax.cli.sandbox_options import signature_from_options
from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import model_folder
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
from sdjax.merging.recipe.model_card import Provenance
from sdjax.models.tree import flatten
from sdjax.programs.signature import merge_signature

EXPERTS = {"expert_1": "zoo:reader", "expert_2": "zoo:calculator"}
TENSOR = """import jax.numpy as jnp

def merge_models(task_vectors, depth):
    a, b = task_vectors["expert_1"], task_vectors["expert_2"]
    return jnp.where(a * b > 0, 0.5 * (a + b), (1 - depth) * a)
"""
TREE = """import jax.numpy as jnp

def merge_trees(task_vectors):
    a = task_vectors["expert_1"]
    total = sum(jnp.sum(x * x) for x in a.values())
    return {path: x / jnp.sqrt(total) for path, x in a.items()}
"""


def leaves(folder) -> dict[str, np.ndarray]:
    _, params = load_model(folder)
    return {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}


def merged(tmp_path, source, **options):
    (tmp_path / "mine.py").write_text(source)
    merge_algorithm_file(
        str(tmp_path / "mine.py"), "zoo:seed", EXPERTS, tmp_path / "out", **options
    )
    seed = leaves(model_folder("zoo:seed"))
    vectors = [leaves(model_folder(name)) for name in EXPERTS.values()]
    return leaves(tmp_path / "out"), seed, [{p: v[p] - seed[p] for p in v} for v in vectors]


def close(got, want):
    # The zoo models are stored in bfloat16.
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_program_merges_the_tensors_in_scope(tmp_path, scope):
    got, seed, (a, b) = merged(tmp_path, TENSOR, **({} if scope == "all" else {"scope": scope}))
    layers = 1 + max(int(p.split("/")[1]) for p in seed if p.startswith("layers/"))
    for path, at in seed.items():
        if scope == "mlp" and "/mlp/" not in path:
            np.testing.assert_array_equal(got[path], at)
            continue
        depth = int(path.split("/")[1]) / (layers - 1) if path.startswith("layers/") else -1
        x, y = a[path], b[path]
        close(got[path], at + np.where(x * y > 0, 0.5 * (x + y), (1 - depth) * x))
    assert (tmp_path / "out" / "program.py").read_text() == TENSOR
    card = (tmp_path / "out" / "README.md").read_text()
    assert "```python" in card
    assert "- base: `zoo:seed`\n- expert_1: `zoo:reader`\n- expert_2: `zoo:calculator`\n" in card
    count = sum("/mlp/" in path for path in seed)
    part = f"{count} of {len(seed)} tensors (scope mlp); {len(seed) - count} copied from the base"
    assert f"merged {part if scope == 'mlp' else f'all {len(seed)} tensors'}\n" in card


WEIGHTED = """from sdjax import PerExpert

def merge_models(task_vectors, weight: PerExpert = 1.0, scale: float = 1.0, negate: bool = False):
    total = sum(weight[name] * vector for name, vector in task_vectors.items())
    return scale * (-total if negate else total)
"""


def test_parameters_of_a_program(tmp_path):
    parameters = parse_parameters(["weight=0.3,0.5", "negate=true", "scale=1e-1"])
    assert parameters == {"weight": [0.3, 0.5], "negate": True, "scale": 0.1}
    got, seed, (a, b) = merged(tmp_path, WEIGHTED, parameters=parameters, scope="layers/0/*")
    for path, at in seed.items():
        change = -0.1 * (0.3 * a[path] + 0.5 * b[path]) if path.startswith("layers/0/") else 0
        close(got[path], at + change)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Hyperparameters: `weight=[0.3, 0.5], negate=True, scale=0.1`" in card


@pytest.mark.slow
def test_a_method_by_name_equals_its_file(tmp_path):
    values = {"weight": {"expert_1": 0.4, "expert_2": 0.2}, "density": 0.5, "elect": "plain"}
    source = source_of_method("ties")
    (tmp_path / "copy.py").write_text(source)
    for name, out in (("ties", "by_name"), (str(tmp_path / "copy.py"), "by_file")):
        merge_algorithm_file(
            name, "zoo:seed", EXPERTS, tmp_path / out, parameters=values, scope="*/up_proj"
        )
        assert (tmp_path / out / "program.py").read_text() == source
    tensors = [
        (tmp_path / out / "model.safetensors").read_bytes() for out in ("by_name", "by_file")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("tiess", {}, "tiess: no such file or merge method; did you mean ties?"),
        ("mine.py", {}, "mine.py: no such file"),
        ("ties", {"densty": 0.3}, "no hyperparameter 'densty'; did you mean density.*keep_ties$"),
        ("ties", {"density": "much"}, r"'density' must be .*\(hyperparameters: weight = 1\.0"),
        ("ties", {"weight": [0.1, 0.2, 0.3]}, "'weight' has 3 values for 2 experts"),
    ],
)
def test_mistakes_in_names_and_values(tmp_path, name, parameters, message):
    with pytest.raises(UserError, match=message) as caught:
        merge_algorithm_file(
            name, "zoo:seed", EXPERTS, tmp_path / "out", parameters=parameters, scope="*/up_proj"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["density", "=0.3", "density=", "density=null", "density=[", "a=1 a"]
)
def test_malformed_parameters(text):
    with pytest.raises(UserError, match="--param"):
        parse_parameters([text, text])


def test_program_in_the_tree_form(tmp_path):
    got, seed, (a, _) = merged(tmp_path, TREE, scope="*/mlp/down_proj")
    paths = [path for path in seed if path.endswith("down_proj")]
    total = np.sqrt(sum(np.sum(a[path].astype(np.float64) ** 2) for path in paths))
    for path, at in seed.items():
        close(got[path], at + (a[path] / total if path in paths else 0))


@pytest.mark.parametrize(
    ("source", "experts", "message"),
    [
        ("import os\n" + TENSOR, EXPERTS, r"mine.py: refused \(import\)"),
        (TENSOR, {"math": "zoo:reader", "code": "zoo:calculator"}, "expert_1"),
        (TENSOR, {}, "at least one --expert"),
        (
            TENSOR,
            {"expert_1": "nowhere", "expert_2": "zoo:reader"},
            "nowhere: no such model folder",
        ),
    ],
)
def test_refused_program_writes_nothing(tmp_path, source, experts, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=message) as caught:
        merge_algorithm_file(str(tmp_path / "mine.py"), "zoo:seed", experts, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_check_and_merge_judge_alike():
    """Equal signatures give a program the same identity in both commands."""
    models = open_models("zoo:seed", EXPERTS, Path.cwd())
    for scope in ("all", "mlp"):
        checked = signature_from_options(model="zoo:seed", experts=2, scope=scope, run=None)
        assert checked == merge_signature(models, scope)


def halves(task_vectors):
    return 0.5 * task_vectors["expert_1"] - task_vectors["expert_2"]


def merge_trees(task_vectors):
    return {path: 0.5 * x for path, x in task_vectors["expert_1"].items()}


@pytest.mark.parametrize("function", [halves, merge_trees])
def test_only_the_same_merge_is_resumed(tmp_path, function):
    def run(base, first, second, scope, on_tensor=None):
        models = open_models(base, {"expert_1": first, "expert_2": second}, tmp_path)
        provenance = Provenance(method="mine", file="program.py", text="the same")
        method = Algorithm.from_function(function)
        out, key = tmp_path / "out", jax.random.key(0)
        return merge_algorithm(
            method, models, scope, out, provenance=provenance, key=key, on_tensor=on_tensor
        )

    def stop(done, total):
        if done == 12:
            raise KeyboardInterrupt

    first = ("zoo:seed", "zoo:reader", "zoo:calculator", "mlp")
    for again, same in [
        (("zoo:seed", "zoo:calculator", "zoo:reader", "mlp"), False),
        (("zoo:reader", "zoo:seed", "zoo:calculator", "mlp"), False),
        (("zoo:seed", "zoo:reader", "zoo:calculator", "layers/1/mlp/*"), False),
        (first, True),
    ]:
        with pytest.raises(KeyboardInterrupt):
            run(*first, on_tensor=stop)
        assert (run(*again).resumed >= 12) == same
        shutil.rmtree(tmp_path / "out")


def test_merge_that_does_not_fit_into_memory_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sdjax.sharding.memory.host_memory", lambda: 10_000)
    arguments = ["merge", "--algorithm", "task_arithmetic", "--base", "zoo:seed"]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [*arguments, "--expert", "expert_1=zoo:reader", str(out)])
    assert result.exit_code == 2
    assert re.fullmatch(
        r"sdjax: the compiled merge needs \S+ GB of memory at once, but the machine has 1e-05 GB;"
        r" merge fewer tensors or models, or use a machine with more memory\n",
        result.output,
    )
    assert list(tmp_path.iterdir()) == []
