"""The embedded reference models, small enough to train and measure without a GPU.

>>> from foveate import reference
>>> model, processor = reference.load()

``reference`` is a LLaVA that knows the six spine tasks; ``reference-tiles`` (a LLaVA-NeXT) and ``reference-qwen``
(a Qwen2.5-VL) learnt the other tasks of `foveate.tasks`, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from .model import TextTower
    from .text import ReferenceCompanion

__all__ = ["MODELS", "companion", "evaluation", "load", "path", "processor", "text_tower"]

_FOLDERS = {"reference": "checkpoint", "reference-tiles": "checkpoint_tiles", "reference-qwen": "checkpoint_qwen"}
MODELS = tuple(_FOLDERS)
"""Names of the shipped models."""


def path(name: str = "reference") -> Path:
    """Folder of a shipped checkpoint, for ``from_pretrained``."""
    return Path(__file__).parent / _FOLDERS[name]


def load(name: str = "reference", device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A shipped model, ready to answer, and its processor."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path(name), dtype=dtype).to(device).eval()
    return model, processor(path(name))


def processor(folder: Path | str) -> Any:
    """The processor in a checkpoint folder, without anything that reads videos: ``reference-qwen`` is shown them by frame."""
    from foveate.models.processors import read_processor

    return read_processor(folder)


def evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """What `foveate reference evaluate` measured of a checkpoint, by task; nothing where it never did."""
    measured = folder / "evaluation.json"
    return json.loads(measured.read_text()) if measured.is_file() else {}


def text_tower() -> TextTower:
    """The text encoder whose space the small model's vision tower shares by its CLS token, with both projections."""
    from .model import TextTower

    return TextTower.load(path() / "text_tower")


def companion(model: LlavaForConditionalGeneration, folder: Path | None = None) -> ReferenceCompanion | None:
    """The text tower beside ``model``, for `foveate.attach`: the shipped one, or that in ``folder``, None if it has none."""
    from .model import TextTower
    from .text import ReferenceCompanion

    place = (folder or path()) / "text_tower"
    if not place.is_dir():
        return None
    tower, vision = TextTower.load(place).to(model.device, model.dtype), model.model.vision_tower
    # Some versions of transformers nest it one level deeper.
    return ReferenceCompanion(tower, getattr(vision, "vision_model", vision).post_layernorm)
