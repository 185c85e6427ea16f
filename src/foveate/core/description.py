"""What a method says of itself, read from its file: its class, the docstrings of its fields, and its module's."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from foveate.core.exits import Exits
from foveate.core.leaning import Leaning
from foveate.core.method import Cache, Experts, Method, Offline, Pictures, Routing, Tokens
from foveate.core.parameters import rules
from foveate.core.reuse import Reuse
from foveate.core.weights import Weights


@dataclass(frozen=True)
class Place:
    """Where methods of a group act: in words, and what gets cheaper there."""

    words: str
    saves: str


PLACES: Mapping[str, Place] = {
    "before_encoder": Place(
        "before the encoder", "What is dropped is never encoded: encoder, prefill, cache and decoding have less to do."
    ),
    "in_encoder": Place(
        "in the encoder", "What comes behind it has less to do: later blocks of the encoder, prefill, cache, decoding."
    ),
    "before_llm": Place("before the LLM", "The encoder runs in full; prefill, cache and decoding have less to do."),
    "in_llm": Place("in the LLM", "The encoder runs in full; the layers of the LLM that it acts on have less to do."),
    "kv_cache": Place("KV cache", "The prompt is read first; then the cache is smaller, or decoding reads less of it."),
    "weights": Place("weights", "The model is smaller, on disk and in memory; decoding, which reads all of it, is faster."),
}
"""By group, in the order in which a picture passes them."""


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter of a method: what it means (with its unit), which ``values`` it may have, and its default."""

    name: str
    meaning: str
    values: str
    default: Any


@dataclass(frozen=True)
class Description:
    """A method as a reader wants it explained; what its file does not say is empty.

    Attributes:
        name, title, group, helps, trained, needs: as in `Method`.
        protocols: what it implements.
        summary: what it does, in one sentence.
        about: the same at length, with what is reconstructed or differs from the published code: paragraphs.
        paper: where it was published; ``paper_title``: under which title.
        parameters: in their order.
    """

    name: str
    title: str
    group: str
    protocols: tuple[str, ...]
    summary: str
    about: tuple[str, ...]
    paper: str
    paper_title: str
    helps: str
    trained: str
    needs: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def place(self) -> str:
        """Where it acts, in words."""
        return PLACES[self.group].words if self.group in PLACES else self.group

    @property
    def missing(self) -> tuple[str, ...]:
        """What a reader would look for and not find: what the file of the method should still say."""
        unsaid = [] if self.helps else ["helps (when to take it)"]
        unsaid += [] if self.summary else ["a module docstring"]
        return (*unsaid, *(f"a docstring below {one.name}" for one in self.parameters if not one.meaning))


def protocols(method: type[Method] | Method) -> tuple[str, ...]:
    """Names of the protocols that a method implements."""
    kind = method if isinstance(method, type) else type(method)
    known = (Pictures, Reuse, Tokens, Routing, Leaning, Exits, Experts, Cache, Offline, Weights)
    return tuple(p.__name__ for p in known if issubclass(kind, p))


def describe(kind: type[Method]) -> Description:
    """What there is to say about a method."""
    text = inspect.getdoc(sys.modules.get(kind.__module__, kind)) or inspect.getdoc(kind) or ""
    first, *rest = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    cited = re.search(r'Paper: "(?P<title>[^"]+)", (?:arXiv \d+\.\d+|[A-Z]+ \d{4})[^.]*\.\s*', " ".join([first, *rest]))
    paragraphs = [one.replace(cited[0].strip(), "").replace("  ", " ").strip() if cited else one for one in rest]
    allowed, said = rules(kind), meanings(kind)
    return Description(
        name=kind.name,
        title=kind.title,
        group=kind.group,
        protocols=protocols(kind),
        summary=re.sub(rf"^{re.escape(kind.title)}: ", "", first, flags=re.IGNORECASE),
        about=tuple(one for one in paragraphs if one),
        paper=kind.paper,
        paper_title=cited["title"] if cited else "",
        helps=kind.helps,
        trained=kind.trained,
        needs=kind.needs,
        parameters=tuple(
            Parameter(
                name=field.name,
                meaning=said.get(field.name, ""),
                values=", and ".join(rule.words for rule in allowed[field.name]),
                default=None if field.default is MISSING else field.default,
            )
            for field in fields(kind)
        ),
    )


@cache
def meanings(kind: type[Method]) -> Mapping[str, str]:
    """The docstring below each field of a method, its own or that of the base which declares the field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Method):
            found |= _field_docstrings(base)
    return found


def _field_docstrings(kind: type[Method]) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        # A class that was typed into an interpreter, or comes without its source.
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:]):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[field.target.id] = " ".join(below.value.value.split())
    return found
