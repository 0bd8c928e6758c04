"""Recipes whose `merge_method` is a program file, with zoo models."""

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.cli.open_algorithm import source_of_method
from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.models.tree import flatten
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

PROGRAM = """from sdjax import PerExpert

def merge_models(task_vectors, depth, weight: PerExpert = 1.0, scale: float = 1.0, power: int = 1):
    a, b = task_vectors["expert_1"], task_vectors["expert_2"]
    merged = weight["expert_1"] * a + weight["expert_2"] * b
    return scale * merged * (1 + depth) ** power
"""
RECIPE = """merge_method: ./mine.py
base_model: zoo:seed
models:
  - model: zoo:reader
    parameters:
      weight: [0.2, 0.6]
  - model: zoo:calculator
    parameters:
      weight:
        - filter: up_proj
          value: 0.5
        - value: 0.1
parameters:
  scale: 0.5
  power: 2
"""


def write(folder, recipe=RECIPE, program=PROGRAM):
    (folder / "mine.py").write_text(program)
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def leaves(folder):
    return {p: np.asarray(x, np.float32) for p, x in flatten(load_model(str(folder))[1]).items()}


def run(recipe, out):
    return CliRunner().invoke(main, ["merge", str(recipe), str(out)])


def trace_here(file, slots, tensors, parameters):
    """Load a program without starting a sandbox."""
    shapes = {path: (kind, shape) for path, (kind, shape, _) in tensors.items()}
    signature = MergeSignature.of(slots, shapes)
    signature = dataclasses.replace(signature, parameters=tuple(parameters.items()))
    try:
        program = verify_ir(trace_trusted(file.read_text(), signature), signature)
    except Refusal as refusal:
        raise UserError(f"{refusal.verdict} ({refusal.rule}): {refusal.message}") from None
    return to_algorithm(program, name=file.stem), file.read_text()


TREE = """def merge_trees(task_vectors):
    return task_vectors["expert_1"]
"""


def test_a_program_in_the_tree_form_is_refused(tmp_path):
    recipe = write(tmp_path, RECIPE.partition("models:")[0] + "models: [{model: zoo:reader}]", TREE)
    with pytest.raises(UserError, match=r"line 1: \./mine\.py merges all tensors at once"):
        merge_recipe(recipe, tmp_path / "out", load_program=trace_here)


def test_program_file_with_parameters_of_the_recipe(tmp_path):
    result = run(write(tmp_path), tmp_path / "out")
    assert result.exit_code == 0, result.output
    seed, reader, calculator = map(leaves, ("zoo:seed", "zoo:reader", "zoo:calculator"))
    got = leaves(tmp_path / "out")
    layers = 1 + max(int(path.split("/")[1]) for path in seed if path.startswith("layers/"))
    for path, at in seed.items():
        inside = path.startswith("layers/")
        position = int(path.split("/")[1]) / (layers - 1) if inside else 0.0
        first, second = 0.2 + 0.4 * position, 0.5 if "up_proj" in path else 0.1
        change = first * (reader[path] - at) + second * (calculator[path] - at)
        depth = position if inside else -1.0
        want = at + 0.5 * change * (1 + depth) ** 2
        np.testing.assert_allclose(got[path], want, rtol=2**-7, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method: ./mine.py" in card
    assert PROGRAM.rstrip() in card
    assert (tmp_path / "out" / "program.py").read_text() == PROGRAM
    assert (tmp_path / "out" / "recipe.yaml").read_text() == RECIPE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  scale: 0.5", "  scael: 0.5", "did you mean scale? available: weight: PerExpert = 1.0"),
        ("  power: 2", "  power: [1, 2]", "'power' has a single value for the whole merge"),
        ("  power: 2", "  power: high", "'power' must be an integer, not 'high'"),
        ("base_model: zoo:seed\n", "", "mine.py needs base_model"),
        ("PerExpert = 1.0", "PerExpert = open", "refused (name): line 3: `open`"),
    ],
)
def test_mistakes_are_one_line_with_the_place(tmp_path, old, new, message):
    recipe = write(tmp_path, RECIPE.replace(old, new), PROGRAM.replace(old, new))
    with pytest.raises(UserError) as caught:
        merge_recipe(recipe, tmp_path / "out", load_program=trace_here)
    assert str(caught.value).startswith(f"{recipe}, line 1: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused_program_is_one_line_with_the_place(tmp_path):
    result = run(write(tmp_path, program="import os\n" + PROGRAM), tmp_path / "out")
    assert result.exit_code == 2
    place = f"sdjax: {tmp_path / 'recipe.yaml'}, line 1: {tmp_path / 'mine.py'}: refused (import)"
    assert result.stderr.splitlines()[-1].startswith(place)


@pytest.mark.slow
def test_a_method_as_a_file_equals_its_name(tmp_path):
    names = "merge_method: ties\nbase_model: zoo:seed\nmodels:\n- model: zoo:reader\n" + (
        "- model: zoo:calculator\nparameters:\n  weight: 0.5\n  density: 0.4\n  normalize: false\n"
    )
    files = names.replace("merge_method: ties", "merge_method: mine.py")
    for recipe, out in ((names, "by_name"), (files, "by_file")):
        result = run(write(tmp_path, recipe, source_of_method("ties")), tmp_path / out)
        assert result.exit_code == 0, result.output
    by_name, by_file = (
        (tmp_path / out / "model.safetensors").read_bytes() for out in ("by_name", "by_file")
    )
    assert by_name == by_file


def test_the_library_says_where_a_program_file_works(tmp_path):
    with pytest.raises(UserError, match=r"line 1: './mine.py' is a program file; use the command"):
        merge_recipe(write(tmp_path), tmp_path / "out")
