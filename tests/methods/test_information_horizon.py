"""Information Horizon: counts, the random stage and its limiting cases."""

from __future__ import annotations

import torch

from foveate.core.layout import Layout
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import InformationHorizon
from foveate.ops.farthest import farthest_first
from tests.methods.bodiless import layout, traits


def behind(method: InformationHorizon, site: Site, prompt: Layout, x: torch.Tensor, seed: int = 0) -> Layout:
    edit = method.edit(site, x, prompt, {}, State({"seed": seed}))
    return prompt if edit is None else prompt.after(edit)


def test_the_published_counts() -> None:
    method = InformationHorizon().fitted(traits())
    prompt = layout("t" * 35 + "1" * 576 + "tt")
    x = torch.randn(*prompt.shape, 6, generator=torch.Generator().manual_seed(0))
    first = behind(method, Site("sequence"), prompt, x)
    second = behind(method, Site("decoder", 20), first, x[:, : first.shape[1]])

    assert method.horizon == 20
    assert (first.visual, second.visual) == ((284,), (38,))
    assert second.positions[0, 0].tolist() == list(range(35 + 38 + 2))
    assert set(second.origin[0].tolist()) <= set(first.origin[0].tolist())


def test_the_first_stage_spreads_out_and_may_act_later() -> None:
    prompt = layout("t" + "1" * 12 + "tt")
    x = torch.randn(*prompt.shape, 6, generator=torch.Generator().manual_seed(0))
    method = InformationHorizon(first=5, beyond=2, first_layer=2, horizon=3)
    first = behind(method, Site("decoder", 2), prompt, x)

    assert method.sites(traits()) == (Site("decoder", 2), Site("decoder", 3))
    assert first.ordinals()[0][0].tolist() == farthest_first(x[:, 1:13], 5)[0].sort().values.tolist()


def test_the_seed_decides_and_every_token_is_drawn_about_equally_often() -> None:
    prompt, x = layout("t" + "1" * 16 + "tt"), torch.zeros(1, 19, 1)
    method = InformationHorizon(beyond=4, horizon=3)
    drawn = [behind(method, Site("decoder", 3), prompt, x, seed).ordinals()[0][0] for seed in range(800)]
    times = torch.cat(drawn).bincount(minlength=16)

    assert drawn[0].tolist() == behind(method, Site("decoder", 3), prompt, x).ordinals()[0][0].tolist()
    # 200 each, standard deviation 12.2
    assert times.min() > 140
    assert times.max() < 260


def test_a_sample_gets_in_a_batch_what_it_gets_alone() -> None:
    prompts = "...t" + "1" * 24 + "tt", "t" + "1" * 15 + "2" * 12 + "tt"
    method = InformationHorizon(beyond=0.3, horizon=3)
    both = behind(method, Site("decoder", 3), layout(*prompts), torch.zeros(2, 30, 1))

    for sample, prompt in enumerate(prompts):
        alone = behind(method, Site("decoder", 3), layout(prompt), torch.zeros(1, 30, 1))
        assert [one.tolist() for one in both.ordinals()[sample]] == [one.tolist() for one in alone.ordinals()[0]]


def test_nothing_behind_the_horizon_leaves_text_alone() -> None:
    prompt = layout("t1111tt")
    left = behind(InformationHorizon(beyond=0, horizon=3), Site("decoder", 3), prompt, torch.zeros(1, 7, 1))

    assert left.origin.tolist() == [[0, 5, 6]]
    assert left.positions[0].tolist() == [[0, 1, 2]]


def test_it_says_what_does_not_fit() -> None:
    assert "must be behind first_layer=4" in str(InformationHorizon(first_layer=4, horizon=4).check(traits()))
    assert "must be in 1..31" in str(InformationHorizon(horizon=32).check(traits()))
    assert "use 'anchor'" in str(InformationHorizon(positions="contiguous").check(traits(rotary_rows=3)))
