"""The README's table and the commands of the guides, run as a reader would run them.

Two commands take longer. `make demo` runs `sdjax demo`, which is run here with fewer programs, and
`sdjax zoo train` is tested on a small zoo in `tests/zoo`.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import zoo_models
from sdjax.models.tree import flatten
from sdjax.search.ranking import final_ranking
from sdjax.search.store import Store

ROOT = Path(__file__).resolve().parents[1]
# The demo with fewer programs and problems.
SMALL = [
    word
    for override in (
        *("iterations=1", "generation.samples=24", "training.max_steps=2", "test.top_k=2"),
        *("task.development=64", "task.test=64", "selection.min_gap=0", "transfer={}"),
        "test.ablations=0",
        *("baselines.paper={}", "baselines.fine={linear: {}}", "training.after_last=true"),
        "tuning={programs: 1, search: {budget: 2, steps: 2}}",
        "controls={tuned: [weights], random: false, untrained: false, max_evaluations: 2}",
    )
    for word in ("--set", override)
]
MERGE_MODELS = """def merge_models(task_vectors):
    return 0.7 * (task_vectors["expert_1"] + task_vectors["expert_2"])
"""


def sdjax(*arguments):
    """Run a command that must succeed; return what it prints to standard output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def weights(folder):
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(folder)[1]).items()}


