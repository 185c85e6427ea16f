"""The thinker of Qwen2.5-Omni: Qwen2.5-VL with sound.

Its vision tower and language model are those of Qwen2.5-VL. Sound is encoded by a tower of its own, whose tokens stand in
the prompt where its placeholders are: between the tokens of a video if they belong together, so rows of a grid need not be
neighbours there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foveate.models import qwen2_5_vl
from foveate.models.anatomy import Anatomy


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen2_5OmniThinkerForConditionalGeneration``."""
    return replace(qwen2_5_vl.anatomy(model), audio_tokens=(model.config.audio_token_id,))
