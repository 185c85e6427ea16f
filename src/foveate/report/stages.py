"""What became of the visual tokens of one request, place by place: from a watched session's trace to plain arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Plan
from foveate.core.report import Trace
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Site
from foveate.core.step import Held, Step

Grids = tuple[np.ndarray, ...]
"""One array ``[count]`` for each grid, by raster index."""

MOST_BLOCKS = 4
"""Encoder blocks of one method that are shown apart; more are shown in so many groups."""


@dataclass(frozen=True)
class Stage:
    """The visual tokens behind one place in the model.

    Attributes:
        title: the place.
        method: who acted there, "" where nobody did.
        fate: the token that each original one lives on in (itself, if it was neither dropped nor merged), -1 = gone.
        note: what the numbers of the place do not say.
        scores: what tokens were ranked by, nan where they were not.
        share: of each token, the share of layers that run it, or of the cache's heads that hold it; None elsewhere.
        by_layer: the shares layer by layer.
        total: visual tokens originally.
    """

    title: str
    method: str
    fate: Grids
    note: str = ""
    scores: tuple[Grids, ...] = ()
    share: Grids | None = None
    by_layer: tuple[tuple[str, Grids], ...] = ()

    @property
    def alive(self) -> Grids:
        """Raster indices of the tokens that go on."""
        return tuple(np.flatnonzero(fate == np.arange(len(fate))) for fate in self.fate)

    @property
    def count(self) -> float:
        """How many go on (of shares: how many on average)."""
        if self.share is not None:
            return float(sum(share.sum() for share in self.share))
        return float(sum(map(len, self.alive)))

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(map(len, self.fate))

    @property
    def merged(self) -> bool:
        """Whether any token lives on in another one."""
        return any(bool(((fate >= 0) & (fate != np.arange(len(fate)))).any()) for fate in self.fate)


@dataclass(frozen=True)
class Story:
    """The stages of one sample, in order.

    Attributes:
        grids: ``(rows, columns)`` of each grid.
        pictures: number of the picture that each grid shows.
        stages: the first is the untouched picture.
    """

    grids: tuple[tuple[int, int], ...]
    pictures: tuple[int, ...]
    stages: tuple[Stage, ...]


def story(trace: Trace, pictures: int, sample: int = 0) -> Story:
    """What the ``trace`` of a watched session says about the tokens of a sample's ``pictures``.

    Raises:
        FoveateError: if no picture was read.
    """
    if not trace.log or not trace.log[0][0].items[sample]:
        raise FoveateError("trace: holds no picture; run the model on one under a session that watches")
    layouts, routes, items = trace.log[0], trace.routes[0], trace.log[0][0].items[sample]
    fate: Grids = tuple(np.arange(item.count) for item in items)
    stages = [Stage("the picture", "", fate)]
    before: Step | None = None
    for step in (step for step in trace.steps if step.act == "edit" and step.site.kind != "decoder"):
        stage = _after(stages[-1], step, items, sample)
        if before is not None and _continues(step, before):
            stages[-1] = replace(stage, scores=_joined(stages[-1].scores, stage.scores))
        else:
            stages.append(stage)
        before = step
    stages = list(_grouped(stages))
    entered = stages[-1]
    steps = [step for step in trace.steps if step.site.kind == "decoder"]
    for layers in _alike(layouts[:-1], routes):
        stages += _decoder(stages[-1], layers, layouts, routes, steps, items, sample)
    stages += _cache(entered, trace, steps, items, sample)
    of = _shown(trace, pictures, items)
    return Story(tuple((item.rows, item.columns) for item in items), of, tuple(stages))


def _shown(trace: Trace, pictures: int, items: Sequence[Item]) -> tuple[int, ...]:
    """Which of a sample's ``pictures`` each grid shows.

    Some families have a placeholder for each tile of a picture, so that the model knows more pictures than it was given.
    """
    of = [trace.pictures[item.source] for item in items] if trace.pictures else list(range(len(items)))
    placed = of[-1] - of[0] + 1
    if placed % pictures:
        raise FoveateError(
            f"trace: nobody knows which of {pictures} pictures each of {placed} tiles shows; give one picture"
        )
    return tuple((number - of[0]) * pictures // placed for number in of)


# Edits.


def _after(stage: Stage, step: Step, items: Sequence[Item], sample: int) -> Stage:
    """The stage that an edit leads to."""
    fate, scores = [], []
    for number, (item, before) in enumerate(zip(items, stage.fate)):
        place = _place(step, item, number, sample)
        if place is None:  # a grid that this step was not about
            fate.append(before)
            scores.append([np.full(item.count, np.nan) for _ in step.scores])
            continue
        moved = _moved(step, *place, number if step.site.kind in ("sequence", "decoder") else 0)
        fate.append(np.where(before >= 0, moved[before], -1))
        scores.append([_spread(values, before) for values in _scores(step, *place, number)])
    rankings = tuple(tuple(of_grid) for of_grid in zip(*scores))
    return Stage(_name(step.site), step.method.name, tuple(fate), scores=tuple(r for r in rankings if _says(r)))


def _continues(step: Step, before: Step) -> bool:
    """Whether a step does to other grids what the one before has done: those of one shape go together."""
    same = (step.site, step.method) == (before.site, before.method)
    return same and step.places is not None and not set(step.places) & set(before.places or ())


def _joined(one: Sequence[Grids], other: Sequence[Grids]) -> tuple[Grids, ...]:
    return tuple(tuple(np.where(np.isfinite(a), a, b) for a, b in zip(mine, theirs)) for mine, theirs in zip(one, other))


def _place(step: Step, item: Item, number: int, sample: int) -> tuple[Tensor, Tensor] | None:
    """Row of the batch and raster index of each token of a grid at the step's site; None if it is not there."""
    if step.site.in_vision:
        return (step.places or {}).get(item.source)
    return torch.full((item.count,), sample), torch.arange(item.count)


