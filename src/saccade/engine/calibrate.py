"""Makes the artifact of a method that needs numbers from the model it is to run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from saccade.core import registry
from saccade.core.artifact import Artifact
from saccade.core.errors import SaccadeError
from saccade.core.method import Offline
from saccade.core.recipe import Recipe
from saccade.engine.session import attach
from saccade.models.anatomy import anatomy


class Calibration:
    """A model and calibration prompts, as `Offline` methods see them (a `saccade.core.method.ModelCall`).

    ``batches`` are keyword arguments of the model's forward.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.traits = anatomy(model).traits()
        self._model, self._batches = model, batches

    @torch.no_grad()
    def logits(self, recipe: Recipe) -> Tensor:
        """Last prompt token's logits ``[S, V]`` under ``recipe``; prompts are padded on the left or not at all."""
        with attach(self._model, recipe):
            return torch.cat([self._model(**batch, logits_to_keep=1).logits[:, -1].float() for batch in self._batches])


def calibrate(name: str, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Artifact:
    """The artifact of method ``name`` for ``model``.

    Raises:
        SaccadeError: if the method is unknown or has nothing to calibrate.
    """
    kind = registry.get(name)
    if not issubclass(kind, Offline):
        raise SaccadeError(f"{name}: has nothing to calibrate")
    call = Calibration(model, batches)
    return Artifact(name, call.traits.fingerprint, kind().calibrate(call))
