"""Qwen3.5: the encoder of Qwen3-VL (without DeepStack), and a language model whose layers mostly have no attention.

Three of four decoder layers are gated delta networks (``linear_attn``): a short causal convolution and a recurrent state of
fixed size. They have no keys, no rotary positions and no mask but a 2-D one of padding, and every row that they are shown
decays their state, so that masking a row is not the same as removing it. `Traits.recurrent` names them; `Anatomy.attention`
and what builds on it refuse there. The other layers (``self_attn``) turn only the first part of each head, by interleaved
M-RoPE, and their ``q_proj`` makes a gate beside each query; the gate acts on attention's output, `Anatomy.query_key` gives
the queries alone.

What is common to the Qwen families is in `foveate.models.qwen_vision`.
"""

from __future__ import annotations

from typing import Any

from foveate.models.anatomy import Anatomy
from foveate.models.qwen_vision import interpolated, packed, qwen


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen3_5ForConditionalGeneration``."""
    tower = model.model.visual
    return qwen(model, packed(tower, interpolated(tower)))