def _rows(layout: Layout, batch: Tensor, ordinal: Tensor, number: int) -> Tensor:
    """``[count]`` row of each token among the site's rows, -1 = not there."""
    here = (layout.item.cpu() == number) & (layout.ordinal.cpu() >= 0)
    table = torch.full((layout.shape[0], int(ordinal.max()) + 2), -1)
    sample, row = here.nonzero(as_tuple=True)
    table[sample, layout.ordinal.cpu()[sample, row].clamp(max=table.shape[1] - 1)] = row
    return table[batch, ordinal]


def _moved(step: Step, batch: Tensor, ordinal: Tensor, number: int) -> np.ndarray:
    """``[count]`` the token that each token of a grid lives on in behind an edit, -1 = none."""
    assert step.reduction is not None
    row = _rows(step.before, batch, ordinal, number)
    to = step.reduction.to(torch.device("cpu")).goes()[batch, row.clamp(min=0)]
    anchor = step.after.ordinal.cpu()[batch, to.clamp(min=0)]
    # Back from places at the site to raster indices of the grid: not the same where a grid is made of tiles.
    back = torch.full((step.before.shape[0], int(ordinal.max()) + 2), -1)
    back[batch, ordinal] = torch.arange(len(ordinal))
    kept = back[batch, anchor.clamp(0, back.shape[1] - 1)]
    return kept.masked_fill((row < 0) | (to < 0) | (anchor < 0), -1).numpy()


def _scores(step: Step, batch: Tensor, ordinal: Tensor, number: int) -> Iterator[np.ndarray]:
    """Each ranking of the step: ``[count]``, nan where a token had no score."""
    row = _rows(step.before, batch, ordinal, 0 if step.site.in_vision else number)
    for scores in step.scores:
        values = scores.cpu()[batch, row.clamp(min=0)].masked_fill(row < 0, float("nan"))
        yield values.numpy().astype(float)


def _spread(values: np.ndarray, fate: np.ndarray) -> np.ndarray:
    """Tokens that were merged have the score of what they live on in."""
    return np.where(fate >= 0, values[np.maximum(fate, 0)], np.nan)


def _says(ranking: Grids) -> bool:
    """Whether a ranking says anything about visual tokens."""
    return any(np.isfinite(values).any() for values in ranking)


def _grouped(stages: Sequence[Stage]) -> Iterator[Stage]:
    """The same with long rows of encoder blocks in a few groups, each shown as it ends."""
    start = 0
    while start < len(stages):
        end = start + 1
        while end < len(stages) and _same_encoder(stages[start], stages[end]):
            end += 1
        ends = np.linspace(start, end, min(end - start, MOST_BLOCKS) + 1).round().astype(int)
        for first, last in zip(ends[:-1], ends[1:] - 1):
            numbers = stages[first].title.removeprefix(_ENCODER), stages[last].title.removeprefix(_ENCODER)
            title = stages[last].title if first == last else f"{_ENCODER}s {numbers[0].strip()}–{numbers[1].strip()}"
            yield replace(stages[last], title=title)
        start = end


_ENCODER = "in the encoder, block"


def _same_encoder(one: Stage, other: Stage) -> bool:
    return one.method == other.method and one.title.startswith(_ENCODER) and other.title.startswith(_ENCODER)


def _name(site: Site) -> str:
    names = {
        "patches": "before the encoder",
        "encoder": f"{_ENCODER} {site.layer}",
        "pre_projector": "behind the encoder",
        "projected": "behind the projector",
        "sequence": "before the LLM",
        "decoder": f"before LLM layer {site.layer}",
    }
    return names[site.kind]


# The layers of the language model.


def _alike(layouts: Sequence[Layout], routes: Sequence[Plan | None]) -> Iterator[range]:
    """Ranges of layers with the same rows, all routed or all not."""
    start = 0
    for layer in range(1, len(layouts) + 1):
        if layer == len(layouts) or layouts[layer] is not layouts[start] or _kind(routes[layer]) != _kind(routes[start]):
            yield range(start, layer)
            start = layer


def _kind(plan: Plan | None) -> bool | None:
    return None if plan is None else plan.frozen


