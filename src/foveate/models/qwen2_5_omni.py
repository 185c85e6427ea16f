"""The thinker of Qwen2.5-Omni: Qwen2.5-VL with sound.

Its vision tower and language model are those of Qwen2.5-VL. Sound is encoded by a tower of its own, whose tokens stand in
the prompt where its placeholders are: between the tokens of a video if they belong together, so rows of a grid need not be
neighbours there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from foveate.models import qwen2_5_vl
from foveate.models.anatomy import Anatomy, Audio


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen2_5OmniThinkerForConditionalGeneration``."""
    tower = model.model.audio_tower
    audio = Audio(tower, tower.layers[-1].self_attn, _frames, pooled=2)
    return replace(qwen2_5_vl.anatomy(model), audio_tokens=(model.config.audio_token_id,), audio=audio)


def _frames(call: Mapping[str, Any]) -> list[int]:
    """Every second column of a sound's spectrogram is a frame, by the convolution's stride."""
    found: list[int] = ((call["feature_lens"] - 1) // 2 + 1).tolist()
    return found
