"""Machine and versions, which benchmarks print above their figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import sdjax

CPUINFO = Path("/proc/cpuinfo")


def describe_environment(*packages: str) -> str:
    """Return the processor, its cores, and the versions of Python and of packages.

    Args:
        packages: names of further packages whose versions matter, in addition to sdjax and jax.
    """
    versions = {"Python": platform.python_version(), "sdjax": sdjax.__version__}
    versions |= {name: version(name) for name in ("jax", *packages)}
    listed = ", ".join(f"{name} {found}" for name, found in versions.items())
    return f"{processor()}, {os.cpu_count()} cores; {listed}"


def foreign_versions(python: str | Path, *packages: str) -> str:
    """Return versions of packages in another environment.

    Args:
        python: the environment's Python interpreter.
        packages: names of the packages.
    """
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *packages], capture_output=True, text=True, check=True
    )
    return ", ".join(f"{name} {found}" for name, found in json.loads(done.stdout).items())


def processor() -> str:
    """Return the model of the processor, or its architecture if the system does not name it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
