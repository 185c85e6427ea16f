"""FlowCut: the card's score and schedules, and an encoder that is pruned by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import foveate
from foveate.core.errors import FoveateError
from foveate.core.roles import VISUAL
from foveate.core.signal import KeyValue, QueryKey, Rows, Site, Values
from foveate.methods import FlowCut
from foveate.methods.in_encoder.flowcut import entropy_ratios, flow, pruned
from foveate.models.llava import blocks
from tests import tiny
from tests.methods.bodiless import traits
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.oracle import noting

ATTENTION = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
EVERY = torch.ones(1, 4, dtype=torch.bool)
FAR_BACK = dict(encoder_layers=24, feature_layer=22, vision_sites=frozenset({"encoder"}), has_cls=True)


def test_the_cards_score() -> None:
    found = flow(ATTENTION, torch.tensor([[1.0, 2, 3, 4]]), torch.full((1, 4), 0.2))
    assert_close(found, torch.tensor([[0.75, 1.10, 1.05, 1.40]]))


@pytest.mark.parametrize(("target", "left", "gone"), [(2, 4, 0), (1, 1, 1)])
def test_the_cards_schedule(target: int, left: int, gone: int) -> None:
    ratio = entropy_ratios(ATTENTION, EVERY).item()
    assert ratio == pytest.approx(0.842738, abs=1e-6)
    assert pruned(4, target, left, ratio) == gone


@pytest.mark.parametrize(
    ("ratio", "trace"),
    [
        (0.9, [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]),
        (0.5, [490, 415, 349, 292, 243, 201, 165, 134, 108, 85, 64]),
        (1.0, [576] * 10 + [64]),
    ],
)
def test_the_cards_trace_of_a_whole_encoder(ratio: float, trace: list[int]) -> None:
    found = [576]
    for left in range(20, -1, -2):
        found.append(found[-1] - pruned(found[-1], 64, left, ratio))
    assert found[1:] == trace


def test_nothing_goes_of_what_is_too_few() -> None:
    assert [pruned(5, 9, left, 0.1) for left in (0, 1, 4)] == [0, 0, 0]


def test_attention_that_is_zero_has_an_entropy() -> None:
    assert entropy_ratios(torch.tensor([[1.0, 0, 0, 0]]), EVERY).item() == 0
    assert entropy_ratios(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 9, 9]]), EVERY.repeat(2, 1) & torch.tensor(
        [[True] * 4, [True, True, False, False]]
    )).tolist() == pytest.approx([1, 1])  # fmt: skip


def test_it_acts_in_front_of_the_block_that_feeds_the_projector() -> None:
    model = traits(**FAR_BACK)
    assert [site.layer for site in FlowCut().sites(model)] == list(range(22))
    site = Site("encoder", 3)
    assert {Rows(site, "cls"), Values(site)} < set(FlowCut().reads(model))
    siglip = traits(**(FAR_BACK | {"has_cls": False}))
    assert {QueryKey(site), Values(site)} < set(FlowCut().reads(siglip))
    assert FlowCut(layer=2).sites(model)[-1] == Site("decoder", 2)
    assert FlowCut(layer=2).reads(model)[-2:] == (Rows(Site("decoder", 1)), KeyValue(Site("decoder", 1)))


def test_what_cannot_host_it_is_refused() -> None:
    assert "needs the site 'encoder'" in (FlowCut().check(traits()) or "")
    assert "needs an encoder block in front" in (FlowCut().check(traits(**(FAR_BACK | {"feature_layer": 0}))) or "")
    assert "layer=9: must be in 1..3" in (FlowCut(layer=9).check(traits(**(FAR_BACK | {"decoder_layers": 4}))) or "")
    with pytest.raises(FoveateError, match=r"flowcut: entropy=2: must be a number, in \[0, 1\], or None"):
        FlowCut(entropy=2)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("method", [FlowCut(keep=5), FlowCut(keep=5, entropy=0.3, memory=0.8, every=3)], ids=str)
def test_pictures_of_a_batch_are_what_an_encoder_pruned_by_hand_makes_of_each_alone(vision: str, method: FlowCut) -> None:
    model = tiny.llava(vision=vision, blocks=8, grid=6)
    pixels = 3 * torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[tiny.IMAGE] * 36, 20, 21]]).repeat(3, 1)
    with torch.no_grad(), noting() as notes, foveate.attach(model, method) as session:
        model(input_ids=ids, pixel_values=pixels)
    traces = []
    for number, picture in enumerate(pixels):
        features, cells, trace = pruned_tower(model, picture[None], method)
        assert session.trace.alive(0)[number][0].tolist() == cells
        mine = session.trace.log[0][0].rows(*VISUAL)[number]
        with torch.no_grad():
            assert_close(notes.arriving[0][number, mine], model.model.multi_modal_projector(features), rtol=1e-4, atol=1e-4)
        traces.append(trace)
    assert any(36 > n > 5 for trace in traces for n in trace)
    assert method.entropy is not None or len(set(map(tuple, traces))) > 1  # each picture its own counts


def pruned_tower(
    model: Any, picture: Tensor, method: FlowCut, patches: int = 36, target: int = 5
) -> tuple[Tensor, list[int], list[int]]:
    """Features ``[n, C]`` of one picture, the cells that they are of, and how many there were behind each block.

    ``patches`` are as many as there are, ``target`` as many as are to be left.
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        x = tower.embeddings(picture)
        x = x if not hasattr(tower, "pre_layrnorm") else tower.pre_layrnorm(x)
        prefix = x.shape[1] - patches
        cells, score, trace = torch.arange(patches), None, []
        layers = blocks(model.model.vision_tower)
        last = len(layers) - 2
        for number, block in enumerate(layers[: last + 1]):
            query, key, value = (
                part(block.layer_norm1(x)).unflatten(2, (4, -1))[0].transpose(0, 1)
                for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
            )
            x = block(x, None)
            left = last - 1 - number
            if left < 0 or len(cells) == target:
                continue
            asks = query[:, :1] if prefix else query.mean(1, keepdim=True)
            attention = (asks @ key.mT * 8**-0.5).softmax(-1).mean(0)[0, prefix:]
            share = attention / attention.sum()
            flows = share
            if prefix:
                likeness = (value[:, :1] @ value.mT).softmax(-1).mean(0)[0, 1:]
                flows = flows + likeness / likeness.sum()
            flows = flows * value.mean(0)[prefix:].abs().sum(1)
            score = flows if score is None else method.memory * score + (1 - method.memory) * flows
            if left % method.every == 0:
                ratio = float(-(share * share.log()).sum() / math.log(len(share)))
                ratio = ratio if method.entropy is None else method.entropy
                gone = len(cells) - target if not left else round((len(cells) - target) / left**0.5 * (1 - ratio**2))
                stays = score.topk(len(cells) - gone).indices.sort().values
                cells, score = cells[stays], score[stays]
                x = torch.cat([x[:, :prefix], x[:, prefix + stays]], dim=1)
            trace.append(len(cells))
    return x[0, prefix:], cells.tolist(), trace