def best_program(folder):
    """Return the run's best program."""
    with Store.open(folder) as store:
        identity = final_ranking(store, "strict")[0].identity
        return store.program(identity)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished demo, as `sdjax demo` names it."""
    folder = tmp_path_factory.mktemp("walkthrough")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        table = sdjax("demo", *SMALL)
    assert "seed" in table
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("demo-")
    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_demo(demo, folder):
    assert {"run.sqlite", "report.html", "generators", "adapters"} <= {
        path.name for path in demo.iterdir()
    }
    page = (ROOT / "docs" / "run-folder.md").read_text()
    for path in demo.iterdir():
        assert f"`{path.name}" in page, f"docs/run-folder.md does not describe {path.name}"


def check_run(demo, folder):
    sdjax("run", "demo", "--out", "runs/first", *SMALL)
    assert best_program("runs/first") == best_program(demo)  # the same config and random seed
    sdjax("run", "--resume", "runs/first")
    assert best_program("runs/first") == best_program(demo)


def check_report(demo, folder):
    (demo / "report.html").unlink()
    sdjax("report", demo)
    assert "<html" in (demo / "report.html").read_text()


def check_transfer(demo, folder):
    names = {"expert_1": "storyteller", "expert_2": "accountant", "expert_3": "detective"}
    experts = [word for slot in names for word in ("--expert", f"{slot}=zoo:{names[slot]}")]
    assert "tuned on" in sdjax("transfer", demo, *experts, "--limit", "8", "--out", "t.json")
    assert Path("t.json").is_file()


def check_tune(demo, folder):
    experts = ["--expert", "expert_1=zoo:reader", "--expert", "expert_2=zoo:calculator"]
    small = ["--budget", "2", "--steps", "2", "--limit", "8", "--out", "tuned"]
    sdjax("tune", "weights", "--base", "zoo:seed", *experts, *small)
    sdjax("merge", "tuned/tuned.yaml", "merged")


def check_merge(demo, folder):
    Path("mine.py").write_text(MERGE_MODELS)
    Path("recipe.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: zoo:seed\nmodels:\n"
        "  - {model: zoo:reader, parameters: {weight: 0.7}}\n"
        "  - {model: zoo:calculator, parameters: {weight: 0.7}}\n"
    )
    experts = ["--expert", "expert_1=zoo:reader", "--expert", "expert_2=zoo:calculator"]
    sdjax("merge", "recipe.yaml", "by-recipe")
    sdjax("merge", "--algorithm", "mine.py", "--base", "zoo:seed", *experts, "by-program")
    sdjax("merge", "--run", demo, "by-run")
    by_recipe, by_program = weights("by-recipe"), weights("by-program")
    for path, leaf in by_recipe.items():  # the same merge, rounded once to bfloat16
        assert np.allclose(leaf, by_program[path], rtol=2**-7, atol=1e-5), path
    seed = weights(zoo_models()["seed"])
    assert any(not np.array_equal(leaf, seed[path]) for path, leaf in weights("by-run").items())


def check_stats(demo, folder):
    Path("sums.jsonl").write_text('{"prompt": "10+31=", "completion": "41"}\n{"text": "1+1=2"}\n')
    names = ("reader", "calculator")
    for name in names:
        data = ["--data", "sums.jsonl"] if name == "reader" else ["--task", "arithmetic"]
        options = ["--limit", "8", "--kinds", "gram", "--out", f"{name}.stats"]
        assert "tokens" in sdjax("stats", f"zoo:{name}", *data, *options)
    Path("recipe.yaml").write_text(
        "merge_method: regmean\nmodels:\n"
        + "".join(f"  - {{model: zoo:{name}, stats: {name}.stats}}\n" for name in names)
    )
    sdjax("merge", "recipe.yaml", "merged")
    experts = [word for name in names for word in ("--expert", f"{name}=zoo:{name}")]
    stats = [word for name in names for word in ("--stats", f"{name}={name}.stats")]
    sdjax("merge", "--algorithm", "regmean", "--base", "zoo:seed", *experts, *stats, "relative")
    relative = weights("relative")
    for path, leaf in weights("merged").items():
        assert np.allclose(leaf, relative[path], rtol=2**-6, atol=1e-3), path


def check_extract_lora(demo, folder):
    for name in ("reader", "calculator"):
        assert "error" in sdjax("extract-lora", "zoo:seed", f"zoo:{name}", name, "--rank", 4)


def check_merge_lora(demo, folder):
    check_extract_lora(demo, folder)
    adapters = ["--adapter", "reader=0.7", "--adapter", "calculator=0.7"]
    assert "rank 8" in sdjax("merge-lora", "both", *adapters)
    assert "rank 2" in sdjax("merge-lora", "small", *adapters, "--rank", 2)
    assert "strict" in sdjax("eval", "zoo:seed+both", "--task", "arithmetic", "--limit", 4)


def check_eval(demo, folder):
    Path("sums.jsonl").write_text('{"question": "10+31=", "answer": "41"}\n')
    guide = (ROOT / "docs" / "task.md").read_text()
    Path("mytasks.py").write_text(re.search(r"^```python.*?\n(.*?)^```", guide, re.M | re.S)[1])
    for task in ("arithmetic", "sums.jsonl"):
        assert "strict" in sdjax("eval", "zoo:seed", "--task", task, "--limit", "4")
    with pytest.MonkeyPatch.context() as patch:  # as Python does at its start
        patch.setenv("PYTHONPATH", ".")
        patch.syspath_prepend(Path.cwd())
        own = ["--task", "mytasks:Riddles", "--trust-code", "--limit", "4"]
        assert "strict" in sdjax("eval", "zoo:seed", *own)
    Path("svamp.jsonl").write_text(
        '{"Body": "Tom has 3 pens.", "Question": "How many pens?", "Answer": "3"}\n'
    )
    harness = ROOT / "tests" / "evaluation" / "harness"
    data = {"gsm8k": harness / "gsm8k_test.jsonl", "math": harness / "math_test.jsonl"}
    for task, file in {**data, "svamp": "svamp.jsonl"}.items():
        options = ["--limit", "1", "--shots", "0", "--max-new-tokens", "4"]
        assert "strict" in sdjax("eval", "zoo:seed", "--task", task, "--data", file, *options)


def check_generate(demo, folder):
    Path("prompt.txt").write_text("# merge three experts")
    adapter = f"zoo:seed+{demo / 'adapters' / 'iteration-1'}"
    for model in ("zoo:seed", adapter):
        options = ["--prompt", "prompt.txt", "-n", "2", "--max-new-tokens", "16"]
        lines = sdjax("generate", model, *options, "--json").splitlines()
        assert all(json.loads(line)["text"] for line in lines[:2])
    assert '"verdict"' in sdjax("generate", "--run", demo, "-n", "2", "--check", "--json")


def check_check(demo, folder):
    Path("mine.py").write_text(MERGE_MODELS)
    Path("best.py").write_text(best_program(demo).source)
    lines = sdjax("check", "--run", demo, "mine.py", "best.py", "--json").splitlines()
    verdicts = [json.loads(line) for line in lines]
    assert verdicts[1]["identity"] == best_program(demo).identity
    assert [verdict["verdict"] for verdict in verdicts] == ["admitted", "admitted"]


def check_train(demo, folder):
    # The shipped configs run in tests/training/test_shipped_configs.py; here, LoRA and all weights.
    short = ["--set", "max_steps=1", "--set", "warmup_steps=0"]
    sdjax("train", "sft", "train-sft", *short)
    sdjax("train", "sft", "train-sft", *short, "--out", "lora", "--set", "rank=2")
    assert {path.name for path in folder.iterdir()} >= {"trained-sft", "lora"}


def check_zoo(demo, folder):
    listed = sdjax("zoo", "list")
    assert all(f"zoo:{name}\t" in listed for name in zoo_models())


def check_methods(demo, folder):
    assert "task_arithmetic" in sdjax("methods")
    assert "density" in sdjax("methods", "ties")


CHECKS = {
    "demo": check_demo,
    "run": check_run,
    "report": check_report,
    "transfer": check_transfer,
    "tune": check_tune,
    "merge": check_merge,
    "stats": check_stats,
    "extract-lora": check_extract_lora,
    "merge-lora": check_merge_lora,
    "eval": check_eval,
    "generate": check_generate,
    "check": check_check,
    "train": check_train,
    "zoo": check_zoo,
    "methods": check_methods,
}


def test_every_command_of_the_readme_is_run():
    rows = re.findall(r"^\| (`sdjax .*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = {command for row in rows for command in re.findall(r"`sdjax ([\w-]+)", row)}
    assert commands == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("command", CHECKS)
def test_command_does_what_the_readme_says(command, demo, folder):
    CHECKS[command](demo, folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart.md", "merge-method.md", "task.md"])
def test_commands_of_a_guide_run_in_order(page, demo, folder, monkeypatch):
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r'^```python(?: title="(.*?)")?\n(.*?)^```', text, re.M | re.S)
    for title, block in blocks:
        if title or "def merge_models" in block:
            Path(title or "mine.py").write_text(block)
    text = re.sub(r" *\\\n\s*", " ", text)  # continued lines
    commands = re.findall(r"^    ((?:[A-Z_]+=\S+ )*)sdjax (.*)$", text, re.MULTILINE)
    assert commands
    for variables, command in commands:
        for variable in variables.split():
            name, value = variable.split("=")
            monkeypatch.setenv(name, value)
            if name == "PYTHONPATH":  # Python reads it when it starts
                monkeypatch.syspath_prepend(Path(value).resolve())
        command = command.replace("MODEL", "zoo:seed")
        command = re.sub("runs/(demo-DATE|first)", str(demo), command)
        arguments = shlex.split(command, comments=True)
        sdjax(*arguments, *(SMALL if arguments[0] == "run" else ()))


@pytest.mark.slow
def test_python_examples_of_the_guides_run(demo, folder, capsys):
    namespace = {}
    for page in (ROOT / "README.md", ROOT / "docs/merge-method.md", ROOT / "docs/run-folder.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            code = block.replace('"runs/first"', repr(str(demo)))
            exec(compile(code, page.name, "exec"), namespace)
    assert "generate" in capsys.readouterr().out
