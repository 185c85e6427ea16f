"""A processor for ``reference-qwen`` that needs no torchvision."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLProcessor

from .model import IMAGE

VIDEO = "<video>"


class PictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for pictures only: that of videos needs torchvision. Videos are given frame by frame."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
