"""What the door says to vLLM's processor about one request, and hears back from it.

Both run in the server's process. A request carries a number of its own; under this number the processor notes how many
visual tokens the request's pictures had and how many are left, and the door takes the note for its response header.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

KEEP = "foveate_keep"
TICKET = "foveate_ticket"
"""Keywords among a request's ``mm_processor_kwargs``; clients never set them: the door drops what they send there."""


@dataclass
class Counts:
    """Visual tokens of a request, of all its pictures together."""

    before: int = 0
    after: int = 0


_numbers = itertools.count(1)
_open: dict[int, Counts] = {}
_lock = threading.Lock()


def draw() -> int:
    """A new request's number."""
    number = next(_numbers)
    with _lock:
        _open[number] = Counts()
    return number


def note(number: int, before: int, after: int) -> None:
    """Adds a picture's tokens; nothing for a request that is gone."""
    with _lock:
        if counts := _open.get(number):
            counts.before += before
            counts.after += after


def noted(number: int) -> bool:
    """Whether there is a note yet."""
    with _lock:
        return number in _open and _open[number].before > 0


def redeem(number: int) -> Counts:
    """What was noted, and an end to it."""
    with _lock:
        return _open.pop(number)
