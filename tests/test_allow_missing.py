"""`--allow-missing` on every command that runs programs or the grader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdjax.cli.main import main
from sdjax.cli.sandbox_options import allow_missing_option

STORED_RUN = Path(__file__).parent / "search" / "stored" / "jax-0.10.2"
COMMANDS = ("check", "demo", "eval", "generate", "merge", "run", "stats", "transfer", "tune")

# Answers ENOSYS to landlock_create_ruleset, as an old kernel or a container does, then runs each
# command and prints its exit status and the last line of its output.
_WITHOUT_LANDLOCK = """
import ctypes, json, sys
from click.testing import CliRunner
from sdjax.cli.main import main
from sdjax.isolation.landlock import CREATE_RULESET
from sdjax.isolation.seccomp import ALLOW, EQUAL, ERRNO, LOAD, RETURN, install
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
install([(LOAD, 0, 0, 0), (EQUAL, 0, 1, CREATE_RULESET),
         (RETURN, 0, 0, ERRNO | 38), (RETURN, 0, 0, ALLOW)])
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, command)
    print(json.dumps([result.exit_code, result.output.strip().splitlines()[-1]]))
"""


def run_without_landlock(commands, folder):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    arguments = [sys.executable, "-c", _WITHOUT_LANDLOCK, json.dumps(commands)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(commands), done.stderr
    return results


@pytest.fixture
def commands(tmp_path):
    """Commands that run programs or the grader, by name."""
    (tmp_path / "mine.py").write_text(
        "def merge_models(task_vectors):\n    return 0.5 * task_vectors['expert_1']\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: ./mine.py\nbase_model: zoo:seed\nmodels: [{model: zoo:reader}]\n"
    )
    problem = {"problem": "What is 1 + 1?", "solution": r"It is $\boxed{\frac{4}{2}}$."}
    (tmp_path / "math.jsonl").write_text(json.dumps(problem) + "\n")
    merge = ["merge", "--base", "zoo:seed", "--expert", "expert_1=zoo:reader"]
    evaluation = ["--task", "math", "--data", "math.jsonl", "--shots", "0"]
    small = ["iterations=1", "generation.samples=2", "task.development=4", "task.test=2"]
    small += ["test.ablations=0"]
    small += ["baselines={fine: {linear: {}}}"]
    settings = [argument for override in small for argument in ("--set", override)]
    return {
        "check": ["check", "mine.py"],
        "merge": [*merge, "--algorithm", "mine.py", "by_file"],
        "recipe": ["merge", "recipe.yaml", "by_recipe"],
        "discovered": ["merge", "--run", str(STORED_RUN), "by_run"],
        "eval": ["eval", "zoo:seed", *evaluation, "--max-new-tokens", "8"],
        "generate": ["generate", "zoo:seed", "--prompt", "short", "-n", "2", "--check"],
        "run": ["run", "demo", "--out", "run", *settings],
    }


def test_one_option_for_all_commands():
    for name, command in main.commands.items():
        (*options,) = [o for o in command.params if o.name == "allow_missing"]
        assert bool(options) == (name in COMMANDS), name
        for option in options:
            assert option.opts == ["--allow-missing"]
            assert option.help == _help()


def _help():
    @allow_missing_option
    def command():
        """Do nothing."""

    return command.__click_params__[0].help


def test_missing_layer_is_refused_and_the_message_names_the_option(tmp_path, commands):
    chosen = [commands[name] for name in ("check", "merge", "recipe")]
    for status, line in run_without_landlock(chosen, tmp_path):
        assert status == 2
        assert line.startswith("sdjax: ")
        assert "confinement layers unavailable: landlock" in line
        assert "pass --allow-missing landlock (in the config of a run: " in line
    (allowed,) = run_without_landlock([["check", "mine.py", *_ALLOW]], tmp_path)
    assert allowed[0] == 0, allowed


_ALLOW = ("--allow-missing", "landlock")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "recipe", "discovered", "eval", "generate", "run"])
def test_every_command_runs_without_a_layer_if_told_to(tmp_path, commands, name):
    refused, allowed = run_without_landlock([commands[name], [*commands[name], *_ALLOW]], tmp_path)
    if name != "eval":  # evaluation starts the grader only for answers that differ as text
        assert refused[0] == 2
        assert "--allow-missing landlock" in refused[1]
    assert allowed[0] == 0, allowed
