"""Package borders: the import contracts of pyproject.toml hold, inside functions too."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_import_contracts_hold():
    # In a process of its own: import-linter closes the stream that pytest captures.
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
