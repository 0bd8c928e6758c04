"""The rooms of the house: each imports only from those above it in CONTRIBUTING.md's table."""

import ast
import re
from pathlib import Path

import pytest

import sdjax

PACKAGE = Path(sdjax.__file__).parent
ROOMS = re.findall(
    r"^\| `(\w+)/` \|", (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M
)


def imported_rooms(path: Path) -> set[str]:
    """The rooms of sdjax that a file imports from, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        found |= {module.split(".")[1] for module in modules if module.startswith("sdjax.")}
    return found & set(ROOMS)


def test_every_room_is_on_the_map():
    assert sorted(ROOMS) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    allowed = {*ROOMS[: ROOMS.index(room)], room}
    odd = {
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in (PACKAGE / room).rglob("*.py")
        for other in imported_rooms(path) - allowed
    }
    assert not odd
