"""Which methods a model could host, with their defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from foveate.core import registry
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe, build
from foveate.engine.check import check
from foveate.models import anatomy
from foveate.models.anatomy import Anatomy
from foveate.models.specimens import FAMILIES, specimen


@dataclass(frozen=True)
class Verdict:
    """Whether a method runs on a model: ``reason`` says why not, and what would help; None if it does."""

    method: str
    model: str
    reason: str | None


def by_family(only: str | None = None) -> list[Verdict]:
    """Every method, or the one called ``only``, on a specimen of every supported family."""
    return verdicts({family: specimen(family) for family in FAMILIES}, only=only)


def verdicts(
    models: Mapping[str, nn.Module],
    companion: bool = False,
    artifacts: Iterable[Artifact] = (),
    only: str | None = None,
) -> list[Verdict]:
    """Every method, or the one called ``only``, on every one of ``models``: by group and name, then in the order given."""
    artifacts = tuple(artifacts)
    asked = registry.methods().values() if only is None else (registry.get(only),)
    known = sorted(asked, key=lambda kind: (kind.group, kind.name))
    parts = {name: anatomy(model) for name, model in models.items()}
    return [
        Verdict(kind.name, name, _refusal(kind.name, parts[name], companion, artifacts)) for kind in known for name in parts
    ]


def _refusal(method: str, parts: Anatomy, companion: bool, artifacts: Iterable[Artifact]) -> str | None:
    try:
        check(Recipe((build(method, {}),)), parts, parts.traits(companion, artifacts))
    except FoveateError as error:
        # The same reason is to read the same for every model.
        traits = parts.traits()
        general = str(error).removeprefix(f"{method}: ").replace(str(traits.fingerprint), "this model")
        # What is called text is not all that a reason says of text.
        named = rf"\b{traits.family}\b" if traits.sees else rf"\b{traits.family}(?= has\b)"
        return re.sub(named, "this model", general)
    return None
