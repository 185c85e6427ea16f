"""OmniZip (audio and video): the more of its sound counts, the more of a stretch of video stays.

Paper: "OmniZip: Audio-Guided Dynamic Token Compression for Fast Omnimodal Large Language Models", arXiv 2511.14582. As the
published code (its newer core): sound stays where it is important and at evenly spread anchors, which take in some of the
sound that goes; the share that a window keeps of its sound says how much of its video is dropped, within a budget; in every
other frame of a window the peaks of density stay, in the frames between what changed most. Original positions. A model that
listens (Qwen2.5-Omni) says how important each token of sound is: by the attention that it gets in the last block of the
sound's encoder, without the encoder's own chunks, as the code reads it. Where prompts have no rows of sound, or sound is to
be judged otherwise, importance is side data: ``audio`` ``[n]`` of each video, a number for each 40 ms or so, such as its
loudness; the track lasts as long as the video. Windows are the turns that a prompt takes between video and sound.
Reconstructed: where it takes none, windows are so many steps of the video's grid (2 are the paper's 4 sampled frames), with
as much sound each. Differs: a prompt's last row stays, if it is sound; every sample and every sound is on its own. A video
without sound, and sound without video, stay whole.

How much sound each window keeps, and where sound stands, has to come to the host once each for each forward: the prompt's
length depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In
from foveate.core.ranking import about
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Item, Role
from foveate.core.shape import Shape
from foveate.core.signal import Heard, Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.select import top_k, top_of_groups

AUDIO = Side("audio", needed=False)
HEARD = Heard()
CHUNK = 512
"""Video tokens that are compared with all sound at a time."""
NEIGHBOURS = 5
"""Of the density of a frame's tokens."""


