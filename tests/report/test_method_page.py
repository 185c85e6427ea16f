"""The page of a method says what the engine does, and in Markdown that holds together."""

from __future__ import annotations

import re
from itertools import permutations

import pytest
from tests.suite.pairs import artifacts, parts, variants

from foveate.core import registry
from foveate.core.description import describe
from foveate.core.errors import FoveateError
from foveate.core.method import Method, Tokens
from foveate.core.recipe import Recipe
from foveate.engine.check import check
from foveate.engine.hosting import Verdict
from foveate.report.method_page import combinations, method_page

KNOWN = registry.methods()
WHERE = [
    Verdict("scope", "llava", None),
    Verdict("scope", "gemma3", "needs a CLS token | or so"),
    Verdict("scope", "idefics3", "needs a CLS token | or so"),
]


def page(name: str) -> str:
    return method_page(KNOWN[name], describe(KNOWN[name]), KNOWN, WHERE)


def refusal(*methods: Method) -> str | None:
    anatomy = parts("llava-clip")
    try:
        check(Recipe(methods), anatomy, anatomy.traits(artifacts=artifacts("llava-clip")))
    except FoveateError as error:
        return str(error)
    return None


def test_what_it_says_not_to_go_together_is_what_attach_refuses() -> None:
    methods = {name: variants(name)[0] for name in KNOWN}
    alone = {name for name, method in methods.items() if refusal(method) is None}
    named = {name: " ".join(combinations(KNOWN[name], KNOWN)) for name in KNOWN}
    needs_grid = {name for name, kind in KNOWN.items() if issubclass(kind, Tokens) and kind.needs_grid}

    for one, other in permutations(sorted(alone), 2):
        refused = refusal(methods[one], methods[other])
        about_it = f"`{other}`" in named[one] or f"`{one}`" in named[other] or {one, other} <= needs_grid
        assert refused is None or about_it, f"{refused}, but nobody says so"


@pytest.mark.parametrize("name", KNOWN)
def test_every_row_of_its_tables_has_all_cells(name: str) -> None:
    rows = [line for line in page(name).splitlines() if line.startswith("|")]

    assert len(rows) == 2 + len(describe(KNOWN[name]).parameters)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert "``" not in page(name)


def test_it_says_where_a_method_runs_and_why_not() -> None:
    text = page("scope")

    assert "- with its defaults: llava\n" in text
    assert "- not on gemma3, idefics3: needs a CLS token" in text


def test_the_paper_is_linked() -> None:
    assert "[arXiv 2510.24214](https://arxiv.org/abs/2510.24214)" in page("scope")


def test_the_mark_of_training_is_on_the_page() -> None:
    assert "**Needs training:**" in page("hidrop")
    assert "**Needs training:**" not in page("scope")


def test_how_a_budget_counts_is_said_where_there_is_one() -> None:
    assert "128 of two tiles of 144" in page("hiprune")
    assert "128 of two tiles of 144" not in page("shortv")
