"""Libraries never run a downloaded folder's code, and never ask whether to."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Loads adapters of a model that is already loaded; it has no such parameter.
_WITHOUT_CODE = ("PeftModel",)


def _loading_calls():
    for folder in ("sdjax", "benchmarks", "examples", "tpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = ast.unparse(node.func.value)
                    is_hub = node.func.attr == "load_dataset" and owner == "datasets"
                    is_model = node.func.attr == "from_pretrained" and owner not in _WITHOUT_CODE
                    if is_hub or is_model:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", node.keywords


def test_calls_that_load_from_a_folder_or_the_hub_trust_no_code():
    calls = list(_loading_calls())
    assert {where.partition(":")[0] for where, _ in calls} >= {
        "sdjax/io/hub.py",
        "sdjax/io/tokenizer.py",
    }
    for where, keywords in calls:
        values = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
        assert values.get("trust_remote_code") == "False", where


def test_only_tasks_are_imported_by_a_name_that_a_user_wrote():
    """Every other module that is imported by name is a constant of the package."""
    importing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sdjax").rglob("*.py")
        if any(
            word in path.read_text(encoding="utf-8")
            for word in ("import_module", "spec_from_file", "run_path", "pickle.load")
        )
    }
    assert importing == {
        "sdjax/__init__.py",
        "sdjax/evaluation/answer_worker.py",
        "sdjax/evaluation/tasks/registry.py",
        "sdjax/isolation/server.py",
        "sdjax/sandbox/compiler/entry.py",
        "sdjax/sandbox/worker/entry.py",
    }


def test_modules_of_the_working_directory_are_not_imported(tmp_path):
    for name in ("click", "rich", "yaml", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sdjax", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "imported" not in done.stdout + done.stderr
