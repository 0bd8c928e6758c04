"""`sdjax tune`: a search on the zoo from the command line, and its errors."""

import json

import pytest
import yaml
from click.testing import CliRunner

import sdjax
from sdjax.cli.main import main
from sdjax.cli.tune import parse_overrides
from sdjax.core.errors import UserError
from sdjax.io.model_paths import zoo_models
from sdjax.models.tree import flatten

EXPERTS = [
    part
    for i, name in enumerate(("reader", "calculator", "judge"), 1)
    for part in ("--expert", f"expert_{i}=zoo:{name}")
]
MODELS = ["--base", "zoo:seed", *EXPERTS, "--scope", "mlp"]
PROGRAM = """import jax.numpy as jnp


def merge_models(task_vectors, depth):
    a, b, c = task_vectors.values()
    return 0.7 * a + 0.9 * b + jnp.where(depth < 0.5, 0.6, 0.1) * c  # more of it in early layers
"""


def tune(*arguments):
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def user_error(*arguments):
    result = tune(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights", *MODELS, "--budget", 0], "budget: 0 is less than one evaluation"),
        (["weights", "--budget", 1], "tune requires a base model; pass --base MODEL"),
        (["weights", "--base", "zoo:seed", "--budget", 1], "at least one expert; pass --expert"),
        (["wieghts", *MODELS, "--budget", 1], "did you mean weights"),
        (["none.py", *MODELS, "--budget", 1], "none.py: "),
        (["weights", *MODELS, "--budget", 1, "--expert", "x"], "--expert x: write NAME=MODEL"),
        (["weights", *MODELS, "--budget", 1, "--set", "a=b"], "--set a=b: write NAME=START or"),
        (
            ["weights", *MODELS, "--budget", 1, "--set", "weight[expert_1]=3"],
            "weight[expert_1]: the bounds [-1, 2] exclude the start 3",
        ),
        (["magmax", *MODELS, "--budget", 1, "--task", "nothing"], "unknown task 'nothing'"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:20],
)
def test_user_error_is_one_line(arguments, message):
    assert message in user_error(*arguments)


def test_unknown_task_of_a_file_is_named_with_the_option(tmp_path):
    models = ["zoo:reader", "zoo:judge"]
    genome = {"models": models, "merge_method": "task_arithmetic", "base_model": "zoo:seed"}
    file = tmp_path / "genome.yaml"
    file.write_text(yaml.safe_dump({"genome": genome, "tasks": [{"name": "hellaswag"}]}))
    line = user_error(file, "--budget", 1)
    assert f"{file}: unknown task 'hellaswag': use one of " in line
    assert line.endswith("; --task NAME chooses another task")
    line = user_error(file, "--budget", 1, "--task", "nothing")
    assert "unknown task 'nothing'" in line
    assert "genome.yaml" not in line


def test_starts_and_bounds_are_parsed():
    texts = ["scale=0.5", "weight[expert_1, layer 2]=1,0,3"]
    assert parse_overrides(texts) == {
        "scale": (0.5,),
        "weight[expert_1, layer 2]": (1.0, 0.0, 3.0),
    }
    with pytest.raises(UserError, match="scale is already set; name it once"):
        parse_overrides(["scale=1", "scale=2"])
    with pytest.raises(UserError, match="write NAME=START or NAME=START,LOW,HIGH"):
        parse_overrides(["scale=1,2"])


