"""What a method's file says of the method: enough for a reader, and all in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from foveate.core import registry
from foveate.core.description import PLACES, describe, meanings
from foveate.core.method import Method
from foveate.core.parameters import AtLeast
from tests.thirdparty import installed

with installed():
    KNOWN = {name: describe(kind) for name, kind in registry.methods().items()}


@dataclass(frozen=True)
class Broad(Method):
    name = "broad"
    title = "Broad"
    group = "elsewhere"
    paper = "none"

    keep: Annotated[int, AtLeast(2)] = 3
    """Rows that
    stay.
    """
    unsaid: int = 1


@dataclass(frozen=True)
class Narrow(Broad):
    name = "narrow"

    keep: int = 4
    unsaid: int = 1
    """Of no consequence."""


@pytest.mark.parametrize("name", KNOWN)
def test_a_method_says_all_that_a_reader_looks_for(name: str) -> None:
    missing = KNOWN[name].missing

    assert not missing, f"{name}: its file does not say {', '.join(missing)}; see CONTRIBUTING.md, step 3"


@pytest.mark.parametrize("name", registry.methods())
def test_a_published_method_names_its_paper_and_a_place(name: str) -> None:
    about = describe(registry.get(name))

    assert about.group in PLACES
    assert about.paper == "baseline" or about.paper_title, "its module docstring has no: Paper: “title”, arXiv number."
    assert not any("arXiv" in paragraph for paragraph in about.about)


def test_a_field_that_is_declared_again_keeps_its_docstring_and_its_rule() -> None:
    keep, unsaid = describe(Narrow).parameters

    assert (keep.meaning, keep.values, keep.default) == ("Rows that stay.", "an integer, 2 or more", 4)
    assert unsaid.meaning == "Of no consequence."


def test_what_is_missing_is_named() -> None:
    assert describe(Broad).missing == ("helps (when to take it)", "a docstring below unsaid")


def test_a_class_without_source_says_nothing_of_its_fields() -> None:
    names: dict[str, type[Method]] = {}
    exec("from foveate.core.method import Method\nclass Typed(Method):\n    share: float = 1.0\n    'Of all.'\n", names)

    assert "share" not in meanings(names["Typed"])


def test_methods_that_their_papers_train_say_so() -> None:
    assert {name for name, kind in registry.methods().items() if kind.trained} == {
        "core",
        "hidrop",
        "merge3d",
        "ppe",
        "prumerge",
    }