def kept_audio(importance: Tensor, discard: float, context: float, least: int = 0) -> tuple[Tensor, Tensor]:
    """The sound that counts: a mask ``[n]`` of the most important, and anchors ``[a]``, ascending, spread over the rest.

    Args:
        importance: ``[n]``.
        discard: share that is not among the most important.
        context: anchors, as a share of n.
        least: how many are important at least.
    """
    count = len(importance)
    salient = torch.zeros_like(importance, dtype=torch.bool)
    most = max(round((1 - discard) * count), least)
    salient[top_k(importance, most)] = True
    left = count - most
    anchors = min(round(context * count), left)
    rest = (~salient).to(torch.uint8).argsort(descending=True, stable=True)[:left]
    step = max(1, left // max(anchors, 1))
    return salient, rest[: step * anchors : step]


def joined_sound(sound: Tensor, video: Tensor, salient: Tensor, anchors: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Which tokens of sound go into an anchor, and with what weight.

    Each token that is neither salient nor an anchor belongs to the anchor nearest to it by cosine; of these each anchor
    takes in the few that are nearest to any video token, weighed by a softmax of that, and becomes the mean of itself and
    of their mean.

    Args:
        sound: ``[n, D]``.
        video: ``[m, D]``.
        salient: ``[n]`` bool.
        anchors: ``[a]``, at least one.
        members: tokens that an anchor takes in at most.

    Returns:
        ``[n]`` the token that each goes into, itself or an anchor, -1 = dropped; ``[n]`` its weight there, float32.
    """
    count, place = len(sound), torch.arange(len(sound), device=sound.device)
    unit, seen = normalize(sound.float(), dim=-1), normalize(video.float(), dim=-1)
    pool = (~salient).index_fill(0, anchors, False)
    owner = anchors[(unit @ unit[anchors].T).argmax(1)]
    near = torch.stack([part.matmul(unit.T).amax(0) for part in torch.split(seen, CHUNK)]).amax(0)
    order = near.argsort(descending=True, stable=True)
    order = order[owner.masked_fill(~pool, count)[order].argsort(stable=True)]
    group = owner.masked_fill(~pool, count)[order]
    first = torch.searchsorted(group, group)
    taken = torch.zeros_like(pool).scatter(0, order, (place - first < members) & (group < count))
    share = near.exp() * taken
    total = torch.zeros_like(share).index_add(0, owner, share)
    weight = torch.where(taken, share / (2 * total[owner]).clamp(min=1e-30), torch.where(total > 0, 0.5, 1.0))
    to = torch.where(taken, owner, torch.where(pool, -1, place))
    return to, weight


def drop_rates(
    retention: Sequence[float], sizes: Sequence[int], discard: float, low: float, high: float, unguided: int = 0
) -> list[float]:
    """Share of its video tokens that each window loses.

    Args:
        retention: share of its sound that each window keeps.
        sizes: its video tokens.
        discard: share of all video tokens that is to go; three windows or more are brought near to it, the one that loses
            most and the one that loses least (the first of equals) aside.
        low, high: least and largest share of a window.
        unguided: video tokens of windows without sound, which lose ``discard``.
    """

    def clip(rate: float) -> float:
        return min(max(rate, low), high)

    rates = [clip(high - (high - low) * share) for share in retention]
    target = discard * (sum(sizes) + unguided) - discard * unguided
    least, most = rates.index(min(rates)), rates.index(max(rates))
    others = [window for window in range(len(rates)) if window not in (least, most)]

    def gap() -> float:
        return target - sum(rate * size for rate, size in zip(rates, sizes))

    if len(rates) < 3 or abs(gap()) <= 1e-3 or not others:
        return rates
    inside = sum(rates[window] * sizes[window] for window in others)
    factor = (gap() + inside) / inside
    for window in others:
        rates[window] = clip(rates[window] * factor)
    more = gap() / sum(sizes[window] for window in others)
    for window in others:
        rates[window] = clip(rates[window] + more)
    return rates


def peaks(frames: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """``[F, P]`` density of each token of ``frames`` ``[F, P, D]`` times its cosine distance to the nearest denser one.

    A token is dense that lies near to its ``neighbours`` nearest others.
    """
    unit = normalize(frames.float(), dim=-1)
    tokens = unit.shape[1]
    apart = 1 - unit @ unit.mT
    itself = torch.eye(tokens, dtype=torch.bool, device=frames.device)
    near = apart.masked_fill(itself, float("inf")).topk(min(neighbours, max(tokens - 1, 1)), dim=2, largest=False).values
    density = (-near.mean(2)).exp()
    denser = density[:, None, :] > density[:, :, None]
    gap = apart.masked_fill(~denser, float("inf")).amin(2)
    farthest = apart.masked_fill(itself, float("-inf")).amax(2)
    return torch.where(gap.isinf(), farthest, gap) * density


def interleaved(video: Tensor, starts: Sequence[int]) -> Tensor:
    """What the tokens of a video are ranked by: `peaks` in the frames at even places of a window, change in the others.

    Args:
        video: ``[T, P, D]``.
        starts: first frame of each window.

    Returns:
        ``[T, P]``; change is minus the cosine to the same place in the frame before.
    """
    first = torch.tensor([max(start for start in starts if start <= frame) for frame in range(len(video))])
    even = ((torch.arange(len(video)) - first) % 2 == 0).nonzero()[:, 0].to(video.device)
    unit = normalize(video.float(), dim=-1)
    changed = -(unit * unit.roll(1, 0)).sum(-1)
    return changed.index_copy(0, even, peaks(video[even]))


class _Cut:
    """Videos of one sample whose windows share a budget.

    Attributes:
        sample: which.
        windows: ``(item, first frame, end)`` of each window, in order.
        shares: ``[g]`` share of its sound that each of the first windows keeps; those behind have none.
    """

    def __init__(self, sample: int, windows: list[tuple[int, int, int]], kept: Tensor, parts: Sequence[Tensor]) -> None:
        self.sample, self.windows = sample, windows
        self.shares = torch.stack([kept[part].double().mean() for part in parts[: len(windows)]])


@dataclass(frozen=True)
class _Sound:
    """What becomes of the sound of one sample.

    Attributes:
        sample: which.
        rows: ``[n]`` where it stands.
        to: ``[n]`` the row that each goes into, -1 = dropped; ``weight``: with what weight.
        kept: ``[n]`` bool; ``gone``: how many are not.
    """

    sample: int
    rows: Tensor
    to: Tensor
    weight: Tensor
    kept: Tensor
    gone: int


@register
@dataclass(frozen=True)
class OmniZipAV(Tokens):
    """Drop video tokens by what the sound of the same time is worth, and the sound that does not count."""

    name = "omnizip_av"
    title = "OmniZip (audio-video)"
    group = "before_llm"
    paper = "arXiv 2511.14582"
    helps = "Videos whose sound says when something happens."
    needs = ("projected tokens", "attention of the sound's encoder, or side data: audio")
    identity_at = {"low": 0.0, "high": 0.0, "video": 0.0, "audio": 0.0}  # noqa: RUF012
    needs_grid = True

    audio: Annotated[float, In(0, 1)] = 0.3
    """Share of the sound that does not count (the most important stays, and the anchors)."""
    video: Annotated[float, In(0, 1)] = 0.6
    """Share of the video tokens that is dropped, as nearly as ``low`` and ``high`` allow."""
    low: Annotated[float, In(0, 1)] = 0.35
    """Share that a window loses whose sound all counts."""
    high: Annotated[float, In(0, 1)] = 0.75
    """Share that a window loses whose sound does not count at all."""
    context: Annotated[float, In(0, 1)] = 0.05
    """Anchors, as a share of the sound."""
    members: Annotated[int, AtLeast(0)] = 3
    """Tokens of sound that an anchor takes in at most; 0 = no anchors."""
    steps: Annotated[int, AtLeast(1)] = 2
    """Steps of the video's grid (of one or, in the Qwen families, two frames each) that make a window, where the prompt does
    not say so by turns of video and sound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.low <= self.high, "low", f"must be at most high={self.high!r}")

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The sound: handed over, or as the model hears it."""
        return (AUDIO, HEARD) if traits.hears else (AUDIO,)

    def workspace(self, shape: Shape) -> int:
        """Frames at length 1, and distances within each of them; sound is small beside them."""
        return shape.edits + 4 * shape.floats(shape.hidden) + 4 * shape.pairs

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Choose sound, rank the tokens of each video that has some, and keep in each frame what its window may keep."""
        heard, every = seen.get(HEARD), [(b, j) for b, items in enumerate(layout.items) for j in range(len(items))]
        given = {of: sound for of, sound in zip(every, seen[AUDIO].of(every) if AUDIO in seen else ()) if sound is not None}
        # The first wait, where there is sound in the prompt: who stands where.
        host = None if heard is None else torch.stack([layout.role, layout.item]).cpu()
        cuts, sounds = list[_Cut](), list[_Sound]()
        for b, items in enumerate(layout.items):
            mine = {j: given[b, j] for j in range(len(items)) if (b, j) in given}
            rows = [] if host is None else _runs(host[0, b] == Role.AUDIO)
            film = [] if host is None else _runs(host[0, b] == Role.VIDEO)
            if heard is not None and host is not None and rows and film:
                sound = self._heard(b, x, rows, film, list(mine.values()) or [heard[b]], host[0, b])
                windows, parts = self._turns(rows, film, host[1, b], items)
                sounds.append(sound)
                cuts.append(_Cut(b, windows, sound.kept, parts))
                continue
            for j, values in mine.items():
                windows = self._windows(j, items[j])
                kept = self._chosen(values, len(windows))[2]
                cuts.append(_Cut(b, windows, kept, _even(len(kept), len(windows))))
        if not cuts:
            return None
        retention = iter(torch.cat([cut.shares for cut in cuts]).tolist())  # the other wait
        stays = layout.item >= 0
        left = [[item.count for item in items] for items in layout.items]
        for cut in cuts:
            for j, counts in self._by_frame(cut, layout, [next(retention) for _ in cut.shares]).items():
                _keep(stays, x, layout, (cut.sample, j), [first for item, first, _ in cut.windows if item == j], counts)
                left[cut.sample][j] = sum(counts)
        by_item, visual = tuple(map(tuple, left)), tuple(map(sum, left))
        if any(sound.gone for sound in sounds):
            return _edit(layout, stays, visual, by_item, sounds)
        return None if visual == layout.visual else layout.keeping(stays, visual, by_item=by_item)

    def _heard(
        self, b: int, x: Tensor, runs: list[Tensor], film: list[Tensor], values: list[Tensor], role: Tensor
    ) -> _Sound:
        """What becomes of the sound of sample ``b``, in the rows of ``runs`` (on the host), beside video in ``film``.

        ``values``: by row of the sample, or (side data) by token of sound.
        """
        rows, pictures = (upload(torch.cat(each), x.device) for each in (runs, film))
        importance = torch.cat([each.flatten().to(x.device) for each in values])
        importance = importance[rows] if len(importance) == len(role) else importance
        if len(importance) != len(rows):
            raise FoveateError(
                f"omnizip_av: audio=({len(importance)},): must be a number for each of the {len(rows)} tokens of sound "
                "in the prompt, or left out, as the model hears it"
            )
        # The row that predicts the next token is no row to lose.
        last = bool((role[runs[-1][-1] + 1 :] == Role.PAD).all())
        if last:
            importance = torch.cat([importance[:-1].float(), importance.new_full((1,), float("inf"), dtype=torch.float32)])
        salient, anchors, kept = self._chosen(importance, 1, int(last))
        gone = len(rows) - len(anchors) - max(round((1 - self.audio) * len(rows)), int(last))
        if len(anchors):
            to, weight = joined_sound(x[b, rows], x[b, pictures], salient, anchors, self.members)
        else:
            to = torch.arange(len(rows), device=x.device).masked_fill(~kept, -1)
            weight = torch.ones(len(rows), device=x.device)
        return _Sound(b, rows, torch.where(to < 0, -1, rows[to]), weight, kept, gone)

    def _turns(
        self, runs: list[Tensor], film: list[Tensor], number: Tensor, items: Sequence[Item]
    ) -> tuple[list[tuple[int, int, int]], list[Tensor]]:
        """Windows of a prompt's video, and places of the sound of each, as far as there is some."""
        count, turns = sum(map(len, runs)), _windows_of(film, number, items)
        if turns is not None and len(turns) > 1:
            return turns, list(torch.split(torch.arange(count), [len(run) for run in runs]))
        shown = sorted(set(number[torch.cat(film)].tolist()))
        windows = [window for j in shown for window in self._windows(j, items[j])]
        return windows, _even(count, len(windows))

    def _chosen(self, values: Any, windows: int, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Salient sound (mask), anchors (places), and both (mask)."""
        if not isinstance(values, Tensor) or values.ndim != 1 or len(values) < windows:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise FoveateError(
                f"omnizip_av: audio={shape}: must be [n] of each video, a number for each of its {windows} windows at least"
            )
        salient, anchors = kept_audio(values.float(), self.audio, self.context if self.members else 0.0, least)
        return salient, anchors, salient.index_fill(0, anchors, True)

    def _windows(self, j: int, item: Item) -> list[tuple[int, int, int]]:
        return [(j, first, min(first + self.steps, item.frames)) for first in range(0, item.frames, self.steps)]

    def _by_frame(self, cut: _Cut, layout: Layout, shares: Sequence[float]) -> dict[int, list[int]]:
        """For each video of a cut, the tokens that stay of each frame."""
        items = layout.items[cut.sample]
        tokens = {j: items[j].count // items[j].frames for j, _, _ in cut.windows}
        sizes = [(end - first) * tokens[j] for j, first, end in cut.windows]
        guided = len(shares)
        rates = drop_rates(shares, sizes[:guided], self.video, self.low, self.high, sum(sizes[guided:]))
        rates += [self.video] * (len(sizes) - guided)
        counts: dict[int, list[int]] = {}
        for (j, first, end), rate in zip(cut.windows, rates):
            counts.setdefault(j, []).extend([min(int(tokens[j] * (1 - rate)), tokens[j])] * (end - first))
        return counts


def _edit(
    layout: Layout, stays: Tensor, visual: tuple[int, ...], by_item: tuple[tuple[int, ...], ...], sounds: Sequence[_Sound]
) -> Edit:
    """Leave the visual rows that ``stays`` says, and what the ``sounds`` come to."""
    shown = visual
    if any(layout.pinned):
        stays, shown = layout.with_predicting(stays, visual)
    rows, device = layout.shape[1], stays.device
    itself = torch.arange(rows, device=device).expand(layout.shape)
    to, weight, live = itself.clone(), torch.ones(layout.shape, device=device), list(layout.live)
    for sound in sounds:
        to[sound.sample, sound.rows], weight[sound.sample, sound.rows] = sound.to, sound.weight
        live[sound.sample] -= sound.gone
    counts = tuple(n - v + k for n, v, k in zip(live, layout.visual, shown))
    keep = layout.valid & (to == itself) & (stays | ~layout.rows(*VISUAL))
    anchor = Reduction.keeping(keep, counts).anchor
    # What row each of those that stay becomes; the last place is for those that go.
    place = torch.arange(anchor.shape[1], device=device).expand_as(anchor)
    became = torch.full((len(anchor), rows + 1), -1, device=device)
    became = became.scatter(1, anchor.masked_fill(anchor < 0, rows), place).index_fill(1, upload([rows], device), -1)
    joined = became.gather(1, to.masked_fill(to < 0, rows))
    by = by_item if shown == visual else None
    return Edit(Reduction.merging(joined, weight, anchor), live=counts, visual=shown, by_item=by)


def _keep(stays: Tensor, x: Tensor, layout: Layout, of: tuple[int, int], starts: list[int], counts: list[int]) -> None:
    """Write into ``stays`` which tokens of a video live on: so many of each frame."""
    (b, j), where = of, layout.where([of])
    frames = layout.items[b][j].frames
    with about(torch.full((1,), b, device=x.device), where, layout.shape):
        scores = interleaved(x[b, where[0]].reshape(frames, -1, x.shape[2]), starts).reshape(1, -1)
        frame = torch.arange(frames, device=x.device).repeat_interleave(scores.shape[1] // frames)[None]
        stays[b, where[0]] = top_of_groups(scores, frame, [counts])[0]


def _even(count: int, parts: int) -> list[Tensor]:
    """``count`` places, cut into as many equal ``parts`` as nearly as can be."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [torch.arange(start, end) for start, end in pairwise(ends)]


def _runs(mask: Tensor) -> list[Tensor]:
    """Rows of each unbroken run of ``mask`` ``[N]`` (on the host)."""
    rows = mask.nonzero()[:, 0]
    return list(rows.tensor_split((rows.diff() != 1).nonzero()[:, 0] + 1)) if len(rows) else []


def _windows_of(film: Sequence[Tensor], number: Tensor, items: Sequence[Item]) -> list[tuple[int, int, int]] | None:
    """``(item, first frame, end)`` of each run of video, given the ``number`` ``[N]`` of the item of each row.

    None where a run is no whole number of frames of one video.
    """
    windows, done = [], [0] * len(items)
    for run in film:
        j = int(number[run[0]])
        tokens = items[j].count // items[j].frames
        if bool((number[run] != j).any()) or len(run) % tokens:
            return None
        windows.append((j, done[j], done[j] + len(run) // tokens))
        done[j] = windows[-1][2]
    return windows
