"""Pictures that a command is given: files, URLs, and samples that libraries carry."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import get_session
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.text import first_line
from foveate.tasks import samples
from foveate.tasks.pictures import read_picture

_SAMPLE = "sample:"
_URL = re.compile(r"https?://", re.IGNORECASE)
_SECONDS = 30


def picture(name: str) -> Image.Image:
    """The picture of a name: a file, ``http://`` and ``https://``, or ``sample:`` and the name of one that libraries carry.

    Raises:
        FoveateError: if there is none that can be had and read.
    """
    if name.startswith(_SAMPLE):
        return samples.sample(name.removeprefix(_SAMPLE))
    if not _URL.match(name):
        return read_picture(Path(name))
    return read_picture(_fetched(name), name)


def _fetched(url: str) -> bytes:
    """What stands at a URL, by the client through which models are downloaded, too, with the user's proxies."""
    try:
        response = get_session().get(url, timeout=_SECONDS)
        response.raise_for_status()
    # The client's own errors, of which there are many kinds, and those of sockets.
    except Exception as error:
        raise FoveateError(f"image={url!r}: cannot be fetched ({first_line(error)})") from error
    return bytes(response.content)
