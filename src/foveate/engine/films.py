"""Pictures that are the frames of videos, for methods that read time, and all else that a call is handed beside pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from foveate.core.errors import FoveateError
from foveate.core.stream import Memory
from foveate.engine.side import Handed
from foveate.models.anatomy import Picture, View


@dataclass(frozen=True)
class Beside:
    """What the caller hands over beside the pictures.

    Attributes:
        side: side data.
        films: of how many consecutive pictures each video is made, 1 = a picture; () = all are pictures.
        memory: of the stream whose next frames they are.
    """

    side: Handed = field(default_factory=dict)
    films: tuple[int, ...] = ()
    memory: Memory | None = None


def checked(films: Sequence[int]) -> tuple[int, ...]:
    """The counts, if each is one.

    Raises:
        FoveateError: if not.
    """
    if not films or any(not isinstance(count, int) or count < 1 for count in films):
        raise FoveateError(
            f"films={list(films)!r}: must be how many consecutive pictures make each video, such as [6, 6]; 1 = a picture"
        )
    return tuple(films)


def joined(pictures: Sequence[Picture], films: Sequence[int]) -> list[Picture]:
    """The pictures with those of each film as one video, frames one below the other in its grid, as of a real one.

    Raises:
        FoveateError: if not every picture is told its video, or frames of one differ in their grids or have several.
    """
    if sum(films) != len(pictures):
        raise FoveateError(
            f"films={list(films)!r}: are {sum(films)} frames, but {len(pictures)} pictures are encoded; say of each which "
            "video it is of (1 = a picture)"
        )
    found, first = [], 0
    for count in films:
        found.append(pictures[first] if count == 1 else _video(pictures[first : first + count], first))
        first += count
    return found


def _video(frames: Sequence[Picture], first: int) -> Picture:
    """One picture of all ``frames``; ``first`` is the number of the first among all pictures."""
    views = [view for frame in frames for view in frame.views]
    if len(views) > len(frames):
        number, many = next((n, frame) for n, frame in enumerate(frames, first) if len(frame.views) > 1)
        raise FoveateError(
            f"films: picture {number} comes in {len(many.views)} grids (tiles, or an overview and details), and a frame has "
            "one; hand it to the model as a single view, or leave it a picture"
        )
    for number, view in enumerate(views, first):
        if (view.rows, view.columns) != (views[0].rows, views[0].columns):
            raise FoveateError(
                f"films: picture {number} is {view.rows} x {view.columns} tokens and the video begins with "
                f"{views[0].rows} x {views[0].columns}; give frames of one size"
            )
    one = views[0]
    cells = [view.cells for view in views if view.cells is not None]
    whole = torch.cat(cells) if len(cells) == len(views) else None
    view = View(one.rows * len(views), one.columns, one.frames * len(views), whole, one.encoder)
    placed = [frame.placement.clone() for frame in frames]
    for number, place in enumerate(placed):
        place[place[:, 0] >= 0, 1] += number * one.rows * one.columns
    return Picture((view,), torch.cat(placed))
