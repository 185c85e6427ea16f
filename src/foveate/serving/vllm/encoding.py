"""One encoding of pictures by vLLM's tower under a method: the engine's own, but that no language model follows here.

vLLM's model is one more anatomy. What `foveate.engine.vision.Look` hears of the tower, and the edits that it and the method
make of a prompt's rows, are what they are under `foveate.attach`; the prompts are the pictures alone, one in each row. vLLM
keeps what was encoded for other prompts, so a picture knows nothing of its place in one: `random` draws for each as for the
first, and `divprune`'s pool is one picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.recipe import Recipe
from foveate.core.signal import Signal
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.arrival import arrival
from foveate.engine.clock import Clock
from foveate.engine.films import Beside
from foveate.engine.intake import Intake
from foveate.engine.program import Program
from foveate.engine.signals import ByPicture
from foveate.engine.vision import Look
from foveate.methods.before_llm.uniform import stratified
from foveate.models.anatomy import Anatomy, Encoder, Picture

Bound = Mapping[str, Any]
"""A processor's fields of pictures, as vLLM's model gets them."""


@dataclass(frozen=True)
class Tower(Encoder):
    """The parts of a tower as vLLM builds it.

    Attributes:
        hidden: width of its hidden states.
        output: what makes the features that the projector is fed; one call of it may serve several of the projector's.
        first: of packed towers, the part of the projector that is fed them. (vLLM may call a merger past its hooks.)
        segments: of packed towers, given the fields and a block: rows that attend to each other, one length after the other.
    """

    hidden: int = 0
    output: nn.Module | None = None
    first: nn.Module | None = None
    segments: Callable[[Bound, int], list[int]] | None = None

    @property
    def width(self) -> int:
        """Of its hidden states."""
        return self.hidden


def program(method: Any, anatomy: Anatomy, traits: Traits) -> Program:
    """The method on a model."""
    return Program(Recipe((method,)), anatomy, traits)


def encode(made: Program, bound: Bound, tower: Callable[[], Sequence[Tensor]], clock: Clock) -> list[tuple[Tensor, Tensor]]:
    """Encode pictures under a method.

    Args:
        made: the method on the model.
        bound: fields of the pictures.
        tower: encodes them: ``[T, D]`` of each, one row for each of its placeholders.
        clock: times what it costs to score and choose.

    Returns:
        For each picture the rows that stay ``[k, D]``, and view, row and column of each ``[k, 3]`` (int64; -1 of line ends).
    """
    look = Look(made, "image", bound, clock, Beside())
    with heard(look, bound):
        embedded = tower()
    output = _Output(list(embedded))
    look.finish(output)
    intake = _prompts(made.anatomy, look)
    rows = torch.cat(list(output.pooler_output))
    batch, longest = intake.valid.shape
    where = upload(intake.valid.flatten().nonzero()[:, 0], rows.device)
    x = rows.new_zeros(batch * longest, rows.shape[1]).index_copy_(0, where, rows).unflatten(0, (batch, longest))
    layout = intake.layout(torch.zeros(3, batch, longest, dtype=torch.long, device=rows.device))
    # No picture ends a prompt: there is always text behind it, which predicts.
    layout = replace(layout, pinned=(), positions=_cells(layout))
    with clock.lap("method"):
        x, layout = _choose(made, look, x, layout)
    positions = layout.positions.permute(1, 2, 0)
    return [(each[-live:], place[-live:]) for each, place, live in zip(x, positions, layout.live)]


@contextmanager
def heard(look: Look, bound: Bound) -> Iterator[None]:
    """Let ``look`` hear what the tower makes of ``bound`` meanwhile."""
    made, tower = look.program, look.program.anatomy.encoder
    assert isinstance(tower, Tower)
    hooks = [
        tower.attention[layer].register_forward_pre_hook(_listener(look, tower, layer, bound), with_kwargs=True)
        for layer in made.encoder_signals
    ]
    if made.summary:
        block = tower.blocks[tower.feature_layer]
        hooks.append(block.register_forward_hook(lambda _, args, out: look.leave_block(tower.feature_layer, out)))
    if tower.output is not None:
        hooks.append(tower.output.register_forward_hook(lambda _, args, out: look.before_projector(out)))
        hooks.append(tower.projector.register_forward_hook(lambda _, args, out: look.after_projector(out)))
    if tower.first is not None:
        hooks.append(tower.first.register_forward_pre_hook(lambda _, args: _feed(look, args)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _listener(look: Look, tower: Tower, layer: int, bound: Bound) -> Callable[..., None]:
    """Hears the calls of a block's attention (vLLM's ``MMEncoderAttention``): ``(query, key, value)`` or by name."""

    def listen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value"), args)) | kwargs
        query, key, value = (_by_head(module, given[name]) for name in ("query", "key", "value"))
        if tower.segments is None:
            look.observe(layer, query, key, value, module.scale, None)
            return
        start = 0
        for length, run in itertools.groupby(tower.segments(bound, layer)):
            count = len(list(run))
            end = start + count * length
            q, k, v = (x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
            look.observe(layer, q, k, v, module.scale, None)
            start = end

    return listen


def _by_head(module: Any, x: Tensor) -> Tensor:
    """``[B, H, N, d]`` of ``[B, N, H * d]`` or ``[B, N, H, d]``."""
    return (x if x.ndim == 4 else x.unflatten(-1, (-1, module.head_size))).transpose(1, 2)


def _feed(look: Look, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    look.before_projector(x.flatten(0, 1) if x.ndim == 3 else x)
    return args


class _Output(SimpleNamespace):
    """What an encoder returns, as `Look.finish` takes and changes it."""

    def __init__(self, rows: list[Tensor]) -> None:
        super().__init__(pooler_output=rows)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)


def _prompts(anatomy: Anatomy, look: Look) -> Intake:
    """Each picture as a prompt of its placeholders."""
    counts = torch.tensor([picture.count for picture in look.pictures])
    there = torch.arange(int(counts.max())) >= counts.max() - counts[:, None]
    ids = torch.where(there, anatomy.image_tokens[0], anatomy.image_tokens[0] + 1)
    return Intake.read(anatomy, {"input_ids": ids, "attention_mask": there.long()}, [look])


def _cells(layout: Layout) -> Tensor:
    """``[3, B, N]`` view, row and column of each token; -1 for line ends and padding."""
    return torch.stack([layout.item, *layout.yx.unbind(-1)])


def _choose(made: Program, look: Look, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """What the encoder has left, and then what the method leaves of it."""
    now: Any = SimpleNamespace(layout=layout)  # what a signal of pictures asks for, once it is read
    state = State(made.constants)
    edit = arrival([look], layout)
    if edit is not None:
        x, now.layout = edit.reduction.apply(x), layout.after(edit)

    def gather(signal: Signal, sources: Sequence[int], ordinal: Tensor) -> Any:
        return look.signals.gather(signal, sources, ordinal)

    signals: dict[Signal, Any] = {signal: ByPicture(now, signal, gather) for signal in made.signals_by_item} | made.given
    for site, method in made.tokens.get(0, ()):
        seen = {signal: signals[signal] for signal in made.reads[method]}
        chosen: Edit | None = method.edit(site, x, now.layout, seen, state)
        if chosen is not None:
            if isinstance(chosen.positions, Tensor):
                raise FoveateError(f"{method.name}: gives tokens rotary positions of its own, which vLLM does not take")
            x = chosen.values if chosen.values is not None else chosen.reduction.apply(x)
            now.layout = now.layout.after(chosen)
    return x, now.layout


def even(pictures: Sequence[Picture], embedded: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """An even grid of each picture's tokens, for when a method fails; what is returned is that of `encode`.

    ``counts`` are all rows that stay of each, line ends among them.
    """
    kept = []
    for picture, rows, count in zip(pictures, embedded, counts):
        sizes = torch.tensor([view.rows * view.columns for view in picture.views])
        total = int(sizes.sum())
        before = (count - picture.count + total) * torch.nn.functional.pad(sizes.cumsum(0), (1, 0)) // total
        stay = picture.placement[:, 0] < 0
        place = torch.full((picture.count, 3), -1)
        for number, (view, share) in enumerate(zip(picture.views, before.diff().tolist())):
            if share:
                cell = stratified(view.rows, view.columns, share)
                slot = picture.slots[number][cell]
                stay[slot] = True
                place[slot] = torch.stack([torch.full_like(cell, number), cell // view.columns, cell % view.columns], dim=1)
        kept.append((rows[upload(stay.nonzero()[:, 0], rows.device)], upload(place[stay], rows.device)))
    return kept
