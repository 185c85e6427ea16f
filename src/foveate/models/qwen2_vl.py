"""Qwen2-VL: images of any size, 2x2 patch merging, full attention within each frame, M-RoPE in sections.

Older transformers leave the rotary tables with all three axes ``[3, B, n, d]`` and pick the axes' sections as they rotate
(`Anatomy.rotate`). What is common to the Qwen families, such as how attention is called, is in `foveate.models.qwen_vision`.
"""

from __future__ import annotations

from typing import Any

from foveate.models.anatomy import Anatomy
from foveate.models.qwen_vision import packed, qwen


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen2VLForConditionalGeneration``."""
    return qwen(model, packed(model.model.visual))
