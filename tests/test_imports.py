"""Imports point down the floors of the house and never in a circle, and the lower floors know no model framework.

Read from the source: what one part imports, others that ran before it may have imported already.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LARGER = "foveate_reference"
"""The package of the larger reference models and of all training, which stands on top of this one."""
SOURCES = (REPOSITORY / "src", REPOSITORY / "packages" / "foveate-reference" / "src")
PACKAGE = SOURCES[0] / "foveate"
ROOMS = {
    ".".join(path.relative_to(source).with_suffix("").parts): path for source in SOURCES for path in source.rglob("*.py")
}
"""Every file by the name of its module, a package's own by the package's with ``__init__`` behind it."""

FLOORS = (
    ("core",),
    ("ops",),
    ("methods",),
    ("models",),
    ("engine",),
    ("checkpoint",),
    ("streams", "training"),
    ("bench", "tune"),
    ("serving",),
    ("cli", "report"),
)
"""From the ground up."""
BELOW = {
    name: {below for floor in FLOORS[: level + 1] for below in floor} for level, names in enumerate(FLOORS) for name in names
}
ROOT = "engine"
"""``foveate`` itself hands on what the engine offers."""

MAY_IMPORT = {
    **{name: below | ({"reference", "tasks"} if "engine" in below else set()) for name, below in BELOW.items()},
    "tasks": {"tasks", "core"},
    "reference": {"reference", "tasks", "models", "core"},
    LARGER: {LARGER, "reference", "tasks", "models", "core", "checkpoint", "cli"},
}
FRAMEWORKS = {"transformers", "vllm"}
LONGEST = 350
"""Lines of a file in core and engine."""


def floor(module: str) -> str | None:
    """The floor of an absolute module name; None for other packages."""
    top, _, rest = module.partition(".")
    if top != "foveate":
        return LARGER if top == LARGER else None
    name = rest.partition(".")[0]
    return name if (PACKAGE / name).is_dir() and name else ROOT


def imported(module: str) -> Iterator[str]:
    """Absolute names of all that a module imports, also inside functions."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(ROOMS[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            # What is imported from the package itself may be one of its floors.
            yield from (f"{source}.{alias.name}" if source == "foveate" else source for alias in node.names)


def rooms(*floors: str) -> list[str]:
    """The modules on these floors."""
    return sorted(module for module in ROOMS if floor(module) in floors)


def test_every_folder_is_on_a_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}

    assert folders <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", rooms("core", "ops", "methods"))
def test_methods_and_what_they_stand_on_know_no_framework(module: str) -> None:
    assert not {name.partition(".")[0] for name in imported(module)} & FRAMEWORKS


@pytest.mark.parametrize("module", sorted(set(ROOMS) - {"foveate.__init__", "foveate.__main__"}))
def test_imports_point_down(module: str) -> None:
    floors = {floor(name) for name in imported(module)} - {None}

    assert floors <= MAY_IMPORT[floor(module)]


def package_or_module(name: str) -> str:
    return f"{name}.__init__" if f"{name}.__init__" in ROOMS else name


@cache
def named(module: str) -> frozenset[str]:
    """What a file defines at its top: functions, classes and values."""
    found = set[str]()
    for node in ast.parse(ROOMS[module].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return frozenset(found)


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers read; what is inside functions runs, too."""
    for child in ast.iter_child_nodes(node):
        if not for_type_checkers(child):
            yield child
            yield from run(child)


def sources(module: str) -> set[str]:
    """The files that a file names in its imports. The packages around them run first, but that is not what is asked for."""
    here, found = module.split(".")[:-1], set[str]()
    for node in run(ast.parse(ROOMS[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(package_or_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
            source = package_or_module(".".join(filter(None, (base, node.module))))
            for alias in node.names:
                within = package_or_module(f"{source.removesuffix('.__init__')}.{alias.name}")
                found.add(within if within in ROOMS and alias.name not in named(source) else source)
    return found & set(ROOMS)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some circle, in order; none if there is no circle."""
    left = {module: set(others) for module, others in graph.items()}
    while ends := {module for module, others in left.items() if not others & set(left)}:
        left = {module: others for module, others in left.items() if module not in ends}
    if not left:
        return []
    path = [min(left)]
    while path.count(path[-1]) == 1:
        path.append(min(left[path[-1]] & set(left)))
    return path[path.index(path[-1]) :]


def test_nothing_imports_itself_by_way_of_others() -> None:
    assert circle({module: sources(module) for module in ROOMS}) == []


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", rooms("core", "engine"))
def test_no_file_is_longer_than_one_reads_at_once(module: str) -> None:
    lines = ROOMS[module].read_text().count("\n")

    assert lines <= LONGEST
