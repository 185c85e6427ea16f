"""Claims as data: every file is right, every system of a paper has one, and wrong ones are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from foveate.bench.claims import Claim, names, parse, read
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.report.claims_table import claims_overview, claims_table

TRAINING = {"s2d"}
"""Systems that act while a model is trained, and so are in no recipe."""


def published() -> set[str]:
    """Systems that come from a paper."""
    return {name for name, method in registry.methods().items() if method.paper != "baseline"} | TRAINING


def test_every_system_of_a_paper_has_its_claims_and_every_file_is_about_one() -> None:
    assert set(names()) == published()


@pytest.mark.parametrize("name", names())
def test_every_file_is_right(name: str) -> None:
    claims = read(name)

    for row in claims.rows:
        assert row.kept_percent is None or 10 < row.kept_percent < 120
        assert row.tokens is None or row.of is None or row.tokens <= row.of
        assert "/" in row.model
        assert [method.name for method in Recipe.parse(row.recipe).methods] == [name]


ROW: dict[str, Any] = {"model": "owner/name", "recipe": "fastv", "kept": 90.0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], r"must be claims, nothing, source"),
        ({"source": "a", "rows": []}, r"must be claims, nothing, source"),
        ({"source": "a", "claims": []}, r"must have either rows under claims, or under nothing why there are none"),
        ({"source": "a", "claims": [ROW], "nothing": "b"}, r"must have either rows"),
        ({"claims": [ROW]}, r"source=None: must be a text"),
        ({"source": "a", "claims": [{**ROW, "speed": 2}]}, r"row 1: must be model, recipe, benchmarks"),
        ({"source": "a", "claims": [{"recipe": "fastv", "kept": 90.0}]}, r"row 1: model is missing"),
        ({"source": "a", "claims": [{**ROW, "kept": -1}]}, r"row 1: kept=-1: must be a positive number"),
        ({"source": "a", "claims": [{**ROW, "kept": "90"}]}, r"row 1: kept='90': must be a positive number"),
        ({"source": "a", "claims": [{**ROW, "benchmarks": "pope"}]}, r"benchmarks='pope': must be a list"),
        ({"source": "a", "claims": [{**ROW, "speedup": {"speed": 2}}]}, r"must be of prefill, total, first_token, decode"),
        ({"source": "a", "claims": [ROW, {**ROW, "full": 80, "score": 70}]}, r"row 2: full=80: is of a single benchmark"),
        ({"source": "a", "claims": [{"model": "a/b", "recipe": "fastv"}]}, r"row 1: claims nothing"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(content: Any, said: str) -> None:
    with pytest.raises(FoveateError, match=rf"^claims of mine[:,] [^\n]*{said}"):
        parse("mine", content)


def test_the_score_kept_follows_from_both_scores() -> None:
    assert Claim("a/b", "fastv", ("pope",), full=80, score=60).kept_percent == 75


def test_rows_are_counted_from_one() -> None:
    claims = read("hiprune")

    assert claims.row(1) is claims.rows[0]
    with pytest.raises(FoveateError, match=r"row=0: hiprune has rows 1\.\.5; foveate claims hiprune"):
        claims.row(0)
    with pytest.raises(FoveateError, match=r"snapkv: claims nothing that can be reproduced"):
        read("snapkv").row(1)


def test_a_name_without_claims_is_refused() -> None:
    with pytest.raises(
        FoveateError, match=r"claims 'nobody': there are none; known: [^\n]*alvts, [^\n]*, or a \.yaml file$"
    ):
        read("nobody")


def test_tables_show_all_rows_and_why_there_are_none() -> None:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(claims_overview([read(name) for name in names()]))
        console.print(claims_table(read("hiprune")))
        console.print(claims_table(read("snapkv")))
    text = captured.get()

    assert all(f" {name} " in text for name in names())
    assert "2/9 of the tokens" in text
    assert "claims nothing that can be reproduced" in text
