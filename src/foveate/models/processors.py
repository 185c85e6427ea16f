"""The processor of a checkpoint; for pictures also where torchvision is missing, and for text models.

Without torchvision, transformers reads pictures with Pillow, but refuses to load a processor that reads videos, too. Here
such a processor is put together from its parts, with `foveate.models.no_videos.NoVideos` among them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)


def read_processor(source: str | Path, **options: Any) -> Any:
    """The processor of a checkpoint; of a text model its tokenizer as a `TextProcessor`.

    Args:
        source: a folder, or a Hub id.
        options: keywords of ``AutoProcessor.from_pretrained``.

    Raises:
        FoveateError: later, if it is given a video and there is no torchvision.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    from foveate.models.text_processor import TextProcessor

    kind = type(AutoConfig.from_pretrained(source, **options))
    if reads_text(kind):
        return TextProcessor(AutoTokenizer.from_pretrained(source, **options))
    videos = kind in PROCESSOR_MAPPING and "video_processor" in PROCESSOR_MAPPING[kind].get_attributes()
    if videos and not is_torchvision_available():
        return _of_pictures(PROCESSOR_MAPPING[kind], source, options)
    return AutoProcessor.from_pretrained(source, **options)


def holds_text(source: str | Path, **options: Any) -> bool:
    """Whether a checkpoint is a text model, by its configuration alone; arguments are those of `read_processor`."""
    from transformers import AutoConfig

    return reads_text(type(AutoConfig.from_pretrained(source, **options)))


def reads_text(config: type) -> bool:
    """Whether checkpoints with such a configuration are text models, to be loaded as ``AutoModelForCausalLM``."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return config in MODEL_FOR_CAUSAL_LM_MAPPING and config not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _of_pictures(kind: Any, source: str | Path, options: dict[str, Any]) -> Any:
    """A processor of the class ``kind`` from a checkpoint, which takes no videos."""
    from transformers import AutoTokenizer

    # What transformers offers by that name at its top wants torchvision in some versions, whatever is in it.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from foveate.models.no_videos import NoVideos, without_videos

    _LOG.info("%s: torchvision is not installed, so its processor takes pictures and no videos", source)
    readers = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer, "video_processor": NoVideos}
    parts = [readers[name].from_pretrained(source, **options) for name in kind.get_attributes()]
    settings, _ = kind.get_processor_dict(source, **options)
    return without_videos(kind).from_args_and_dict(parts, settings)
