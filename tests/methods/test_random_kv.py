"""Random cache entries: by layer and head, repeated by the seed, whatever stands beside a sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.signal import Seed
from foveate.methods import RandomKV
from foveate.methods.kv_cache.random_kv import random_scores
from tests import tiny
from tests.methods.bodiless import layout

PROMPT = "tttttttt" * 5


def kept(method: RandomKV, prompts: Layout, layer: int = 0, seed: int = 0, heads: int = 2) -> Kept | None:
    stored = torch.zeros(prompts.shape[0], heads, prompts.shape[1], 4)
    scores = method.score(layer, stored, stored, {Seed(): seed}, prompts)
    (found,) = method.plan([scores], [prompts])
    return found


def entries(*arguments: int, keep: float = 0.5) -> Tensor:
    found = kept(RandomKV(keep=keep), layout(PROMPT), *arguments)
    assert found is not None
    return found.entries


def test_each_layer_head_and_seed_draws_for_itself_and_the_same_again() -> None:
    assert entries(1, 7).equal(entries(1, 7))
    assert not entries(1, 7)[:, 0].equal(entries(1, 7)[:, 1])
    assert not entries(1, 7).equal(entries(2, 7))
    assert not entries(1, 7).equal(entries(1, 8))


def test_nothing_is_kept_apart() -> None:
    share = torch.stack([torch.zeros(40).index_add(0, entries(0, seed)[0, 0], torch.ones(20)) for seed in range(400)]).mean(
        0
    )

    assert (share - 0.5).abs().max() < 0.12  # the first and the last like all others; 0.12 is nearly five deviations


def test_only_pictures_go_where_text_is_spared() -> None:
    found = kept(RandomKV(keep=2, tokens="visual"), layout("tt111111tt"))

    assert found is not None
    assert found.counts == (6,)
    for head in found.entries[0].tolist():
        assert {0, 1, 8, 9} < set(head)


def test_padding_changes_nothing_of_a_draw() -> None:
    there = torch.tensor([[False, False, True, True, True, False, True]])
    alone, padded = random_scores(there[:, 2:], (4,), 3, 5, 1), random_scores(there, (4,), 3, 5, 1)

    assert padded[..., there[0]].equal(alone[..., there[0, 2:]])
    assert random_scores(torch.zeros(1, 3, dtype=torch.bool), (0,), 3, 5, 1).shape == (1, 3, 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_is_that_of_attach(seed: int) -> None:
    model = tiny.text()
    ids = torch.arange(20)[None] + 3

    def held(seed: int) -> list[Tensor]:
        with foveate.attach(model, "random_kv(keep=0.4)", seed=seed), torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        return [layer.keys for layer in cache.layers]

    assert all(keys.shape[2] == 8 for keys in held(seed))
    assert all(map(torch.equal, held(seed), held(seed)))
    assert not all(map(torch.equal, held(seed), held(seed + 1)))