@pytest.mark.slow
def test_family_is_tuned_resumed_written_and_merged(tmp_path):
    out, merged = tmp_path / "out", tmp_path / "merged"
    command = ["weights", *MODELS, "--budget", 3, "--steps", 20, "--limit", 40, "--out", out]
    first = tune(*command, "--merged", merged)
    assert first.exit_code == 0, first.output
    result = json.loads((out / "result.json").read_text())
    assert result["optimizers"] == ["gradient"]
    assert result["evaluations"] == 3
    assert result["gain"]["mean"] > 0
    assert f"gain     +{100 * result['gain']['mean']:.1f} [" in first.output
    assert (out / "tuning.svg").read_text().startswith("<svg")
    assert (out / "tuning.png").read_bytes().startswith(b"\x89PNG")
    # The recipe merges to the same tensors as the merged model, in which the scores were measured.
    recipe = tmp_path / "again"
    written = CliRunner().invoke(main, ["merge", str(out / "tuned.yaml"), str(recipe)])
    assert written.exit_code == 0, written.output
    tensors = [flatten(sdjax.load_model(str(folder))[1]) for folder in (merged, recipe)]
    assert all((tensors[0][path] == tensors[1][path]).all() for path in tensors[0])
    # Killed in the middle, and run again.
    lines = (out / "trace.jsonl").read_text().splitlines(keepends=True)
    (out / "trace.jsonl").write_text("".join(lines[:8]) + lines[8][:20])
    (out / "result.json").unlink()
    again = tune(*command)
    assert again.exit_code == 0, again.output
    resumed = json.loads((out / "result.json").read_text())
    same = ("parameters", "gain", "untuned", "tuned", "development", "steps", "evaluations")
    assert {key: resumed[key] for key in same} == {key: result[key] for key in same}
    assert "contains a search of sdjax tune with steps = 20, not 5" in user_error(
        *command, "--steps", 5
    )


@pytest.mark.slow
def test_program_is_tuned_in_its_text(tmp_path):
    (tmp_path / "mine.py").write_text(PROGRAM)
    command = ["--budget", 6, "--steps", 4, "--limit", 20, "--out", tmp_path / "out"]
    result = tune(tmp_path / "mine.py", *MODELS, *command)
    assert result.exit_code == 0, result.output
    assert "tuned by gradient and CMA-ES" in result.output
    assert "no gradient in c3 (lt): tuned by CMA-ES" in result.output
    text = (tmp_path / "out" / "tuned.py").read_text()
    assert text.endswith("# more of it in early layers\n")
    assert CliRunner().invoke(main, ["check", str(tmp_path / "out" / "tuned.py")]).exit_code == 0


@pytest.mark.slow
def test_program_whose_gradient_is_too_large_is_tuned_by_cmaes(tmp_path):
    steps = "    for _ in range(270):\n        x = jnp.sin(x)\n"
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp\n\ndef merge_models(task_vectors):\n"
        f"    x = 0.5 * task_vectors['expert_1']\n{steps}    return x\n"
    )
    result = tune(tmp_path / "mine.py", *MODELS, "--budget", 1, "--limit", 4)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "the gradient is refused" in line]
    assert (
        "the gradient is refused: too costly (code-size): a chain of elementwise operations is"
        in line
    )
    assert line.endswith(": tuned by CMA-ES")


@pytest.mark.slow
def test_recipe_is_tuned_on_a_task_without_training_problems(tmp_path):
    models = zoo_models()
    experts = [
        {"model": str(models[name]), "parameters": {"weight": 0.5, "density": 0.5}}
        for name in ("reader", "calculator")
    ]
    recipe = {"merge_method": "ties", "base_model": str(models["seed"]), "models": experts}
    recipe["dtype"] = "float32"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"question": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(10, 22)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "recipe.yaml"
    folders = tmp_path / "out", tmp_path / "merged", tmp_path / "again"
    command = [file, "--task", tmp_path / "sums.jsonl", "--budget", 2]
    result = tune(*command, "--out", folders[0], "--merged", folders[1])
    assert result.exit_code == 0, result.output
    arguments = ["merge", str(folders[0] / "tuned.yaml"), str(folders[2])]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders[1:])
    assert first == second
    assert "has no training problems: tuned by CMA-ES" in result.output
    assert "merge_method: ties" in (folders[0] / "tuned.yaml").read_text()
    assert "names its models and tensors; remove --base" in user_error(file, *MODELS, "--budget", 2)
