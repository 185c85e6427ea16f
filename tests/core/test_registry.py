"""Methods are known by name: the package's own, and those that other packages bring."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from foveate.core import registry
from foveate.core.description import protocols
from foveate.core.errors import FoveateError
from foveate.core.method import Method
from foveate.core.recipe import Recipe
from tests.thirdparty import HERE, installed, package

TAKEN = """
from foveate.core.method import Method
from foveate.core.registry import register

@register
class Mine(Method):
    name = "fastv"
"""


@pytest.fixture
def known() -> Iterator[None]:
    """Methods that a test registers are forgotten after it."""
    before = dict(registry.methods())
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._load.cache_clear()


def named(name: str, qualname: str, module: str = __name__) -> type[Method]:
    return type(qualname, (Method,), {"name": name, "__module__": module, "__qualname__": qualname})


def test_an_entry_point_brings_its_method() -> None:
    with installed():
        assert str(Recipe.parse("stripes(every=3) + fastv")) == "stripes(keep=0.5, every=3) + fastv(keep=0.5)"
    assert "stripes" not in registry.methods()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import an_old_library", "ModuleNotFoundError: No module named 'an_old_library'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("", "AttributeError: module 'bad_luck' has no attribute 'Mine'"),
        (TAKEN, "FoveateError: method name 'fastv': taken by foveate.methods.in_llm.fastv.FastV"),
    ],
    ids=["import", "syntax", "attribute", "name"],
)
def test_a_broken_package_is_named_in_one_line_and_the_rest_works(
    source: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = list(registry.methods())
    package(tmp_path, "bad_luck", source)
    shutil.copytree(HERE, tmp_path, dirs_exist_ok=True)

    with installed(tmp_path):
        assert list(registry.methods()) == sorted([*own, "stripes"])
        assert list(registry.methods()) == sorted([*own, "stripes"])

    (line,) = caplog.messages
    assert line.startswith(f"package 'bad-luck': its methods are missing, 'bad_luck:Mine' cannot be loaded ({reason}")
    assert line.endswith("update or uninstall it")
    assert "\n" not in line


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch, known: None) -> list[EntryPoint]:
    """Entry points that take the place of those installed."""
    there: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: there)
    registry._load.cache_clear()
    return there


def test_the_own_methods_come_as_those_of_others_do() -> None:
    (own,) = (point for point in entry_points(group=registry.ENTRY_POINTS) if point.module == "foveate.methods")

    assert own.dist is not None
    assert own.dist.name == "foveate"


def test_own_methods_that_cannot_be_loaded_are_no_warning(points: list[EntryPoint]) -> None:
    points.append(EntryPoint("foveate", "foveate.methods.gone", registry.ENTRY_POINTS))

    with pytest.raises(ModuleNotFoundError, match=r"foveate\.methods\.gone"):
        registry.methods()


def test_an_installation_older_than_the_source_is_named_with_the_remedy(points: list[EntryPoint]) -> None:
    with pytest.raises(FoveateError, match=r"entry points 'foveate.methods': .* are missing; install it again"):
        registry.methods()


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
    with pytest.raises(FoveateError, match=r"method name 'fastv': taken by foveate\.methods\.in_llm\.fastv\.FastV"):
        registry.register(named("fastv", "Faster"))


def test_the_same_method_may_be_imported_twice(known: None) -> None:
    kind = registry.get("fastv")

    assert registry.register(kind) is registry.get("fastv")


def test_a_name_that_is_taken_by_a_namesake_is_refused(known: None) -> None:
    with pytest.raises(FoveateError, match="method name 'fastv': taken"):
        registry.register(named("fastv", "FastV", "somewhere.else"))


def test_an_unknown_name_brings_the_closest_to_mind() -> None:
    with pytest.raises(FoveateError, match="unknown method 'hiprun': did you mean 'hiprune'"):
        registry.get("hiprun")
