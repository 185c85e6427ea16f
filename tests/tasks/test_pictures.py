"""A picture is read as it would be shown."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.tasks.pictures import read_picture

RAMP = np.tile(np.linspace(0, 1, 64), (4, 1))


def read(picture: Image.Image, suffix: str, tmp_path: Path, **options: Any) -> np.ndarray:
    picture.save(tmp_path / f"one.{suffix}", **options)
    return np.asarray(read_picture(tmp_path / f"one.{suffix}")).astype(int)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((RAMP * 65535).astype(np.uint16), "png"),
        ((RAMP * 65535).astype(np.uint16), "tiff"),
        ((RAMP * 65535).astype(np.uint16), "pgm"),
        (RAMP.astype(np.float32), "tiff"),
        ((RAMP * 255).astype(np.uint8), "png"),
    ],
)
def test_deep_grey_is_scaled(values: np.ndarray, suffix: str, tmp_path: Path) -> None:
    grey = read(Image.fromarray(values), suffix, tmp_path)

    assert grey.shape == (4, 64, 3)
    assert np.abs(grey - (RAMP * 255)[..., None]).max() <= 1


@pytest.mark.parametrize(
    "values", [RAMP.astype(np.float32) * 255, np.full((4, 4), np.nan, np.float32), np.full((4, 4), 70000, np.int32)]
)
def test_numbers_without_a_scale_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"one\.tiff'.* nothing says which is white; save it with 8 or 16 bits"):
        read(Image.fromarray(values), "tiff", tmp_path)


def test_deep_grey_may_stand_in_bytes() -> None:
    file = BytesIO()
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(file, "PNG")

    assert np.asarray(read_picture(file.getvalue())).mean() == pytest.approx(127.5, abs=1)


HIDDEN = (200, 0, 0)


def painted(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Left a colour that is hidden, right black; and what to save it with."""
    colours = Image.new("RGB", (4, 2), HIDDEN)
    colours.paste((0, 0, 0), (2, 0, 4, 2))
    alpha = Image.new("L", (4, 2), 0)
    alpha.paste(255, (2, 0, 4, 2))
    if mode in ("RGBA", "LA"):
        picture = colours.convert(mode)
        picture.putalpha(alpha)
        return picture, {}
    if mode == "I;16":
        return Image.fromarray(np.tile(np.array([300, 300, 0, 0], np.uint16), (2, 1))), {"transparency": 300}
    if mode == "1":
        return colours.convert("L").point(lambda value: value > 0, "1"), {"transparency": 255}
    picture = colours.convert(mode)
    return picture, {"transparency": picture.getpixel((0, 0))}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16", "1"])
def test_transparent_is_white_whatever_is_hidden_there(mode: str, tmp_path: Path) -> None:
    picture, options = painted(mode)

    shown = read(picture, "png", tmp_path, **options)

    assert (shown[:, :2] == 255).all()
    assert (shown[:, 2:] == 0).all()


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    assert abs(read(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "png", tmp_path) - 127).max() <= 1
