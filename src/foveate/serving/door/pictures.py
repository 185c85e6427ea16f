"""A picture that came in: is it one, is it whole, is it small enough?

Decoded once here, and thrown away: what lies behind the door decodes the same bytes again, and must not be the first to find
out. The first frame of an animation is the picture; CMYK, palettes and transparency are pictures like others, which
processors turn to RGB.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings

from PIL import Image, UnidentifiedImageError

from foveate.serving.door.asgi import RefusalError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What is read; of all that Pillow can read, some start other programs."""
_SMALL = 64
"""A JPEG is decoded towards this side, which takes a fraction of the time and reads all of its data."""


def from_data_url(url: str, place: str) -> bytes:
    """What a ``data:`` URL holds.

    Raises:
        RefusalError: if it says that this is no picture, or is not base64.
    """
    head, comma, text = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or "base64" not in parameters:
        raise RefusalError(400, "picture", f"{place}: must be data:image/...;base64,...")
    if kind and not kind.startswith("image/"):
        raise RefusalError(400, "picture", f"{place}: says that it is {kind[:40]!r}; must be image/...")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RefusalError(400, "picture", f"{place}: is not base64") from None


def checked_url(content: bytes, place: str, max_pixels: int) -> str:
    """The picture as the one form of ``data:`` URL that all who come later read alike.

    Raises:
        RefusalError: if it is no whole picture, or too large.
    """
    kind = check(content, place, max_pixels)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def check(content: bytes, place: str, max_pixels: int) -> str:
    """The kind of picture, in lower case; as `checked_url`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about sizes, which are bounded here
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                kind, (width, height) = (picture.format or "").lower(), picture.size
                # Nothing is decoded yet: this is what the header says, and all that will be decoded.
                if width * height > max_pixels:
                    raise RefusalError(400, "pixels", f"{place}: {width}x{height} is more than {max_pixels} pixels")
                picture.draft("RGB", (_SMALL, _SMALL))
                picture.load()
    except RefusalError:
        raise
    except Image.DecompressionBombError:  # Pillow's own bound, where that is lower
        raise RefusalError(400, "pixels", f"{place}: is more than {max_pixels} pixels") from None
    except UnidentifiedImageError:
        raise RefusalError(400, "picture", f"{place}: is no picture; must be one of {', '.join(FORMATS)}") from None
    # Broken files raise what they like, in decoders as in Pillow's own code.
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise RefusalError(400, "picture", f"{place}: cannot be read ({said or type(error).__name__})") from None
    return "jpeg" if kind == "mpo" else kind
