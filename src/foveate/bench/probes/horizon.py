"""Information horizon: from which layer on do the visual tokens no longer matter?

Two measures for each layer. *Exit*: the score when all visual tokens leave before it. *Information* of a window of the
picture: by how much the probability of the right answer's first token rises when, from that layer on, this window's tokens
are there instead of none. Both are runs in which the other rows are really gone.

Paper: "When Token Pruning is Worse than Random", arXiv 2512.07580. As in its code, information is what a window adds to text
alone; ``leave_one_out`` is the abstract's reading, what is lost when only the window goes. Reconstructed: the tolerance (the
paper draws no line), windows of any grid (those at the right and lower border may be smaller) and several pictures (the
windows of all).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.checkpoint import Checkpoint
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.recipe import NONE
from foveate.core.roles import VISUAL
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.tasks import Question

WINDOW = 2
"""Side of a window in tokens."""
TOLERANCE = 0.01


def window_of(rows: int, columns: int, size: int) -> Tensor:
    """``[rows * columns]`` window that each token of a grid lies in; windows are counted in raster order."""
    down, across = torch.arange(rows) // size, torch.arange(columns) // size
    return (down[:, None] * math.ceil(columns / size) + across).flatten()


def window_count(grids: Sequence[tuple[int, int]], size: int) -> int:
    """Windows of several grids."""
    return sum(math.ceil(rows / size) * math.ceil(columns / size) for rows, columns in grids)


def information(logits: Tensor, baseline: Tensor, label: int) -> Tensor:
    """``[W]`` by how much the label's probability under ``logits`` ``[W, V]`` exceeds that under ``baseline`` ``[V]``."""
    return (logits.float().softmax(-1) - baseline.float().softmax(-1))[:, label]


def first_below(values: Sequence[float], tolerance: float) -> int | None:
    """First layer from which all ``values`` (one for each layer) stay below ``tolerance``; None if the last does not."""
    above = [layer for layer, value in enumerate(values) if not value < tolerance]
    first = above[-1] + 1 if above else 0
    return first if first < len(values) else None


@dataclass(frozen=True)
class Leave(Tokens):
    """Before decoder layer ``layer`` all visual tokens go, but those of one window of each sample.

    Attributes:
        windows: the window that stays in each sample, counted over all its pictures; -1: none. Empty: none in any sample.
        size: side of a window.
        invert: the window goes instead, and all else stays.
    """

    name = "leave"
    layer: int
    windows: tuple[int, ...] = ()
    size: int = WINDOW
    invert: bool = False

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the layer."""
        return (Site("decoder", self.layer),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Positions stay as they were."""
        wanted = torch.tensor(self.windows or (-1,) * layout.shape[0], device=x.device)[:, None]
        inside = (_windows(layout, self.size) == wanted) & (wanted >= 0)
        chosen = (inside ^ self.invert) & layout.rows(*VISUAL)
        return layout.keeping(chosen, tuple(chosen.sum(1).tolist()))


def _windows(layout: Layout, size: int) -> Tensor:
    """``[B, N]`` window of each visual row, counted over all pictures of its sample; -1 elsewhere."""
    number = torch.full_like(layout.ordinal, -1)
    for sample, items in enumerate(layout.items):
        first = 0
        for place, item in enumerate(items):
            mine = (layout.item[sample] == place) & (layout.ordinal[sample] >= 0)
            of_token = window_of(item.rows, item.columns, size).to(number.device) + first
            number[sample, mine] = of_token[layout.ordinal[sample, mine]]
            first += window_count([(item.rows, item.columns)], size)
    return number


@dataclass(frozen=True)
class Information:
    """Of one question, for each layer: what the whole picture, the most telling window and the average window say."""

    whole: list[float]
    largest: list[float]
    mean: list[float]


@torch.inference_mode()
def question_information(
    checkpoint: Checkpoint, question: Question, batch_size: int, size: int = WINDOW, *, leave_one_out: bool = False
) -> Information:
    """Information of a question's windows from every layer on: ``batch_size`` windows at a time."""
    label = first_answer_token(checkpoint, question)
    inputs = checkpoint.inputs([question.images], [question.turns[0].prompt])
    with foveate.attach(checkpoint.model, NONE) as session:
        unpruned = _last_logits(checkpoint, inputs)
    windows = range(window_count(session.trace.grids[0], size))
    whole, largest, mean = [], [], []
    for layer in range(checkpoint.layers):
        nothing = _under(checkpoint, Leave(layer), inputs)
        logits = [
            _under(checkpoint, Leave(layer, tuple(windows[start : start + batch_size]), size, leave_one_out), inputs)
            for start in range(0, len(windows), batch_size)
        ]
        # Of one that is left out, information is what the others lack.
        found = information(torch.cat(logits), (unpruned if leave_one_out else nothing)[0], label).abs()
        whole.append(float(information(unpruned, nothing[0], label)))
        largest.append(float(found.max()))
        mean.append(float(found.mean()))
    return Information(whole, largest, mean)


def first_answer_token(checkpoint: Checkpoint, question: Question) -> int:
    """Id of the first token of the right answer, where the chat template puts it."""
    processor: Any = checkpoint.processor
    asked = {"role": "user", "content": [{"type": "text", "text": question.turns[0].prompt}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": question.turns[0].answers[0]}]}
    texts = (
        processor.apply_chat_template([asked], add_generation_prompt=True),
        processor.apply_chat_template([asked, answer]),
    )
    prompt, answered = (processor.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    common = next((at for at, (one, other) in enumerate(zip(prompt, answered)) if one != other), len(prompt))
    return int(answered[common])


def _under(checkpoint: Checkpoint, method: Leave, inputs: dict[str, Tensor]) -> Tensor:
    """Logits ``[W, V]`` of a prompt under each of the method's windows, as one batch."""
    times = max(len(method.windows), 1)
    # Whatever a family's inputs mean, what belongs to one sample after the other stands along the first dimension.
    batch = {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    with foveate.attach(checkpoint.model, method):
        return _last_logits(checkpoint, batch)


def _last_logits(checkpoint: Checkpoint, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = checkpoint.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.float()
