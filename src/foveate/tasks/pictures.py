"""Pictures from files, opened when they are looked at: those of a data set need not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image, ImageOps

from foveate.core.errors import FoveateError

T = TypeVar("T")

Source = Path | bytes
"""A picture's file, or what stands in it."""

_WITH_ALPHA = ("RGBA", "RGBa", "LA", "PA")


@dataclass(frozen=True, eq=False)
class Lazy(Sequence[T], Generic[T]):
    """A sequence whose members are made from ``sources`` each time that they are asked for."""

    make: Callable[[Any], T]
    sources: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, at: Any) -> Any:
        return [self.make(source) for source in self.sources[at]] if isinstance(at, slice) else self.make(self.sources[at])


def read_picture(source: Source, name: str | None = None) -> Image.Image:
    """A picture as RGB, the right way up, in front of white where it is transparent; ``info["source"]`` names it.

    ``name`` is that of bytes that have one, such as a URL.

    Raises:
        FoveateError: if there is none that can be read, or if nobody knows what its numbers mean: of 16 bits or less, black
            is 0 and white the largest number; floats must lie in [0, 1].
    """
    if isinstance(source, Path):
        name = str(source)
    named = f"image={name!r}" if name else f"image of {len(source)} bytes"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            shown = _as_rgb(ImageOps.exif_transpose(picture), picture.format)
    except FoveateError as error:
        raise FoveateError(f"{named}: {error}") from error
    except FileNotFoundError as error:
        raise FoveateError(f"{named}: no such file") from error
    # Pillow meets broken files with many kinds of errors, all of them OSError, SyntaxError or ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FoveateError(f"{named}: is not a picture that can be read") from error
    shown.info["source"] = named
    return shown


def _as_rgb(picture: Image.Image, file_format: str | None) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bits(picture, file_format)
    if picture.mode in _WITH_ALPHA or "transparency" in picture.info:
        # What is transparent may be of any colour, which RGB alone would show.
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image, file_format: str | None) -> Image.Image:
    """A picture of one channel with more than eight bits, which Pillow would clip to 0..255 instead of scaling it."""
    values = np.asarray(picture)
    # Pillow has mode I for the 16 bits of a Netpbm file (before version 11, of a PNG, too), and for 32 bits of a TIFF.
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and file_format in ("PNG", "PPM"))
    white = 65535 if sixteen else 1
    if not (sixteen or (picture.mode == "F" and bool(((values >= 0) & (values <= 1)).all()))):
        raise FoveateError(
            f"has {values.dtype} numbers from {values.min():g} to {values.max():g}, and nothing says which is white; save "
            "it with 8 or 16 bits, or as floats in [0, 1]"
        )
    grey = Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))
    hidden = picture.info.get("transparency")
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey
