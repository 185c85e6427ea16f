"""A method that another package brings is treated like the package's own."""

from __future__ import annotations

from importlib.metadata import entry_points

from foveate.core import registry
from tests.suite.bodies import BODIES
from tests.suite.pairs import HOSTED, REFUSED
from tests.thirdparty import installed


def test_it_is_found_through_its_entry_point() -> None:
    with installed():
        (point,) = (each for each in entry_points(group=registry.ENTRY_POINTS) if each.name == "stripes")
        assert registry.get("stripes") is point.load()
    assert point.dist is not None
    assert point.dist.name == "foveate-stripes"


def test_the_suite_runs_it_on_every_anatomy() -> None:
    bodies = {body.name for method, body in (each.values for each in [*HOSTED, *REFUSED]) if method.name == "stripes"}

    assert bodies == set(BODIES)


def test_it_is_known_to_nobody_else() -> None:
    assert "stripes" not in registry.methods()
