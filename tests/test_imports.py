"""Imports point down the floors of the house, and the lower floors know no model framework.

Read from the source: importing any part runs ``foveate/__init__.py``, which imports the engine.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "foveate"

FLOORS = (("core",), ("ops",), ("methods",), ("models",), ("engine",), ("serving",), ("bench", "tune"), ("cli", "report"))
"""From the ground up."""
BELOW = {
    name: {below for floor in FLOORS[: level + 1] for below in floor} for level, names in enumerate(FLOORS) for name in names
}
ROOT = "engine"
"""``foveate`` itself hands on what the engine offers."""

MAY_IMPORT = {
    **{name: below | ({"reference", "tasks"} if "bench" in below else set()) for name, below in BELOW.items()},
    "tasks": {"tasks", "core"},
    "reference": {"reference", "tasks", "core"},
}
FRAMEWORKS = {"transformers", "vllm"}


def floor(module: str) -> str | None:
    """The floor of an absolute module name; None for other packages."""
    top, _, rest = module.partition(".")
    if top != "foveate":
        return None
    name = rest.partition(".")[0]
    return name if (PACKAGE / name).is_dir() and name else ROOT


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, also inside functions."""
    package = path.relative_to(SOURCE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # What is imported from the package itself may be one of its floors.
            yield from (f"{module}.{alias.name}" if module == "foveate" else module for alias in node.names)


def files(*names: str) -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for name in names for path in (PACKAGE / name).rglob("*.py"))


def test_every_folder_is_on_a_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}

    assert folders <= set(MAY_IMPORT)


@pytest.mark.parametrize("file", files("core", "ops", "methods"))
def test_methods_and_what_they_stand_on_know_no_framework(file: str) -> None:
    assert not {name.partition(".")[0] for name in imported(PACKAGE / file)} & FRAMEWORKS


@pytest.mark.parametrize("file", files(*MAY_IMPORT))
def test_imports_point_down(file: str) -> None:
    floors = {floor(name) for name in imported(PACKAGE / file)} - {None}

    assert floors <= MAY_IMPORT[Path(file).parts[0]]
