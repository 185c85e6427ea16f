"""Rows that go inside the vision tower: what reaches the language model is what the tower makes of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.reduction import Reduction
from foveate.core.roles import VISUAL, Role
from foveate.core.signal import Columns, Features, Keys, Rows, Seen, Signal, Site, Summary, Values
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.session import Session
from foveate.engine.vision_signals import PictureSignals
from foveate.methods import FlowCut, PruMerge, ToMe, VisionZip
from foveate.models import anatomy
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.oracle import noting

LLAVA = BODIES["llava-clip"]
CLOSE = dict(rtol=1e-4, atol=1e-4)
KEPT = [[0, 3, 5, 6, 15], [1, 2, 4, 9, 11], [7, 8, 10, 12, 14], [0, 1, 2, 13, 15]]
RAGGED_KEPT = [[0, 3, 5, 6, 15], [1, 2], [7, 8, 10, 12, 14, 15], [13]]


@dataclass(frozen=True)
class Drop(Tokens):
    """Keeps given patches of each image at a site."""

    site: Site
    kept: tuple[tuple[int, ...], ...]
    name = "drop"

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (self.site,)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        keep = layout.role == Role.CLS
        for image, cells in enumerate(self.kept):
            keep[image] |= torch.isin(layout.ordinal[image], torch.tensor(cells))
        return Edit(Reduction.keeping(keep), positions="auto")


@dataclass(frozen=True)
class Reverse(Tokens):
    """Turns the tokens of each image round."""

    name = "reverse"

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site("pre_projector"),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        order = torch.arange(x.shape[1]).flip(0).expand(x.shape[0], -1)
        return Edit(Reduction.gather(order, x.shape[1]), positions="auto")


@dataclass(frozen=True)
class WatchFeatures(Tokens):
    """Hands out the signals it was shown in front of the projector."""

    signals: tuple[Signal, ...]
    found: Any = field(compare=False)
    name = "watch_features"

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return self.signals

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site("pre_projector"),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        self.found.extend(seen[signal] for signal in self.signals)
        return None


@dataclass(frozen=True)
class Watch(Tokens):
    """Hands out the encoder signals it was shown, by token."""

    signals: tuple[Signal, ...]
    found: Any = field(compare=False)
    name = "watch"

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return self.signals

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site("sequence"),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        items = [(sample, number) for sample, grids in enumerate(layout.items) for number in range(len(grids))]
        self.found.extend(seen[signal].of(items) for signal in self.signals)
        return None


SITES = {
    "patches": (Site("patches"), 0),
    "before": (Site("encoder", 1), 1),
    "middle": (Site("encoder", 1, "middle"), 2),
    "after": (Site("encoder", 1, "after"), 2),
    "last middle": (Site("encoder", 2, "middle"), 3),
    "pre_projector": (Site("pre_projector"), 4),
    "projected": (Site("projected"), 4),
}


@pytest.mark.parametrize("kept", [KEPT, RAGGED_KEPT], ids=["even", "ragged"])
@pytest.mark.parametrize(("site", "masked_from"), SITES.values(), ids=SITES)
def test_what_is_left_equals_a_tower_that_masks_the_rest(site: Site, masked_from: int, kept: list[list[int]]) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    method = Drop(site, tuple(map(tuple, kept)))
    with torch.no_grad(), noting() as notes, foveate.attach(model, method) as session:
        model(**inputs)
    features = masked_tower(model, inputs["pixel_values"], kept, masked_from)
    with torch.no_grad():
        projected = model.model.multi_modal_projector(features)
    assert_arrived(session, notes.arriving[0], [projected[i, cells] for i, cells in enumerate(kept)], kept)


def test_rows_may_change_their_order() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    with torch.no_grad(), noting() as notes, foveate.attach(model, Reverse()) as session:
        model(**inputs)
    with torch.no_grad():
        projected = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert_arrived(session, notes.arriving[0], list(projected.flip(1)), [list(range(15, -1, -1))] * 4)


def test_tome_equals_a_tower_run_by_hand() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    method = ToMe(keep=6)
    with torch.no_grad(), noting() as notes, foveate.attach(model, method) as session:
        model(**inputs)
    layout = session.trace.log[0][0]
    mine = layout.rows(*VISUAL)[0]
    x, size, cells = tower_with_merging(model, inputs["pixel_values"], (4, 3, 3))
    with torch.no_grad():
        expected = model.model.multi_modal_projector(x[:, 1:])[0]
    assert size[:, 1:].sum() == 16
    torch.testing.assert_close(notes.arriving[0][0, mine], expected, **CLOSE)
    assert layout.ordinal[0, mine].tolist() == cells


def test_of_ragged_images_cls_and_what_it_attends_to_are_those_of_each_image_alone() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    signals = (Summary(), Rows(Site("encoder", 2), "cls"))

    together: list[Any] = []
    with torch.no_grad(), foveate.attach(model, _watched(signals, together, RAGGED_KEPT)):
        model.model.get_image_features(inputs["pixel_values"])
    for image, cells in enumerate(RAGGED_KEPT):
        alone: list[Any] = []
        with torch.no_grad(), foveate.attach(model, _watched(signals, alone, [cells])):
            model.model.get_image_features(inputs["pixel_values"][image : image + 1])
        torch.testing.assert_close(together[0][image], alone[0][0], **CLOSE)
        mine = together[1].probabilities()[image, :, 0]
        torch.testing.assert_close(mine[:, -len(cells) :], alone[1].probabilities()[0, :, 0], **CLOSE)


def test_of_ragged_images_values_are_those_of_each_image_alone_cls_in_front() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    signals = (Values(Site("encoder", 2)),)

    together: list[Any] = []
    with torch.no_grad(), foveate.attach(model, _watched(signals, together, RAGGED_KEPT)):
        model.model.get_image_features(inputs["pixel_values"])
    for image, cells in enumerate(RAGGED_KEPT):
        alone: list[Any] = []
        with torch.no_grad(), foveate.attach(model, _watched(signals, alone, [cells])):
            model.model.get_image_features(inputs["pixel_values"][image : image + 1])
        assert alone[0].shape == (1, 4, 1 + len(cells), 8)
        torch.testing.assert_close(together[0][image][:, [0, *range(-len(cells), 0)]], alone[0][0], **CLOSE)


def test_what_is_read_in_its_own_block_alone_is_let_go_behind_it() -> None:
    model, pixels = LLAVA.model(), LLAVA.inputs(ONE)["pixel_values"]
    held: list[int] = []

    def note(signals: PictureSignals, layer: int) -> None:
        forget(signals, layer)
        held.append(len(signals._seen))

    forget = PictureSignals.forget_before
    with torch.no_grad(), patch.object(PictureSignals, "forget_before", note), foveate.attach(model, FlowCut(keep=6)):
        model.model.get_image_features(pixels)
    assert held == [0] * 4


@pytest.mark.filterwarnings("ignore::foveate.NeedsTraining")
@pytest.mark.parametrize("method", [PruMerge(keep=2, layer=3), VisionZip(keep=2)], ids=str)
def test_what_is_made_of_an_image_does_not_depend_on_those_beside_it(method: Tokens) -> None:
    model, pixels = LLAVA.model(), LLAVA.inputs(RAGGED)["pixel_values"]

    def made(pixels: Tensor, kept: list[list[int]]) -> Tensor:
        first = Drop(SITES["before"][0], tuple(map(tuple, kept)))
        with torch.no_grad(), foveate.attach(model, foveate.Recipe((first, method))):
            return torch.stack(list(model.model.get_image_features(pixels).pooler_output))

    together = made(pixels, RAGGED_KEPT)
    for image, cells in enumerate(RAGGED_KEPT):
        torch.testing.assert_close(together[image], made(pixels[image : image + 1], [cells])[0], **CLOSE)


def test_visionzip_gives_cls_to_the_language_model() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with torch.no_grad(), noting() as notes, foveate.attach(model, VisionZip(keep=6)) as session:
        model(**inputs)
    with torch.no_grad():
        features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        cls = model.model.multi_modal_projector(features[:, :1])[0, 0]
    mine = session.trace.log[0][0].rows(*VISUAL)[0]
    assert mine.sum() == 6
    torch.testing.assert_close(notes.arriving[0][0, mine][0], cls, **CLOSE)


def test_keys_of_an_encoder_come_by_token() -> None:
    body = BODIES["qwen2_5_vl"]
    model, inputs = body.model(), body.inputs([(2, 2, 3)])
    found: list[Tensor] = []
    made: list[Tensor] = []
    attention = model.model.visual.blocks[1].attn
    handle = attention.qkv.register_forward_hook(lambda module, args, output: made.append(output))
    turned: list[tuple[Tensor, Tensor]] = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: turned.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad(), foveate.attach(model, Watch((Keys(Site("encoder", 1)),), found)):
        model(**inputs)
    handle.remove()
    hook.remove()
    key = made[0].reshape(len(made[0]), 3, attention.num_heads, -1)[:, 1]
    cos, sin = (table[:, None] for table in turned[0])
    first, second = key.chunk(2, dim=-1)
    key = (key * cos + torch.cat([-second, first], dim=-1) * sin).mean(1)
    order = anatomy(model).encoder.order({"image_grid_thw": inputs["image_grid_thw"]}, 0)
    rows = torch.empty_like(key).index_copy(0, order, key)
    torch.testing.assert_close(found[0], rows.reshape(2, 16, 4, -1).mean(2), **CLOSE)


def test_encoder_signals_of_windowed_encoders_come_by_token() -> None:
    body = BODIES["qwen2_5_vl"]
    model, inputs = body.model(), body.inputs([(2, 2, 3)])
    found: list[Tensor] = []
    merged: list[Tensor] = []
    tower = model.model.visual
    handle = tower.merger.register_forward_pre_hook(lambda module, args: merged.append(args[0]))
    signals = (Features(), Columns(Site("encoder", 0)))
    with torch.no_grad(), foveate.attach(model, Watch(signals, found)):
        model(**inputs)
    handle.remove()
    order = anatomy(model).encoder.order({"image_grid_thw": inputs["image_grid_thw"]}, 0)
    rows = torch.empty_like(merged[0]).index_copy(0, order, merged[0])
    torch.testing.assert_close(found[0], rows.reshape(2, 16, 4, -1).mean(2))
    # Every window's columns sum to the number of its rows over that number, so their mean over a window is 1 / rows.
    assert found[1].shape == (2, 16)
    assert found[1].sum().item() * 4 == pytest.approx(len(torch.unique(_windows(model, inputs))), rel=1e-4)


def test_a_block_that_cannot_be_run_in_halves_is_refused() -> None:
    model = LLAVA.model()
    block = anatomy(model).encoder.blocks[0]
    block.layer_norm2.register_forward_hook(lambda module, args, output: output + torch.rand(()))
    with pytest.raises(FoveateError, match="does not give the same bits"):
        foveate.attach(model, "tome(keep=6)")
    assert "forward" not in vars(block)
    foveate.attach(model, "none").detach()


def assert_arrived(session: Session, arriving: Tensor | None, expected: list[Tensor], cells: list[list[int]]) -> None:
    """Visual rows, image by image."""
    assert arriving is not None
    layout = session.trace.log[0][0]
    image = 0
    for sample, grids in enumerate(layout.items):
        for number in range(len(grids)):
            mine = layout.item[sample] == number
            assert layout.ordinal[sample, mine].tolist() == cells[image]
            torch.testing.assert_close(arriving[sample, mine], expected[image], **CLOSE)
            image += 1
    assert image == len(expected)


@torch.no_grad()
def masked_tower(model: Any, pixels: Tensor, kept: list[list[int]], masked_from: int) -> Tensor:
    """Features ``[I, 16, D]`` of the last but one block, patches that are not kept masked from a block on."""
    tower = model.model.vision_tower
    vision = getattr(tower, "vision_model", tower)
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    seen = torch.zeros(len(pixels), x.shape[1], dtype=torch.bool)
    seen[:, 0] = True
    for image, cells in enumerate(kept):
        seen[image, 1 + torch.tensor(cells)] = True
    mask = seen[:, None, None].expand(-1, 1, x.shape[1], -1)
    for number, block in enumerate(vision.encoder.layers[:-1]):
        x = block(x, mask if number >= masked_from else None)
    return x[:, 1:]


@torch.no_grad()
def tower_with_merging(model: Any, pixels: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
    """One image: rows ``[1, n, D]`` with CLS, their sizes, and the cell of each patch row."""
    tower = model.model.vision_tower
    vision = getattr(tower, "vision_model", tower)
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    size, cells = torch.ones(1, x.shape[1]), list(range(-1, x.shape[1] - 1))
    for block, r in zip(vision.encoder.layers[:-1], counts):
        attention = block.self_attn
        normed = block.layer_norm1(x)
        heads = [
            p(normed).unflatten(-1, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        logits = heads[0] @ heads[1].transpose(2, 3) * attention.scale + size.log()[:, None, None]
        x = x + attention.out_proj((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
        metric = torch.nn.functional.normalize(heads[1].mean(1)[0], dim=-1)
        scores = metric[0::2] @ metric[1::2].T
        scores[0] = float("-inf")
        best, partner = scores.max(1)
        sources = best.sort(descending=True, stable=True).indices[:r]
        total = (x * size[..., None])[0]
        merged, weight = total.clone(), size[0].clone()
        for source in sources.tolist():
            merged[2 * int(partner[source]) + 1] += total[2 * source]
            weight[2 * int(partner[source]) + 1] += size[0, 2 * source]
        gone = {2 * source for source in sources.tolist()}
        evens = [row for row in range(0, x.shape[1], 2) if row not in gone]
        rows = [*evens, *range(1, x.shape[1], 2)]
        x = (merged / weight[:, None])[rows][None]
        size, cells = weight[rows][None], [cells[row] for row in rows]
        x = x + block.mlp(block.layer_norm2(x))
    return x, size, cells[1:]


def _watched(signals: tuple[Signal, ...], found: list[Any], kept: list[list[int]]) -> foveate.Recipe:
    """Rows go in front of an early block; what is read behind it is handed out in front of the projector."""
    return foveate.Recipe((Drop(SITES["before"][0], tuple(map(tuple, kept))), WatchFeatures(signals, found)))


def _windows(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    config = model.config.vision_config
    grid = inputs["image_grid_thw"]
    bounds = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)[1]
    return bounds[1:]
