"""Qwen3-VL: images of any size, 2x2 patch merging, interleaved M-RoPE, DeepStack features for the first decoder layers.

The encoder adds learned position embeddings, mixed for each image's grid, to its patches. Some of its blocks feed a merger
of their own (``deepstack_merger_list``) whose tokens the language model adds to its rows; encoding only some cells shortens
these features too. The frames of a video stand apart in the prompt, a timestamp in front of each; its placeholders, in
order, are still its tokens in order.

In ``qwen3_vl_moe`` the MLP of most decoder layers is a router (``mlp.gate``) and experts (``mlp.experts``).

What is common to the Qwen families is in `foveate.models.qwen_vision`.
"""

from __future__ import annotations

from typing import Any

from foveate.models.anatomy import Anatomy
from foveate.models.qwen_vision import interpolated, packed, qwen


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen3VLForConditionalGeneration`` or ``Qwen3VLMoeForConditionalGeneration``."""
    tower = model.model.visual
    return qwen(model, packed(tower, interpolated(tower)))