def _decoder(
    stage: Stage,
    layers: range,
    layouts: Sequence[Layout],
    routes: Sequence[Plan | None],
    steps: Sequence[Step],
    items: Sequence[Item],
    sample: int,
) -> Iterator[Stage]:
    """What is new in some layers that are alike: edits before the first of them, and routes."""
    title = _layers(layers)
    for step in (s for s in steps if s.act == "edit" and s.site.layer in layers):
        stage = replace(_after(stage, step, items, sample), title=title)
        yield stage
    plans = [plan for layer in layers if (plan := routes[layer]) is not None]
    if not plans:
        if stage.share is not None:  # all of them run again
            yield Stage(title, "", stage.fate)
        return
    shares = [_at(layouts[layers[0]], plan.active, items, sample) for plan in plans]
    routed = [s for s in steps if s.act == "route" and s.site.layer in layers]
    yield replace(
        stage,
        title=title,
        method=routed[0].method.name if routed else "",
        note="the others are frozen: keys and values only" if plans[0].frozen else "the others skip the layer",
        scores=_mean_ranking(routed, items, sample),
        share=tuple(np.mean(of_grid, axis=0) for of_grid in zip(*shares)),
    )


def _layers(layers: range) -> str:
    return f"LLM layer {layers[0]}" if len(layers) == 1 else f"LLM layers {layers[0]}–{layers[-1]}"


def _at(layout: Layout, values: Tensor, items: Sequence[Item], sample: int) -> list[np.ndarray]:
    """Values ``[B, N]`` of the rows of a layout, for each grid by raster index; 0 where a token has no row."""
    found = []
    for number, item in enumerate(items):
        row = _rows(layout, torch.full((item.count,), sample), torch.arange(item.count), number)
        found.append(values[sample].cpu().float()[row.clamp(min=0)].masked_fill(row < 0, 0.0).numpy().astype(float))
    return found


def _mean_ranking(steps: Sequence[Step], items: Sequence[Item], sample: int) -> tuple[Grids, ...]:
    """One ranking for several layers: the mean of their last ones, each scaled to [0, 1]."""
    layers = []
    for step in (step for step in steps if step.scores):
        last = replace(step, scores=step.scores[-1:])
        places = [(torch.full((item.count,), sample), torch.arange(item.count)) for item in items]
        values = np.concatenate([next(_scores(last, *place, number)) for number, place in enumerate(places)])
        if np.isfinite(values).any():
            low, high = np.nanmin(values), np.nanmax(values)
            layers.append((values - low) / max(high - low, np.finfo(float).tiny))
    if not layers:
        return ()
    table = np.stack(layers)
    known = np.isfinite(table).any(axis=0)
    mean = np.full(table.shape[1], np.nan)
    mean[known] = np.nanmean(table[:, known], axis=0)
    return (tuple(np.split(mean, np.cumsum([item.count for item in items])[:-1])),)


# The cache.


def _cache(entered: Stage, trace: Trace, steps: Sequence[Step], items: Sequence[Item], sample: int) -> Iterator[Stage]:
    """What the cache holds, and what decoding reads of it, where that is not simply what came through the layers."""
    held = {layer: of for layer, of in enumerate(trace.held) if of is not None}
    if not held:
        return
    came = {layer: _at(trace.log[0][layer], _visual(trace.log[0][layer]), items, sample) for layer in held}
    there = {layer: _held(of, of.tokens, items, sample) for layer, of in held.items()}
    read = {layer: _held(of, of.read, items, sample) for layer, of in held.items()}
    chosen = [step for step in steps if step.act == "cache"]
    name = chosen[0].method.name if chosen else ""
    ranking = _mean_ranking(chosen, items, sample)
    looks = not _same(there, read)
    if not _same(there, came):
        yield _shares(entered, "in the KV cache", name if not looks else "", there, ranking if not looks else ())
    if looks:
        yield _shares(entered, "read from the KV cache", name, read, ranking)


def _shares(
    entered: Stage, title: str, method: str, shares: dict[int, list[np.ndarray]], ranking: tuple[Grids, ...]
) -> Stage:
    mean = tuple(np.mean(of_grid, axis=0) for of_grid in zip(*shares.values()))
    by_layer = tuple((f"layer {layer}", tuple(of)) for layer, of in shares.items())
    note = "shares of layers and heads"
    return replace(entered, title=title, method=method, note=note, scores=ranking, share=mean, by_layer=by_layer)


def _same(one: dict[int, list[np.ndarray]], other: dict[int, list[np.ndarray]]) -> bool:
    return all(np.array_equal(a, b) for layer in one for a, b in zip(one[layer], other[layer]))


def _visual(layout: Layout) -> Tensor:
    return layout.rows(*VISUAL)


def _held(of: Held, tokens: Tensor, items: Sequence[Item], sample: int) -> list[np.ndarray]:
    """For each grid ``[count]``, the share of heads that have an entry of each token."""
    origin, tokens = of.layout.origin[sample].cpu(), tokens[sample].cpu()
    there = torch.stack([torch.isin(origin, head) for head in tokens]).float().mean(0)
    # A row of padding is no token, whatever is stored under its number.
    return _at(of.layout, there[None].masked_fill(origin < 0, 0.0).expand(sample + 1, -1), items, sample)
