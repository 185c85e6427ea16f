"""What the encoder of sound shows: the attention that each token of sound gets in its last block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.signal import Heard
from foveate.engine.arguments import by_name
from foveate.engine.run import Run
from foveate.models import taps
from foveate.models.anatomy import Audio
from foveate.ops.attention import columns


class Ear:
    """What one call of the model has heard."""

    def __init__(self) -> None:
        self.listening: list[tuple[Tensor, Tensor, float]] | None = None
        self.heard: Tensor | None = None

    def hand_over(self, run: Run) -> None:
        """Give the run of a prompt what was heard, by row; nothing if the prompt has other sound than was encoded."""
        heard, rows = self.heard, run.rows.intake.audio
        self.heard = None
        places = rows.flatten().nonzero()[:, 0]
        if heard is None or len(places) != len(heard):
            return
        full = torch.zeros(rows.numel(), device=run.rows.device)
        full = full.index_copy(0, upload(places, full.device), heard.to(full.device))
        run.signals.seen[Heard()] = full.reshape(rows.shape)


class _Call(Protocol):
    ear: Ear


def tap(
    current: Callable[[], _Call | None], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> None:
    """Note queries and keys of the encoder's last block: one chunk of sound after the other, or all at once."""
    call = current()
    if call is not None and call.ear.listening is not None:
        call.ear.listening.append((query, key, scale))


def hear(audio: Audio, call: _Call, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the encoder of sound, whose forward is ``original``, and note what each token of sound gets.

    The mean over heads and over all queries of a sound, without the chunks that the encoder itself attends in, then over the
    frames of a token.
    """
    ear = call.ear
    ear.listening = chunks = []
    try:
        with taps.tapped([audio.attention]):
            output = original(*args, **kwargs)
    finally:
        ear.listening = None
    frames = audio.frames(by_name(original, args, kwargs) if args else kwargs)
    query, key = (torch.cat([chunk[part] for chunk in chunks], dim=2) for part in (0, 1))
    shown = []
    for asking, asked in zip(query.split(frames, dim=2), key.split(frames, dim=2)):
        got = columns(asking, asked, chunks[0][2])[0]
        whole = len(got) // audio.pooled * audio.pooled
        shown.append(got[:whole].unflatten(0, (-1, audio.pooled)).mean(1))
    ear.heard = torch.cat(shown)
    return output
