"""Copies of a model that compute the same function, with a few activations a hundred times larger than others.

Small models that were trained well have no outliers, so nothing is seen there of methods that are about outliers. Here one
channel of the input of each group of linears is made `TIMES` larger by what makes it (a norm, or the linear in front), and
the columns of the linears that read it are made smaller by as much: in every other block of decoder and encoder, for the
channel that visual rows feel most compared with words. Only rounding of floats tells the copy from the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.core.roles import VISUAL
from foveate.engine.calibrate import Batches
from foveate.engine.replay import Replay
from foveate.engine.slopes import Slopes
from foveate.engine.trial import Trial
from foveate.models import anatomy

TIMES = 100.0


@torch.no_grad()
def sick(model: Any, batches: Batches, times: float = TIMES) -> Any:
    """A copy of ``model`` with outliers; channels are chosen on what ``batches`` make of them."""
    copied = copy.deepcopy(model)
    parts: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    for part in parts:
        replay = Replay(anatomy(copied), batches, part)
        states: list[Tensor] = [watched.x for watched in replay.batches]
        for number, block in enumerate(replay.blocks):
            trial = Trial(replay, number, {"exact": states}, Slopes(replay, batches), print)
            states = trial.forward("exact")
            for names in trial.groups if number % 2 else ():
                source = trial.source(names[0])
                if source is not None:
                    _plant(block, source, names, _channel(trial, names[0]), times)
    return copied


def _channel(trial: Trial, name: str) -> int:
    """Whose magnitude in visual rows is largest, compared with that in all others where there are any."""
    sums, counts = torch.zeros(2, trial.linears[name].in_features), [1e-9, 1e-9]
    for rows in trial.exact(name):
        visual = torch.isin(rows.role, rows.role.new_tensor(VISUAL))
        for place, mask in enumerate((visual, ~visual)):
            sums[place] += rows.x[mask].float().abs().sum(0)
            counts[place] += int(mask.sum())
    visual_size, other = sums[0] / counts[0], sums[1] / counts[1]
    return int((visual_size / (other + 1e-3) if counts[1] > 1 else visual_size).argmax())


def _plant(block: Any, source: str, names: Sequence[str], channel: int, times: float) -> None:
    maker = block.get_submodule(source)
    maker.weight[channel] *= times
    if getattr(maker, "bias", None) is not None:
        maker.bias[channel] *= times
    for name in names:
        block.get_submodule(name).weight[:, channel] /= times
