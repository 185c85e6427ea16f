"""What a recipe may be where vLLM runs the language model, and what it keeps of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.exits import Exits
from foveate.core.items import ItemTokens
from foveate.core.method import Cache, Experts, Method, Offline, Pictures, Routing, Tokens
from foveate.core.recipe import Recipe
from foveate.core.registry import methods
from foveate.core.reuse import Reuse
from foveate.core.roles import Item
from foveate.core.signal import Aligned, Columns, Features, Function, Keys, QueryKey, Question, Rows, Signal, Summary, Values
from foveate.core.traits import Traits
from foveate.models.anatomy import Picture, View
from foveate.serving.settings import FULL, Keep, Settings, checked
from foveate.serving.vllm.families import FAMILIES, Family

SITES = ("pre_projector", "projected", "sequence")
"""Where a method may act: behind the encoder, and before the language model."""

ELSEWHERE = {
    "patches": "before the encoder",
    "encoder": "inside of the encoder",
    "decoder": "inside of the language model",
}


@dataclass(frozen=True)
class Pruning:
    """A server's recipe on a model: one method, whose budget a request may set.

    Attributes:
        settings: the operator's.
        family: the model's.
        config: its configuration.
        traits: what methods know of it.
    """

    settings: Settings
    family: Family
    config: Any
    traits: Traits

    @classmethod
    def of(cls, family: str, config: Any) -> Pruning | None:
        """What ``--hf-overrides`` says, None if it says nothing of us.

        Raises:
            FoveateError: if the recipe cannot run here, with the remedy.
        """
        given = getattr(config, "foveate", None)
        if given is None:
            return None
        known = FAMILIES[family]
        pruning = cls(Settings.of(given), known, config, known.traits(config))
        pruning._admit()
        return pruning

    @cached_property
    def method(self) -> Any:
        """The recipe's method."""
        return Recipe.of(self.settings.recipe).methods[0]

    @property
    def label(self) -> str:
        """The recipe, in a line."""
        return str(self.method)

    @cached_property
    def pictures(self) -> Any:
        """What stands behind the placeholders of pictures (`foveate.serving.vllm.families.Pictures`)."""
        return self.family.pictures(self.config)

    @property
    def mrope(self) -> bool:
        """Whether the model has M-RoPE."""
        return self.traits.rotary_rows > 1

    def asked(self, keep: object = None) -> Keep:
        """A request's keep, or the recipe's own; of the right form."""
        wanted: Keep = self.method.keep if keep is None else checked("keep", keep)
        return wanted

    def at(self, keep: Keep) -> Any:
        """The method at a request's keep, None at all tokens."""
        return None if keep == FULL else replace(self.method, keep=keep)

    @property
    def spares(self) -> bool:
        """Whether the method says that it changes nothing where all tokens stay, so that it need not be asked there."""
        return bool(self.method.identity_at == {self.method.budgeted: 1.0})

    @property
    def most(self) -> Keep:
        """The most that a request may ask for."""
        return FULL if self.settings.max_keep is None else self.settings.max_keep

    def kept(self, keep: Keep, picture: Picture) -> int:
        """Placeholders that stay of a picture, its line ends among them.

        Raises:
            FoveateError: if the server's bounds do not allow it.
        """
        for view in picture.views:
            self.settings.resolve(keep, view.rows * view.columns)
        method = self.at(keep)
        visual = sum(view.rows * view.columns for view in picture.views)
        return picture.count if method is None else picture.count - visual + kept_of(method, picture.views, self.traits)

    def _admit(self) -> None:
        recipe = Recipe.of(self.settings.recipe)
        if len(recipe.methods) != 1:
            raise FoveateError(f"recipe {str(recipe)!r}: a server runs one method, whose budget requests may set; give one")
        built = self.family.built(self.config)
        reason = refusal(recipe.methods[0], self.traits, built)
        if reason:
            fit = ", ".join(fitting(self.traits, built))
            raise FoveateError(f"recipe {str(recipe)!r}: {reason}; use it under foveate.attach, or serve one of {fit}")


def kept_of(method: Any, views: Sequence[View], traits: Traits) -> int:
    """Tokens that a method of a fixed budget keeps of one picture's views."""
    if isinstance(method, ItemTokens):
        return sum(method.wanted(Item(view.rows, view.columns, 0)) for view in views)
    counts = [view.rows * view.columns for view in views]
    budget = Budget(method.keep, getattr(method, "rounding", "round"))
    together = all(site.kind == "sequence" for site in method.sites(traits))
    return budget.of(sum(counts)) if together else sum(map(budget.of, counts))


def refusal(method: Method, traits: Traits, built: int) -> str | None:
    """Why a server cannot run ``method``, None if it can. ``built``: blocks of the encoder that are there."""
    if isinstance(method, Pictures):
        return "acts before the encoder: it changes pictures before the processor gets them"
    if isinstance(method, Cache):
        return "owns the KV cache, which is vLLM's own here"
    if isinstance(method, Routing | Experts | Exits | Reuse) or not isinstance(method, Tokens):
        return "acts inside of the model, whose layers vLLM runs whole"
    if isinstance(method, Offline):
        return "needs numbers that are calibrated on the model, which a server does not read"
    reads = method.reads(traits)
    if getattr(method, "asks", False) or any(isinstance(signal, Question | Aligned) for signal in reads):
        return "reads the question, but vLLM encodes a picture once for all questions"
    for site in method.sites(traits):
        if site.kind not in SITES:
            return f"acts {ELSEWHERE[site.kind]} ({site})"
    if not method.takes_budget() or method.budgeted != "keep" or getattr(method, "keep", None) is None:
        return "has no fixed keep, but vLLM counts a picture's tokens before it is encoded"
    lacking = next(filter(None, (_lacking(signal, built) for signal in reads)), None)
    if lacking:
        return lacking
    return method.check(traits) or _positions(method, traits)


def fitting(traits: Traits, built: int) -> list[str]:
    """The methods that a server can run at their defaults, by name."""
    return [name for name, kind in sorted(methods().items()) if refusal(kind(), traits, built) is None]


def _lacking(signal: Signal, built: int) -> str | None:
    """Why vLLM cannot show a signal, None if it can."""
    if isinstance(signal, Columns | Keys | QueryKey | Rows | Values) and signal.site.kind == "encoder":
        above = signal.site.layer >= built
        return f"reads {signal.site}, but vLLM builds no block of the encoder above {built - 1}" if above else None
    if isinstance(signal, Features | Summary) or (isinstance(signal, Function) and signal.name == "projector"):
        return None
    return f"reads {type(signal).__name__} ({getattr(signal, 'name', signal)}), which vLLM does not show"


def _positions(method: Any, traits: Traits) -> str | None:
    """vLLM numbers tokens as if the prompt had been short; under M-RoPE they have the positions of their grid."""
    if method.moves:
        return "gives tokens rotary positions of its own, which vLLM does not take"
    fits = ("auto", "anchor" if traits.rotary_rows > 1 else "contiguous")
    if getattr(method, "positions", "auto") in fits:
        return None
    return f"positions={method.positions!r}: a server of {traits.family} has {fits[1]!r}; leave it at 'auto'"
