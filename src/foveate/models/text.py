"""Text models: a decoder and nothing in front of it, whatever it is called (Llama, Qwen2, Qwen3, Mistral, SmolLM2, ...).

There is no encoder and no picture, so no row of a prompt is visual. What acts on visual rows alone is refused at attach
(`foveate.engine.idle`); a cache's owner finds a prompt that is text from end to end, all of which it may rank.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from foveate.models.anatomy import Anatomy
from foveate.models.decoder import layers_of

FAMILY = "text"


def is_text(model: nn.Module) -> bool:
    """Whether it is a decoder with a language-modelling head, made of text alone, as transformers builds them."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "lm_head") or not hasattr(model, "get_decoder"):
        return False
    # What sees or hears has a configuration of its text within that of the whole.
    return not config.is_encoder_decoder and config.get_text_config() is config


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a causal language model."""
    config, inner = model.config, model.get_decoder()
    return Anatomy(
        family=FAMILY,
        model=model,
        multimodal=inner,
        vision=None,
        language_model=inner,
        layers=layers_of(inner),
        image_tokens=(),
        pictures=lambda bound: [],
        rotary_rows=3 if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) else 1,
        config=config,
    )
