"""Methods are known by name: the package's own, and those that other packages bring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saccade.core import registry
from saccade.core.errors import SaccadeError
from saccade.core.method import Method, protocols
from saccade.core.recipe import Recipe

SOURCE = """
from dataclasses import dataclass
from saccade.core.method import Method
from saccade.core.registry import register

@register
@dataclass(frozen=True)
class Borrowed(Method):
    name = "borrowed"
    title = "Borrowed"
    group = "weights"
    paper = "none"
    bits: int = 4
"""


@pytest.fixture
def known() -> Iterator[None]:
    """Methods that a test registers are forgotten after it."""
    before = dict(registry.methods())
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._load.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: None) -> Iterator[None]:
    """A package on the path that declares a method as an entry point."""
    (tmp_path / "borrowed_method.py").write_text(SOURCE)
    metadata = tmp_path / "borrowed_method-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: borrowed-method\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\nborrowed = borrowed_method:Borrowed\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._load.cache_clear()
    yield
    sys.modules.pop("borrowed_method", None)


def named(name: str, qualname: str, module: str = __name__) -> type[Method]:
    return type(qualname, (Method,), {"name": name, "__module__": module, "__qualname__": qualname})


def test_an_entry_point_brings_its_method(installed: None) -> None:
    assert "borrowed" in registry.methods()
    assert str(Recipe.parse("borrowed(bits=8) + fastv")) == "borrowed(bits=8) + fastv(keep=0.5)"


def test_methods_are_sorted_by_name_and_know_it() -> None:
    known = registry.methods()

    assert list(known) == sorted(known)
    assert all(kind.name == name for name, kind in known.items())


def test_every_method_says_what_it_is() -> None:
    for kind in registry.methods().values():
        assert kind.title
        assert kind.paper
        assert kind.__module__.split(".")[2] == kind.group
        assert protocols(kind)


def test_a_name_that_is_taken_is_refused_with_its_owner(known: None) -> None:
    with pytest.raises(SaccadeError, match=r"method name 'fastv': taken by saccade\.methods\.in_llm\.fastv\.FastV"):
        registry.register(named("fastv", "Faster"))


def test_the_same_method_may_be_imported_twice(known: None) -> None:
    kind = registry.get("fastv")

    assert registry.register(kind) is registry.get("fastv")


def test_a_name_that_is_taken_by_a_namesake_is_refused(known: None) -> None:
    with pytest.raises(SaccadeError, match="method name 'fastv': taken"):
        registry.register(named("fastv", "FastV", "somewhere.else"))


def test_an_unknown_name_brings_the_closest_to_mind() -> None:
    with pytest.raises(SaccadeError, match="unknown method 'hiprun': did you mean 'hiprune'"):
        registry.get("hiprun")
