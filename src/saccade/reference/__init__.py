"""The embedded reference models, small enough to train and measure without a GPU.

>>> from saccade import reference
>>> model, processor = reference.load()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from .model import TextTower
    from .text import ReferenceCompanion

__all__ = ["companion", "load", "path", "text_tower"]


def path() -> Path:
    """Folder of the shipped checkpoint, for ``from_pretrained``."""
    return Path(__file__).parent / "checkpoint"


def load(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped model, ready to answer, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path(), dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(path())


def text_tower() -> TextTower:
    """The text encoder whose space the vision tower's CLS token shares, with both projections."""
    from .model import TextTower

    return TextTower.load(path() / "text_tower")


def companion(model: LlavaForConditionalGeneration, folder: Path | None = None) -> ReferenceCompanion | None:
    """The text tower beside ``model``, for `saccade.attach`: the shipped one, or that in ``folder``, None if it has none."""
    from .model import TextTower
    from .text import ReferenceCompanion

    place = (folder or path()) / "text_tower"
    if not place.is_dir():
        return None
    tower, vision = TextTower.load(place).to(model.device, model.dtype), model.model.vision_tower
    # Some versions of transformers nest it one level deeper.
    return ReferenceCompanion(tower, getattr(vision, "vision_model", vision).post_layernorm)
