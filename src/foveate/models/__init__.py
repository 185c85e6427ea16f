"""Anatomy of each model family: where its parts are. Data and small functions, no copied forwards."""

from __future__ import annotations

from torch import nn

from foveate.core.errors import FoveateError
from foveate.models import (
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    text,
)
from foveate.models.anatomy import Anatomy
from foveate.models.wrapped import unpack, unwrapped

__all__ = ["Anatomy", "anatomy"]

_FAMILIES = {
    "llava": llava.anatomy,
    "gemma3": gemma3.anatomy,
    "qwen3_vl": qwen3_vl.anatomy,
    "llava_next": llava_next.anatomy,
    "llava_onevision": llava_onevision.anatomy,
    "internvl": internvl.anatomy,
    "idefics3": idefics3.anatomy,
    "smolvlm": idefics3.anatomy,
    "qwen2_vl": qwen2_vl.anatomy,
    "qwen2_5_vl": qwen2_5_vl.anatomy,
    "qwen3_5": qwen3_5.anatomy,
    "qwen3_vl_moe": qwen3_vl.anatomy,
    "qwen2_5_omni_thinker": qwen2_5_omni.anatomy,
}


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``.

    Raises:
        FoveateError: if no supported family fits; the message names those that are.
    """
    model = unwrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = _FAMILIES.get(kind) or (text.anatomy if text.is_text(model) else None)
    if family is None:
        known = ", ".join((*_FAMILIES, text.FAMILY))
        raise FoveateError(f"model {kind!r}: not supported; supported families: {known}")
    if not hasattr(model, "lm_head"):
        raise FoveateError(
            f"model {type(model).__name__}: has no language-modelling head; load it with AutoModelForImageTextToText"
        )
    unpack(model)
    return family(model)