def test_the_second_stage_chooses_by_the_layer_before() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    with (
        torch.no_grad(),
        noting() as notes,
        foveate.attach(model, FlowCut(keep=4, layer=2, entering=3.0)) as session,
    ):
        model(**inputs)
    layer, layout = model.model.language_model.layers[1], session.trace.log[0][1]
    assert layout.visual == (12, 24, 12)
    for sample, real in enumerate(layout.valid):
        x = notes.entering[0][1][0][sample, real][None]
        tables = model.model.language_model.rotary_emb(x, layout.positions[0, sample, real][None])
        with torch.no_grad():
            query, key, value = (
                part(layer.input_layernorm(x)).unflatten(2, (-1, 12)).transpose(1, 2)
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
        query, key = apply_rotary_pos_emb(query, key, *tables)
        visual = layout.rows(*VISUAL)[sample, real]
        relation = (query[0, :, -1:] @ key[0].repeat_interleave(2, 0)[:, visual].mT / 12**0.5).softmax(-1).mean(0)[0]
        semantic = (value[0, :, -1:] @ value[0][:, visual].mT / 12**0.5).softmax(-1).mean(0)[0]
        score = (relation + semantic) * value[0].mean(0)[visual].abs().sum(1)
        best = score.topk(4).indices.sort().values
        expected = layout.origin[sample, real][visual][best].tolist()
        after = session.trace.log[0][2]
        assert after.origin[sample, after.rows(*VISUAL)[sample]].tolist() == expected


@pytest.mark.parametrize(("recipe", "of_tile", "left"), [
    ("flowcut(keep=10, layer=2, entering=0.5)", 5, 10), ("flowcut(keep=0.2, layer=2)", 8, 6),
])  # fmt: skip
def test_each_tile_is_pruned_alone_and_what_is_border_is_cut_off_behind(recipe: str, of_tile: int, left: int) -> None:
    body = BODIES["llava_next"]
    model, inputs = body.model(), body.inputs([(3, 1, 6), (2, 1, 4)])
    with torch.no_grad(), foveate.attach(model, recipe) as session:
        model(**inputs)
        views = [view for picture in session.anatomy.pictures(inputs) for view in picture.views]
    stays = {
        16 * number + cell
        for number, tile in enumerate(inputs["pixel_values"].flatten(0, 1))
        for cell in pruned_tower(model, tile[None], FlowCut(), 16, of_tile)[1]
    }
    expected = [
        [place for place, cell in enumerate(view.cells[:, 0].tolist()) if cell in stays]
        for view in views
        if view.cells is not None
    ]

    assert [item.tolist() for sample in session.trace.alive(0) for item in sample] == expected
    assert sum(map(len, expected)) < 2 * 3 * of_tile  # some were border
    assert session.report.visual_tokens[2:] == (left, left)


def test_of_tiles_only_the_second_stage_keeps_a_promise() -> None:
    tiles = traits(**(FAR_BACK | {"vision_sites": frozenset({"tiles"})}))
    assert FlowCut().fitted(tiles) == FlowCut(layer=2)
    assert FlowCut(layer=3).fitted(tiles) == FlowCut(layer=3)
    assert FlowCut().fitted(traits(**FAR_BACK)) == FlowCut()
    body = BODIES["llava_next"]
    with torch.no_grad(), foveate.attach(model := body.model(), "flowcut(keep=3)") as session:
        model(**body.inputs([(3, 1, 6)]))
    assert session.report.visual_tokens[2:] == (3, 3)
