"""What a request asks of the recipe: its field ``foveate``."""

from __future__ import annotations

from typing import Any

from foveate.core.errors import FoveateError
from foveate.serving.door.asgi import RefusalError
from foveate.serving.settings import FULL, Keep, Settings, checked

FIELD = "foveate"
_GUARDED = ("mm_processor_kwargs", "media_io_kwargs")
"""Options of processors, one of which can end a server: what clients send there is dropped."""


def take(body: dict[str, Any], settings: Settings | None) -> Keep | None:
    """Takes the field out of a body, and what clients may not say; the keep that it asks for, None for the recipe's own.

    Raises:
        RefusalError: if there is anything else under that name, or a keep that this server does not allow.
    """
    for name in _GUARDED:
        body.pop(name, None)
    if FIELD not in body:
        return None
    given = body.pop(FIELD)
    if not isinstance(given, dict) or given.keys() != {"keep"}:
        raise RefusalError(400, "keep", f'{FIELD}: must be {{"keep": N}}, a count, a share in (0, 1] or "{FULL}"')
    try:
        keep = checked(f"{FIELD}.keep", given["keep"])
        if settings is None:
            if keep != FULL:
                raise FoveateError(f"{FIELD}.keep={keep!r}: this server runs no recipe; leave it out")
            return None
        refuse_outside(keep, settings)
    except FoveateError as error:
        raise RefusalError(400, "keep", str(error)) from None
    return keep


def refuse_outside(keep: Keep, settings: Settings) -> None:
    """Refuses what is out of bounds whatever the picture; the rest is seen where its grid is known.

    Counts and shares cannot be compared without a picture, one with another of its kind can.
    """
    for bound, name, sign in ((settings.min_keep, "min_keep", 1), (settings.max_keep, "max_keep", -1)):
        wanted = 1.0 if keep == FULL else keep
        if bound is not None and type(bound) is type(wanted) and sign * (wanted - bound) < 0:
            raise FoveateError(f"{FIELD}.keep={keep!r}: this server's {name} is {bound!r}")
