"""METEOR: the card's worked examples and limiting cases, and two encoders that are pruned by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.roles import Item
from foveate.core.signal import Attention, Rows, Site
from foveate.core.traits import TowerTraits
from foveate.methods import Meteor
from foveate.methods.in_llm.meteor import (
    from_text,
    likeness_to_mean,
    numerical_rank,
    pictures_of,
    redundancy,
    segments,
    votes,
)
from tests import several
from tests.methods.bodiless import traits
from tests.suite.bodies import BODIES, ONE, RAGGED, SEVERAL
from tests.suite.oracle import noting

ATTENTION = torch.tensor([[[0.1, 0.3, 0.0, 0.2], [0.1, 0.0, 0.0, 0.0], [0.0, 0.1, 0.2, 0.0]]])


def test_the_worked_example() -> None:
    scores, paid = votes(ATTENTION, 2)

    assert round(10 * float(paid)) == 9
    assert_close(scores, torch.tensor([[0.1, 0.4, 0.2, 0.2]]))


def test_all_heads_vote_with_what_they_pay() -> None:
    scores, paid = votes(ATTENTION, 3)

    assert_close(scores, ATTENTION.sum(1))
    assert_close(paid, torch.tensor([1.0]))


def test_the_question_is_averaged_over_its_own_rows() -> None:
    logits = torch.full((1, 1, 3, 2), float("-inf"))
    logits[0, 0, 1:] = torch.tensor([[0.2, 0.4], [0.6, 0.1]]).log()
    asked = Attention(logits, torch.tensor([[[0.0, 0.0, 0.0]]]))

    assert_close(from_text(asked), torch.tensor([[[0.4, 0.25]]]))


def kept(recipe: str, samples: list[tuple[int, int, int]] = RAGGED) -> list[int]:
    body = BODIES["llava-clip"]
    with foveate.attach(body.model(), recipe) as session, torch.no_grad():
        session.anatomy.model(**body.inputs(samples))
    return [sum(map(len, of)) for of in session.trace.alive(session.anatomy.traits().decoder_layers)]


def test_no_attention_keeps_one_token_and_much_keeps_all() -> None:
    assert kept("meteor(factor=0.0)") == [1, 1, 1]
    assert kept("meteor(factor=1e9)") == [16, 32, 16]


@pytest.mark.parametrize("heads", [2, 0.5])
def test_what_stays_is_what_the_attention_of_the_plain_model_asks_for(heads: int | float) -> None:
    body = BODIES["llava-clip"]
    inputs, model = body.inputs(ONE), body.model(attention="eager")
    with torch.no_grad():
        row: Tensor = model(**inputs, output_attentions=True).attentions[1][0]
    shown = (inputs["input_ids"][0] == 7).nonzero()[:, 0]
    paid = row[:, int(shown[-1]) + 1 :, shown].mean(1)
    best = paid.sum(1).topk(2).indices

    assert kept(f"meteor(layer=2, factor=8.0, heads={heads})", ONE) == [round(8 * float(paid[best].sum()))]


def towers(*tokens: int, cls: bool = False, depth: int = 12) -> tuple[TowerTraits, ...]:
    """Encoders of so many tokens each, one's blocks behind the other's."""
    return tuple(TowerTraits(n * (depth + 1), depth - 1, cls, count) for n, count in enumerate(tokens))


def test_encoders_share_by_rank() -> None:
    there = traits(towers=towers(200, 200, 200))
    found = Meteor(encoding=0.5, ranks=(60, 30, 10) * 3).budgets(there)
    assert [of[0] for of in found] == [180, 90, 30]  # the card's
    assert [sum(of) for of in zip(*found)] == [300, 150, 75]
    equal = Meteor(encoding=0.5, ranks=(7.0,) * 9).budgets(there)
    assert equal == [[100, 50, 25]] * 3
    # Nobody keeps more than there is: the others have the rest. Without ranks all keep the same share.
    assert [of[0] for of in Meteor(encoding=0.75, ranks=(9, 1) * 3).budgets(traits(towers=towers(100, 100)))] == [100, 50]
    assert Meteor(encoding=0.5).budgets(traits(towers=towers(576, 64))) == [[288, 144, 72], [32, 16, 8]]
    assert Meteor(encoding=1.0).budgets(there) == [[200] * 3] * 3
    assert Meteor(encoding=0.0).budgets(there) == [[1] * 3] * 3


def test_tokens_that_other_encoders_repeat() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.6, 0.8]]])
    number, encoder = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 1]])
    found = redundancy(x, number, encoder, 1, 2)
    assert_close(found, torch.tensor([[1.6, 0.8, 1.0, 1.4]]))
    assert (-found[0]).topk(2).indices.tolist() == [1, 2]  # token 1 of the first encoder, token 0 of the second
    assert (-found[0]).topk(3).indices.tolist() == [1, 2, 3]
    assert not redundancy(x, number, torch.zeros_like(encoder), 1, 1).any()  # one encoder alone


def test_it_is_the_double_sum_within_each_picture() -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, 6, generator=chance)
    number = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1, 1, 0], [-1, 0, 0, 0, 0, 0, -1, -1, 0, 0, 0]])
    encoder = torch.randint(0, 3, (2, 11), generator=chance).masked_fill(number < 0, -1)
    unit = x / x.norm(dim=2, keepdim=True)
    there = (number[:, :, None] == number[:, None]) & (encoder[:, :, None] != encoder[:, None]) & (number >= 0)[:, None]
    expected = ((unit @ unit.mT) * there).sum(2).masked_fill(number < 0, 0)

    assert_close(redundancy(x, number, encoder, 2, 3).masked_fill(number < 0, 0), expected)


def test_what_is_like_the_mean_and_what_a_rank_is() -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [9.0, 9.0]]])
    tokens = torch.tensor([[True, True, True, False]])
    assert likeness_to_mean(x, tokens)[0, :3].tolist() == pytest.approx([0.876, 0.919, 0.482], abs=1e-3)
    features = torch.randn(2, 9, 3) @ torch.randn(2, 3, 6)
    assert numerical_rank(features).tolist() == [3, 3]
    assert numerical_rank(torch.diag(torch.tensor([1.0, 0.01, 1e-4]))[None]).tolist() == [2]


def test_segments_and_pictures() -> None:
    there = traits(towers=towers(16, 9, depth=24))
    assert segments(there) == [[7, 15, 23], [32, 40, 48]]
    assert pictures_of([Item(1, 1, n, encoder=e) for n, e in enumerate((0, 0, 1, 0, 1, 1, 0))]) == [0, 0, 0, 1, 1, 1, 2]
    assert [str(site) for site in Meteor(layer=2).sites(there)][-3:] == ["encoder[48].after", "sequence", "decoder[2]"]
    assert Meteor(layer=2).sites(traits()) == (Site("decoder", 2),)
    assert Rows(Site("encoder", 15), "cls") in Meteor().reads(traits(towers=towers(16, cls=True, depth=24)))


def test_encoders_that_have_no_segments_are_refused() -> None:
    assert "encoder 1 of llava has fewer than 3 blocks" in str(
        Meteor().check(traits(towers=(TowerTraits(0, 11, True, 9), TowerTraits(12, 1, False, 9))))
    )
    assert "ranks=(1.0, 2.0): must be 3 for each of 2 encoders, 6 in all" in str(
        Meteor(ranks=(1.0, 2.0)).check(traits(towers=towers(9, 9)))
    )


@torch.no_grad()
def test_several_encoders_pruned_by_hand() -> None:
    model, inputs = SEVERAL.model(), SEVERAL.inputs([(3, 2, 6)])
    method = Meteor(factor=1e9, encoding=0.8, fusion=0.7, ranks=(3, 1, 1, 1, 2, 1))
    with noting() as notes, foveate.attach(model, method) as session:
        model(**inputs)
        budgets = method.budgets(session.anatomy.traits())
    parts, made = session.anatomy, []
    for encoder, kept in zip(parts.encoders, budgets):
        tower = model.model.vision_tower.towers[len(made)]
        side = several.SIDES[len(made)]
        ends = [round((encoder.feature_layer + 1) * (n + 1) / 3) - 1 for n in range(3)]
        pixels = torch.nn.functional.interpolate(inputs["pixel_values"], size=8 * side, mode="nearest")
        of_pictures = []
        for picture in pixels:
            x = tower(picture[None], output_hidden_states=True, return_dict=True).hidden_states[0]
            cells = torch.arange(side * side)
            for number, block in enumerate(encoder.blocks[: encoder.feature_layer + 1]):
                before, x = x, block(x, None)
                if number not in ends:
                    continue
                patches = x[0, encoder.prefix :]
                score = -torch.cosine_similarity(patches, patches.mean(0, keepdim=True), dim=1)
                if encoder.prefix and number > ends[0]:
                    normed = block.layer_norm1(before)
                    query, key = (
                        part(normed).unflatten(2, (4, -1))[0].transpose(0, 1)
                        for part in (block.self_attn.q_proj, block.self_attn.k_proj)
                    )
                    score = (query[:, :1] @ key.mT * 8**-0.5).softmax(-1).mean(0)[0, 1:]
                stays = score.topk(kept[ends.index(number)]).indices.sort().values
                cells, x = cells[stays], torch.cat([x[:, : encoder.prefix], patches[None, stays]], dim=1)
            of_pictures.append((cells, encoder.projector(x[:, encoder.prefix :])[0]))
        made.append(of_pictures)
    for picture in range(2):
        cells = torch.cat([of[picture][0] for of in made])
        x = torch.cat([of[picture][1] for of in made])
        encoder = torch.cat([torch.full_like(of[picture][0], number) for number, of in enumerate(made)])
        unit = x / x.norm(dim=1, keepdim=True)
        repeated = ((unit @ unit.T) * (encoder[:, None] != encoder)).sum(1)
        stays = (-repeated).topk(round(0.7 * len(x))).indices.sort().values
        alive = session.trace.alive(1)[0][2 * picture : 2 * picture + 2]
        assert [mine.tolist() for mine in alive] == [cells[stays[encoder[stays] == number]].tolist() for number in (0, 1)]
        layout = session.trace.log[0][1]
        mine = (layout.item[0] >= 2 * picture) & (layout.item[0] < 2 * picture + 2)
        assert_close(notes.entering[0][0][0][0, mine], x[stays], rtol=1e-4, atol=1e-4)
    positions = layout.positions[0, 0]
    assert positions.tolist() == list(range(len(positions)))
    assert [sum(of) for of in budgets] != [48, 27]


def test_an_encoder_of_its_own_is_nothing_to_other_methods() -> None:
    with pytest.raises(foveate.FoveateError, match="flowcut: needs the site 'encoder', which several does not offer"):
        foveate.attach(SEVERAL.model(), "flowcut")
