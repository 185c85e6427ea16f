"""HalfV: the card's worked examples, counts and limiting cases."""

from __future__ import annotations

import pytest
import torch

from foveate.core.artifact import Fingerprint
from foveate.core.layout import Layout
from foveate.core.signal import Function, Hidden, Seen, Site
from foveate.core.state import State
from foveate.methods import HalfV
from foveate.methods.in_llm.halfv import attended
from foveate.ops.farthest import farthest_first
from tests.methods.bodiless import layout, traits
from tests.methods.llama import random_query_key

QWEN = traits(Fingerprint("qwen2_5_vl", 28, 3584, 152064), rotary_rows=3)
TOKENS = torch.tensor([[[1, 0], [0.9, 0.1], [0, 1], [-1, 0], [0.7, 0.7]]])


def behind(method: HalfV, prompt: Layout, layer: int) -> Layout:
    """The layout behind a stage, on random tokens."""
    x, before = torch.randn(2, *prompt.shape, 8, generator=torch.Generator().manual_seed(layer))
    seen: Seen = {
        Hidden(Site("decoder", layer - 1)): before,
        Function("query_key", layer - 1): random_query_key(8),
        Function("norm"): lambda x: x,
    }
    edit = method.edit(Site("decoder", layer), x, prompt, seen, State())
    return prompt if edit is None else prompt.after(edit)


@pytest.mark.parametrize(("seeds", "k", "chosen"), [([0], 3, [0, 2, 3]), ([], 2, [0, 3]), ([1], 4, [1, 2, 3, 4])])
def test_the_fill_of_the_worked_examples(seeds: list[int], k: int, chosen: list[int]) -> None:
    taken = torch.zeros(1, 5, dtype=torch.bool)
    taken[0, seeds] = True
    more = farthest_first(TOKENS, k - len(seeds), taken=taken)

    assert sorted([*seeds, *more[0].tolist()]) == chosen


def test_counts_of_the_worked_example() -> None:
    method = HalfV(attention=0.1).fitted(QWEN)
    first = behind(method, layout("t" * 4 + "1" * 1000 + "tt"), 2)
    second = behind(method, first, 21)

    assert (method.ivr_layer, method.ssr_layer, method.ivr_ratio, method.ssr) == (2, 21, 0.25, "prune")
    assert (first.visual, second.visual) == ((250,), (50,))
    assert second.positions[0, 0].tolist() == second.origin[0].tolist()


def test_attention_alone_and_diversity_alone() -> None:
    prompt = layout("t" + "1" * 12 + "tt")
    x, before = torch.randn(2, *prompt.shape, 8, generator=torch.Generator().manual_seed(1))
    scores = attended(*random_query_key(8)(before, prompt, rope=False), prompt.last, prompt.ordinal >= 0)[0, 1:13]
    alone = [behind(HalfV(ivr_layer=1, ivr_ratio=0.5, attention=share), prompt, 1) for share in (1.0, 0.0)]

    assert scores.sum() == pytest.approx(1)
    assert alone[0].ordinals()[0][0].tolist() == scores.topk(6).indices.sort().values.tolist()
    far = farthest_first(x[:, 1:13], 6, first=torch.tensor([0]))
    assert alone[1].ordinals()[0][0].tolist() == far[0].sort().values.tolist()


def test_a_sample_gets_in_a_batch_what_it_gets_alone() -> None:
    method = HalfV(ivr_layer=1, ivr_ratio=0.5)
    prompts = "...t" + "1" * 24 + "tt", "t" + "1" * 15 + "2" * 12 + "tt"
    x, before = torch.randn(2, 2, 30, 8, generator=torch.Generator().manual_seed(1))

    def kept(samples: slice) -> list[list[int]]:
        prompt = layout(*prompts[samples])
        seen: Seen = {
            Hidden(Site("decoder", 0)): before[samples],
            Function("query_key", 0): random_query_key(8),
            Function("norm"): lambda x: x,
        }
        edit = method.edit(Site("decoder", 1), x[samples], prompt, seen, State())
        assert edit is not None
        return [[row for row in rows if row >= 0] for rows in edit.reduction.anchor.tolist()]

    assert kept(slice(0, 2)) == [*kept(slice(0, 1)), *kept(slice(1, 2))]


def test_vicuna_freezes_the_deep_layers() -> None:
    method = HalfV().fitted(traits())

    assert (method.ivr_layer, method.ivr_ratio, method.ssr) == (3, 0.5, "freeze")
    assert method.routed(traits()) == tuple(range(15, 32))
    assert method.sites(traits()) == (Site("decoder", 3),)
    plan = method.plan(15, torch.zeros(1), layout("t111tt"), {}, State())
    assert plan is not None
    assert plan.frozen
    assert plan.active.tolist() == [[True, False, False, False, True, True]]


def test_it_says_what_does_not_fit() -> None:
    assert "must be behind ivr_layer=4" in str(HalfV(ivr_layer=4, ssr_layer=4).check(traits()))
    assert "must be in 1..31" in str(HalfV(ssr_layer=32).check(traits()))
    assert "attn_implementation='sdpa'" in str(HalfV().check(traits(mask_free=True)))
    assert HalfV(ssr="prune").check(traits(mask_free=True)) is None
