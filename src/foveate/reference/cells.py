"""Cells of scenes with labels, for classifiers that look at pixels before the encoder does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.tasks.question import evidence_cells
from foveate.tasks.scenes import draw_scene
from foveate.tasks.spine import GRID, PATCH

from .model import build_processor

_SPLITS = {"train": 0, "test": 1}


def labelled_cells(scenes: int, seed: int = 0, split: str = "train") -> tuple[Tensor, Tensor]:
    """The patches of ``scenes`` pictures, half of them with a sign, and whether each shows anything.

    Returns:
        Pixels as the encoder gets them, float32 ``[scenes, GRID * GRID, 3, PATCH, PATCH]``, and whether any pixel of the
        patch belongs to a thing or a letter, bool ``[scenes, GRID * GRID]``.
    """
    drawn = [draw_scene(np.random.default_rng([_SPLITS[split], seed, index, 4]), sign_rate=0.5) for index in range(scenes)]
    pictures = build_processor().image_processor([scene.image for scene in drawn], return_tensors="pt")["pixel_values"]
    pixels = pictures.reshape(scenes, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shown = [scene.masks.any(0) | scene.letter_masks.any(0) for scene in drawn]
    labels = np.stack([evidence_cells(mask, GRID, GRID, share=1 / PATCH**2).flatten() for mask in shown])
    return pixels.contiguous(), torch.from_numpy(labels)
