"""Who a picture is, in every cache that servers share: itself, and what was made of it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from foveate import __version__
from foveate.serving.settings import Keep


def identity(own: str, method: Any, keep: Keep) -> str:
    """A hex digest of a picture's ``own`` identity, the method with all its parameters, our version, and what is kept.

    A digest of its own, no suffix: identities become names of files, and some stores have kept the end of one alone.
    """
    parameters = {name: value for name, value in vars(method).items() if name != "keep"}
    parts = (own, type(method).__module__, type(method).__qualname__, sorted(parameters.items()), __version__, keep)
    return sha256(repr(parts).encode()).hexdigest()
