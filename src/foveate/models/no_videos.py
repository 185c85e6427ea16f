"""Processors of families that read videos, too, where torchvision is missing: they take pictures, and refuse videos by name."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from foveate.core.errors import FoveateError


class NoVideos(BaseVideoProcessor):
    """In the place of a family's video processor: keeps the settings of the checkpoint, and takes no video."""

    video_processor_type: str | None = None
    """The class that the checkpoint names; where it names none, transformers finds it by the model's family."""

    def __call__(self, videos: Any, **settings: Any) -> NoReturn:
        raise FoveateError(
            "video: cannot be read without torchvision; pip install 'foveate[video]', or give its frames as pictures"
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read, so that whoever saves the processor loses nothing."""
        named = {"video_processor_type": self.video_processor_type} if self.video_processor_type else {}
        return {name: value for name, value in super().to_dict().items() if name != "video_processor_type"} | named


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class of a family's processor, but that it takes `NoVideos` for the part that reads videos."""

    class PictureProcessor(kind):  # type: ignore[misc, valid-type]
        """Only the check of what its parts are differs."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            # transformers' base class is a dummy where torchvision is missing, of which nothing is an instance.
            if isinstance(argument, NoVideos):
                return NoVideos
            return super().check_argument_for_proper_class(argument_name, argument)

    # Saved under the family's name, it is loaded as what it stands for by whoever has torchvision.
    PictureProcessor.__name__ = kind.__name__
    return PictureProcessor
