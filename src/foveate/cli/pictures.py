"""Pictures that a command is given: files, URLs, and samples that libraries carry."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.text import first_line
from foveate.tasks import samples
from foveate.tasks.pictures import read_picture

_SAMPLE = "sample:"
_URL = re.compile(r"https?://", re.IGNORECASE)
_SECONDS = 30


def picture(name: str) -> Image.Image:
    """The picture of a name: a file, an ``http://`` or ``https://`` address, or ``sample:`` and one that libraries carry.

    Raises:
        FoveateError: if there is none that can be had and read.
    """
    if name.startswith(_SAMPLE):
        return samples.sample(name.removeprefix(_SAMPLE))
    if _URL.match(name):
        return read_picture(_fetched(name), name)
    return read_picture(Path(name))


def _fetched(url: str) -> bytes:
    # Many sites answer nobody who does not say who they are.
    asked = Request(url, headers={"User-Agent": f"foveate/{version('foveate')}"})
    try:
        with urlopen(asked, timeout=_SECONDS) as response:
            content: bytes = response.read()
    # What goes wrong on the way is an OSError; a broken address or answer, a ValueError or another of HTTP's own.
    except Exception as error:
        raise FoveateError(f"image={url!r}: cannot be fetched ({first_line(error)})") from error
    return content
