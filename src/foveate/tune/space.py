"""The recipes among which to search: derived from the fields of every method that the model can host.

By rule: the budget is a ratio, layers are those that the model has, stages (layers with a share each) ascend, switches are
tried both ways; what a method declares (`Method.tunable`) comes on top, everything else stays at its default. A parameter
whose default is None, the paper's own choice, or no value for any picture, may also stay at that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from foveate.core.method import Method
from foveate.core.recipe import Recipe, build
from foveate.core.traits import Traits
from foveate.core.tunable import ByPicture, Range

if TYPE_CHECKING:
    from optuna import Trial

GROUPS = ("before_encoder", "in_encoder", "before_llm", "in_llm", "kv_cache")
"""In the order in which a request passes them."""

KEEP = Range(0.05, 1.0, log=True)
SHARE = Range(0.0, 1.0)
_ALONE = "alone"


@dataclass(frozen=True)
class Dimension:
    """What may become of one hyperparameter.

    ``count``: how many values of the range make a tuple; None for a single one. ``ascending``: they are layers, one behind
    the other. ``optional``: it may stay at its ``default``.
    """

    name: str
    values: Range | tuple[Any, ...]
    count: int | None = None
    ascending: bool = False
    optional: bool = False
    default: Any = None

    def suggest(self, trial: Trial, label: str) -> Any:
        """A value, drawn by the sampler of the trial."""
        if self.optional and not trial.suggest_categorical(f"{label} is set", (False, True)):
            return self.default
        if self.count is None:
            return _draw(trial, label, self.values)
        drawn = [_draw(trial, f"{label}[{place}]", self.values) for place in range(self.count)]
        return tuple(value + place for place, value in enumerate(sorted(drawn))) if self.ascending else tuple(drawn)

    def parameters(self, label: str, value: Any) -> Iterator[tuple[str, Any]]:
        """What a trial must draw for this value to come out."""
        if self.optional:
            yield f"{label} is set", value != self.default
        if self.optional and value == self.default:
            return
        if self.count is None:
            yield label, value
        else:
            shift = range(self.count) if self.ascending else [0] * self.count
            yield from ((f"{label}[{place}]", each - shift[place]) for place, each in enumerate(value))


@dataclass(frozen=True)
class Space:
    """The recipes to search: a method, or (``compose``) two that act one after the other, with their hyperparameters."""

    methods: Mapping[str, tuple[Dimension, ...]]
    groups: Mapping[str, str]
    compose: bool = False

    @classmethod
    def of(cls, names: Sequence[str], traits: Traits, compose: bool = False, pictures: int = 1) -> Space:
        """The space of these methods on a model that can host them, for prompts of so many ``pictures`` at most."""
        plain = {name: build(name, {}) for name in names}
        dimensions = {name: tuple(_dimensions(method, traits, pictures)) for name, method in plain.items()}
        return cls(dimensions, {name: method.group for name, method in plain.items()}, compose)

    def suggest(self, trial: Trial) -> Recipe:
        """A recipe, drawn by the sampler of the trial."""
        first = trial.suggest_categorical("method", tuple(self.methods))
        names, others = [first], self._behind(first)
        if others:
            # Choices are fixed for each label: what may follow depends on the group alone.
            second = trial.suggest_categorical(f"behind {self.groups[first]}", (_ALONE, *others))
            names += [second] if second != _ALONE else []
        return Recipe(tuple(self._method(trial, name) for name in names))

    def parameters(self, recipe: Recipe) -> dict[str, Any]:
        """What a trial must draw for this recipe to come out; all its methods must be in the space."""
        first, *second = (method.name for method in recipe.methods)
        drawn: dict[str, Any] = {"method": first}
        if self._behind(first):
            drawn[f"behind {self.groups[first]}"] = second[0] if second else _ALONE
        for method in recipe.methods:
            for dimension in self.methods[method.name]:
                drawn.update(dimension.parameters(f"{method.name}.{dimension.name}", getattr(method, dimension.name)))
        return drawn

    def _behind(self, first: str) -> tuple[str, ...]:
        """Methods that may follow ``first``: those that act at a later place, so no pair comes twice."""
        if not self.compose:
            return ()
        return tuple(name for name in self.methods if _place(self.groups[name]) > _place(self.groups[first]))

    def _method(self, trial: Trial, name: str) -> Method:
        return build(name, {d.name: d.suggest(trial, f"{name}.{d.name}") for d in self.methods[name]})


def _place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _dimensions(method: Method, traits: Traits, pictures: int) -> Iterator[Dimension]:
    declared, fitted = method.tunable(traits), method.fitted(traits)
    for field in fields(method):
        optional = field.default is None
        values = declared.get(field.name)
        if isinstance(values, ByPicture):
            if pictures > 1:
                each = Range(values.low, values.high)
                yield Dimension(field.name, each, min(pictures, values.most), optional=True, default=field.default)
        elif values is not None:
            if values != (field.default,):  # held fast
                yield Dimension(field.name, values, optional=optional)
        elif field.name == method.budgeted:
            yield Dimension(field.name, KEEP, optional=optional)
        elif isinstance(field.default, bool):
            yield Dimension(field.name, (True, False))
        elif field.name == "layer" or field.name.endswith("_layer"):
            depth = _depth(field, method, traits)
            if depth > 1:
                yield Dimension(field.name, Range(1, depth - 1), optional=optional)
        elif (
            isinstance(field.default, tuple)
            and field.default
            and all(type(v) is float and 0 <= v <= 1 for v in field.default)
        ):
            yield Dimension(field.name, SHARE, count=len(field.default))
        elif (
            field.name == "layers" and (stages := len(getattr(fitted, field.name) or ())) and stages < traits.decoder_layers
        ):
            # Drawn with repetition and then pulled apart, so every draw is a valid one.
            yield Dimension(field.name, Range(1, traits.decoder_layers - stages), stages, ascending=True, optional=optional)


def _depth(field: Field[Any], method: Method, traits: Traits) -> int:
    """How many layers the tower has that a layer's number is about."""
    in_decoder = method.group in ("in_llm", "kv_cache") and "encoder" not in field.name
    return traits.decoder_layers if in_decoder else traits.encoder_layers or 0


def _draw(trial: Trial, label: str, values: Range | tuple[Any, ...]) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(label, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(label, values.low, values.high, log=values.log)
    # Two digits are as many as a measured difference is worth, and a recipe is to be read.
    return float(f"{trial.suggest_float(label, cast(float, values.low), cast(float, values.high), log=values.log):.2g}")
