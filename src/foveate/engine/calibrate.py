"""Makes the artifact of a method that needs numbers from the model it is to run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Method, Offline, Tokens
from foveate.core.recipe import Recipe
from foveate.core.signal import Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.session import attach
from foveate.models import anatomy


@dataclass(frozen=True)
class _Reader(Tokens):
    """Reads signals and leaves everything alone."""

    signals: tuple[Signal, ...]
    name = "reader"

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return self.signals

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return ()

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        return None


class Calibration:
    """A model and calibration prompts, as `Offline` methods see them (a `foveate.core.method.ModelCall`).

    ``batches`` are keyword arguments of the model's forward.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.traits = anatomy(model).traits()
        self._model, self._batches = model, batches

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        """Layout and signals of each batch."""
        for batch in self._batches:
            with torch.no_grad(), attach(self._model, _Reader(signals)) as session:
                session.retain()
                self._model(**batch, logits_to_keep=1)
                assert session.read is not None
                read = session.read
            yield read

    def weight(self, layer: int, name: Literal["query", "key"]) -> Tensor:
        """Weight ``[out, D]`` of a layer's query or key projection."""
        weight: Tensor = anatomy(self._model).projection(layer, name).weight.detach()
        if weight.is_meta:
            raise FoveateError(
                f"decoder layer {layer}: its weights are offloaded; calibrate on a model loaded without offloading"
            )
        return weight

    @torch.no_grad()
    def logits(self, recipe: Recipe) -> Tensor:
        """Last prompt token's logits ``[S, V]`` under ``recipe``; prompts are padded on the left or not at all."""
        with attach(self._model, recipe):
            return torch.cat([self._model(**batch, logits_to_keep=1).logits[:, -1].float() for batch in self._batches])


def calibrate(method: Method | str, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Artifact:
    """The artifact of ``method``, such as ``"alvts(steps=500)"``, for ``model``.

    Raises:
        FoveateError: if the method is unknown or has nothing to calibrate, or the model's weights cannot be read.
    """
    method = to_calibrate(method)
    call = Calibration(model, batches)
    if not any(call.traits.fingerprint.weights.values()):
        raise FoveateError("model: all of its weights are offloaded; calibrate on a model loaded without offloading")
    return method.artifact(call.traits.fingerprint, method.calibrate(call))


def to_calibrate(method: Method | str) -> Offline:
    """The one method that ``method`` says.

    Raises:
        FoveateError: if there is none or several, or nothing to calibrate.
    """
    methods = Recipe.of(method).methods
    if len(methods) != 1:
        raise FoveateError(f"calibrate {str(method)!r}: must be one method, such as 'shortv' or 'alvts(steps=500)'")
    if not isinstance(methods[0], Offline):
        raise FoveateError(f"{methods[0].name}: has nothing to calibrate; it runs on any model that it supports as it is")
    return methods[0]
