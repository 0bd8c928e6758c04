"""What benchmarks print about the machine, and which stored entries a simulated race has."""

import platform
import sys
from importlib.metadata import version

import pytest

import sdjax
from benchmarks import environment
from benchmarks.evaluation.racing import can_race
from sdjax.search.types import Entry


def test_environment_names_processor_python_and_versions(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Some CPU\n")
    monkeypatch.setattr(environment, "CPUINFO", cpuinfo)
    described = environment.describe_environment("numpy")
    assert described.startswith("Some CPU, ")
    assert f"Python {platform.python_version()}, " in described
    assert f"sdjax {sdjax.__version__}, " in described
    for name in ("jax", "numpy"):
        assert f"{name} {version(name)}" in described


def test_processor_without_its_name_is_the_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "missing")
    assert environment.processor() in (platform.processor(), platform.machine())


def test_versions_of_another_environment():
    found = environment.foreign_versions(sys.executable, "numpy", "jax")
    assert found == f"numpy {version('numpy')}, jax {version('jax')}"


@pytest.mark.parametrize(
    ("kind", "detail", "expected"),
    [
        ("seed", {}, True),
        ("method", {"method": "ties", "grids": ["paper"]}, True),
        ("program", {}, True),
        ("program", {"constants": 3}, True),  # its own numbers were the best
        ("program", {"tuned_from": "a", "constants": 3}, False),
        ("method", {"family": "weights", "grids": ["tuned"]}, False),
        ("ablation", {"program": "a"}, False),
    ],
)
def test_only_entries_as_they_were_written_race(kind, detail, expected):
    assert can_race(Entry(name="x", kind=kind, detail=detail)) is expected
