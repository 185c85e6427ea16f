"""Pictures from files, opened when they are looked at: those of a data set need not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image, ImageOps

from foveate.core.errors import FoveateError

T = TypeVar("T")

Source = Path | bytes
"""A picture's file, or what stands in it."""


@dataclass(frozen=True, eq=False)
class Lazy(Sequence[T], Generic[T]):
    """A sequence whose members are made from ``sources`` each time that they are asked for."""

    make: Callable[[Any], T]
    sources: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, at: Any) -> Any:
        return [self.make(source) for source in self.sources[at]] if isinstance(at, slice) else self.make(self.sources[at])


def read_picture(source: Source) -> Image.Image:
    """A picture as RGB, the right way up."""
    named = f"image={str(source)!r}" if isinstance(source, Path) else f"image of {len(source)} bytes"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise FoveateError(f"{named}: no such file") from error
    # Pillow meets broken files with many kinds of errors, all of them OSError, SyntaxError or ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FoveateError(f"{named}: is not a picture that can be read") from error
