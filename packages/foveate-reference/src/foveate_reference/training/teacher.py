"""A vision tower that can read teaches one that cannot yet: on its own, that takes many times as long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

from foveate.tasks.scenes import SIZE
from foveate.tasks.spine import PATCH

_GRID = SIZE // PATCH
_EMPTY = 0.1
"""Weight of a patch that shows nothing."""


class Imitation(nn.Module):
    """Losses by which Qwen2.5-VL's patches, halfway up the encoder and at its end, should tell what a CLIP tower's tell.

    A window of the student is as large as a picture of the teacher and has the same patches. What is compared are normed
    features, the student's after a linear map; nothing of this is in the checkpoint.
    """

    def __init__(self, student: Any, teacher: Path) -> None:
        super().__init__()
        loaded: Any = AutoModelForImageTextToText.from_pretrained(teacher, dtype=torch.float32)
        # In a tuple: it is neither trained nor saved with the rest.
        self._teacher = (loaded.model.vision_tower.eval(),)
        self._late = loaded.config.vision_feature_layer
        self._half = len(student.blocks) // 2
        self._early: list[Tensor] = []
        student.blocks[self._half - 1].register_forward_hook(lambda block, inputs, output: self._early.append(output))
        widths = student.config.hidden_size, self._teacher[0].config.hidden_size
        self.maps = nn.ModuleList(nn.Linear(*widths) for _ in range(2))

    def forward(self, vision: dict[str, Tensor], late: Tensor, shown: Tensor) -> dict[str, Tensor]:
        """The losses by name.

        Args:
            vision: what the encoder was given.
            late: the features that it gave, ``[patches, width]`` in the order of its windows.
            shown: whether a patch shows something, ``[patches / 4, 4]`` in the order of merged patches.
        """
        patches, order = vision["pixel_values"], window_order(vision["image_grid_thw"])
        with torch.no_grad():
            pixels = windows(patches, order)
            hidden = self._teacher[0].to(pixels.device)(pixels, output_hidden_states=True).hidden_states
        pairs = ((self._early.pop(), hidden[self._half]), (late, hidden[self._late]))
        self._early.clear()
        # Most of a page is empty, and would be nearly all of the loss.
        weights = torch.where(shown[order].flatten(), 1.0, _EMPTY)
        losses = [self._loss(number, *pair, weights) for number, pair in enumerate(pairs)]
        return dict(zip(("imitated_early", "imitated_late"), losses, strict=True))

    def _loss(self, number: int, ours: Tensor, theirs: Tensor, weights: Tensor) -> Tensor:
        wanted = _merge_order(theirs[:, 1:].float())
        told = self.maps[number](nn.functional.layer_norm(ours.float(), ours.shape[-1:])).float()
        missed = (told - nn.functional.layer_norm(wanted, wanted.shape[-1:])).square().mean(-1)
        return (weights * missed).sum() / weights.sum()


def window_order(grids: Tensor) -> Tensor:
    """Merged patches ``[N / 4]`` in the order in which Qwen2.5-VL's windows take them."""
    order: Tensor = get_vision_window_index(grids, spatial_merge_size=2, window_size=SIZE, patch_size=PATCH)[0]
    return order


def windows(patches: Tensor, order: Tensor) -> Tensor:
    """The pictures of Qwen2.5-VL's windows ``[W, 3, 96, 96]`` from its flattened patches ``[N, 3 * 2 * 8 * 8]``."""
    # A picture is two equal frames of a film, and patches come two by two.
    first = patches.view(-1, 4, 3, 2, PATCH, PATCH)[:, :, :, 0][order]
    tokens = first.view(-1, _GRID // 2, _GRID // 2, 2, 2, 3, PATCH, PATCH)
    return tokens.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, SIZE, SIZE)


def _merge_order(features: Tensor) -> Tensor:
    """Features ``[W, 144, width]`` in raster order as ``[W * 144, width]`` in the order in which patches are merged."""
    half = _GRID // 2
    return features.unflatten(1, (half, 2, half, 2)).transpose(2, 3).flatten(0, 4)
