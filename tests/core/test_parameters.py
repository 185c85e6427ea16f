"""What a method's annotations allow, and the one line that refuses the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.items import ItemTokens
from foveate.core.method import Method
from foveate.core.parameters import AtLeast, CountOrShare, In, Keep, Layers, Odd, Shares, rule, rules

if TYPE_CHECKING:
    from decimal import Decimal

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Some(Method):
    name = "some"

    share: Annotated[float, In(0, 1)] = 0.5
    stages: Annotated[tuple[int, ...], Layers()] | None = None
    mode: Literal["one", "two"] = "one"
    whatever: Any = None


@dataclass(frozen=True)
class More(Some):
    share: float = 0.25


@dataclass(frozen=True)
class Plain(ItemTokens):
    """As somebody else may write one: with types only."""

    name = "plain"

    keep: int | float = 0.5
    positions: str = "auto"  # type: ignore[assignment]

    def select(self, images: Any, k: int) -> Any:
        """Never asked."""


@dataclass(frozen=True)
class Hidden(Method):
    name = "hidden"

    value: Decimal | None = None


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "words"),
    [
        (bool, [True, False], [1, 0, "yes", None], "true or false"),
        (int, [-1, 0, 7], [0.5, 1.0, True, "1", None], "an integer"),
        (float, [0.5, 1, -3], [True, "1", None], "a number"),
        (int | float, [0.5, 1], [True, "1", None], "a number"),
        (Literal["a", "b", "c"], ["a", "c"], ["d", 1, None, ("a",)], "'a', 'b' or 'c'"),
        (Literal[1], [1], [True, 1.0], "1"),
        (tuple[int, ...], [(), (1, -2)], [1, (0.5,), (True,), ("1",)], "a tuple, each an integer"),
        (tuple[int, float], [(1, 0.5)], [(1,), (0.5, 1), (1, 1, 1)], "a tuple (an integer, a number)"),
        (bool | None, [True, None], [0], "true or false, or None"),
        (Annotated[float, In(0, 1)], [0, 1, 0.5], [-0.1, 1.1, NAN, True, "a"], "a number, in [0, 1]"),
        (Annotated[int, In(-1, 1)], [0], [0.5, 2], "an integer, in [-1, 1]"),
        (Annotated[int, AtLeast(1)], [1, 10**9], [0, 1.0, True], "an integer, 1 or more"),
        (Annotated[float, AtLeast(0)], [0, 0.0, 1e9], [-1e-9, NAN, INF], "a number, 0 or more"),
        (Annotated[int, Odd()], [1, 5], [0, -1, 4, 5.0], "an odd integer, 1 or more"),
        (Annotated[int | float, Keep()], [1, 64, 0.1, 1.0], [0, -1, 0.0, 1.5, INF, NAN, True, None], "a positive count"),
        (
            Annotated[int | float, CountOrShare("layers")],
            [0, 20, 0.0, 1.0],
            [-1, 1.5, NAN, None],
            "a number of layers or a share in [0, 1]",
        ),
        (
            Annotated[tuple[int, ...], Layers()],
            [(), (1,), (2, 5, 9)],
            [3, (0,), (2, 2), (3, 1), (1.0,), (True,), ("1",)],
            "ascending layer numbers, 1 or more",
        ),
        (Annotated[tuple[int, ...], Layers(0, any_order=True)], [(5, 0)], [(-1,)], "layer numbers, 0 or more"),
        (Annotated[tuple[int, ...], Layers(stages=2)], [(1, 2)], [(1,), (1, 2, 3)], "2 ascending layer numbers"),
        (
            Annotated[tuple[float, ...], Shares()],
            [(), (0, 1), (0.5,)],
            [0.5, (1.5,), (-0.1,), (True,), ("a",), (NAN,)],
            "shares in [0, 1]",
        ),
        (
            Annotated[int, AtLeast(0)] | tuple[Annotated[int, AtLeast(0)], ...] | None,
            [3, (1, 0), None],
            [-1, (1, -1), 0.5],
            "an integer, 0 or more, or a tuple, each an integer, 0 or more, or None",
        ),
        (tuple[str, str], [("a", "b")], ["ab", ("a",), ("a", 1)], "a tuple (text, text)"),
    ],
    ids=str,
)
def test_an_annotation_allows_what_it_says(hint: Any, right: list[Any], wrong: list[Any], words: str) -> None:
    allowed = rule(hint)

    assert allowed is not None
    assert [value for value in right if not allowed.fits(value)] == []
    assert [value for value in wrong if allowed.fits(value)] == []
    assert str(allowed).startswith(words)


@pytest.mark.parametrize("hint", [Any, dict[str, int], int | bytes, tuple[bytes, ...], Annotated[bytes, "a note"]])
def test_what_it_does_not_say_is_not_tested(hint: Any) -> None:
    assert rule(hint) is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"share": 2}, "some: share=2: must be a number, in [0, 1]"),
        ({"stages": (3, 2)}, "some: stages=(3, 2): must be ascending layer numbers, 1 or more, such as (4, 8), or None"),
        ({"mode": "three"}, "some: mode='three': must be 'one' or 'two'"),
    ],
)
def test_a_method_refuses_by_name_value_and_remedy(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as error:
        Some(**parameters)

    assert str(error.value) == message


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert Some(stages=[1, 2]) == Some(stages=(1, 2))  # type: ignore[arg-type]


def test_what_a_base_asks_for_holds_in_a_field_that_is_declared_again() -> None:
    with pytest.raises(FoveateError, match=r"some: share=2: must be a number, in \[0, 1\]"):
        More(share=2)


@pytest.mark.parametrize("parameters", [{"keep": 0}, {"keep": "half"}, {"positions": "anywhere"}])
def test_a_method_with_plain_types_is_held_to_its_protocol(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"plain: {next(iter(parameters))}=.*: must be "):
        Plain(**parameters)


def test_types_that_only_a_type_checker_knows_are_no_obstacle() -> None:
    assert Hidden(value=3).value == 3  # type: ignore[arg-type]


def test_every_field_of_every_method_is_tested() -> None:
    for kind in registry.methods().values():
        assert [name for name, found in rules(kind).items() if not found] == []
