"""The reference models, small enough to train and measure without a GPU.

>>> from foveate import reference
>>> model, processor = reference.load()

``reference`` is a LLaVA that knows the six spine tasks, and lies here; ``reference-tiles`` (a LLaVA-NeXT) and
``reference-qwen`` (a Qwen2.5-VL) learnt the other tasks of `foveate.tasks`, too. They, and the training of all three, are a
package of their own, ``foveate_reference``.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.core.errors import FoveateError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from .model import TextTower
    from .text import ReferenceCompanion

__all__ = ["MODELS", "companion", "evaluation", "load", "path", "processor", "text_tower"]

_LARGER = {"reference-tiles": "tiles", "reference-qwen": "qwen"}
"""Their folders in the package that holds them."""
MODELS = ("reference", *_LARGER)
"""Names of the reference models."""


def path(name: str = "reference") -> Path:
    """Folder of a reference model's checkpoint, for ``from_pretrained``.

    Raises:
        FoveateError: if it is none of them, or one of the larger models, and their package is not installed.
    """
    if name not in MODELS:
        raise FoveateError(f"model={name!r}: must be {', '.join(MODELS)}; foveate.checkpoint.load knows other models, too")
    if name == "reference":
        return Path(__file__).parent / "checkpoint"
    found = find_spec("foveate_reference")
    if found is None or found.origin is None:
        raise FoveateError(
            f"model={name!r}: is not installed; pip install foveate-reference (in a clone: packages/foveate-reference)"
        )
    return Path(found.origin).parent / _LARGER[name]


def load(name: str = "reference", device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A reference model, ready to answer, and its processor."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path(name), dtype=dtype).to(device).eval()
    return model, processor(path(name))


def processor(folder: Path | str) -> Any:
    """The processor in a checkpoint folder; also where torchvision is missing, with which transformers reads videos."""
    from foveate.models.processors import read_processor

    return read_processor(folder)


def evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """What `python -m foveate_reference evaluate` measured of a checkpoint, by task; nothing where it never did."""
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
