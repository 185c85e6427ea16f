"""DUET-VLM: the card's worked examples, limiting cases, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.signal import Columns, Function, Keys, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import DuetVLM
from foveate.methods.before_llm.duet_vlm import asked_for
from foveate.methods.before_llm.visionzip import edit_of, zipped
from foveate.ops.select import top_rows
from tests.methods.bodiless import layout, traits
from tests.methods.vision import vision_layout

SCORE = torch.tensor([[0.9, 0.1, 0.5, 0.4, 0.3, 0.2, 0.05, 0.8]])
KEYS = torch.tensor([[[1, 0], [1, 0], [1, 0], [0.9, 0.1], [0, 1], [0.2, 0.8], [1, 0], [0, 1]]])
SITE = Site("encoder", 22)
ALL = torch.ones(1, 8).bool()


def test_the_worked_example_of_the_first_stage() -> None:
    x = 10 * torch.arange(8.0)[None, :, None]
    change = edit_of([(2, 2)], x, vision_layout([8], cls=False), {Columns(SITE): SCORE, Keys(SITE): KEYS}, pool=2)

    assert change.reduction.anchor.tolist() == [[0, 2, 4, 7]]
    assert change.reduction.apply(x)[0, :, 0].tolist() == [0, 50, 90, 70]
    assert change.reduction.members().any(1)[0].logical_not().nonzero()[:, 0].tolist() == [1, 6]


def test_a_pool_of_single_tokens_merges_nothing() -> None:
    x = torch.rand(1, 8, 3)
    made = zipped(SCORE, KEYS, ALL, [8], [2], [3], pool=1)

    assert torch.equal(made.reduction([5]).apply(x)[0], x[0, [0, 7, 2, 3, 4]])


def test_a_pool_of_all_that_is_left_loses_nothing() -> None:
    made = zipped(SCORE, KEYS, ALL, [8], [2], [2], pool=4)

    assert bool((made.joins >= 0).all())
    assert made.contextual[0].nonzero()[:, 0].tolist() == [2, 5]  # the first and the fourth of six by score


def test_the_worked_example_of_the_second_stage() -> None:
    # Two text rows, with probabilities of their own over four visual rows and the rest of it on themselves.
    first, second = [0.1, 0.4, 0.2, 0.1], [0.3, 0.2, 0.1, 0.2]
    logits = torch.tensor([[*first, 0.2, 0.0], [*second, 0.1, 0.1]]).clamp(min=1e-30).log()
    query = torch.cat([torch.zeros(4, 6), logits * 6**0.5])[None, None]
    scores = asked_for(query, torch.eye(6)[None, None], torch.tensor([[-1, 4, 5]]), torch.ones(1, 6).bool())

    assert_close(scores[0, :4], torch.tensor([0.2, 0.3, 0.15, 0.15]))
    assert top_rows(scores, torch.arange(6)[None] < 4, [2])[0].nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "count", "split"),
    [
        ({}, 576, (170, 35)),
        ({}, 205, (205, 0)),  # nothing would leave
        ({"dominant": 0.65, "contextual": 0.05}, 100, (65, 5)),
        ({"dominant": 300, "contextual": 7}, 576, (300, 7)),
    ],
)
def test_the_budget_of_a_grid(settings: dict[str, Any], count: int, split: tuple[int, int]) -> None:
    assert DuetVLM(**settings).split(count) == split


@pytest.mark.parametrize(("dominant", "contextual", "average"), [(300, 7, 191.75), (170, 35, 128), (85, 17, 63.75)])
def test_published_budgets_are_averages_over_the_layers(dominant: int, contextual: int, average: float) -> None:
    method = DuetVLM(dominant=dominant, contextual=contextual).fitted(traits())
    prompt = layout("t" + "1" * 576 + "tt")
    prompt = prompt.after(prompt.keeping(prompt.ordinal >= 576 - dominant - contextual, (dominant + contextual,)))

    def ask(x: Any, rows: Any) -> Any:
        query = torch.rand(1, 1, rows.shape[1], 2, generator=torch.Generator().manual_seed(0))
        return query, query

    alive = []
    for layer in range(32):
        site = Site("decoder", layer)
        if site in method.sites(traits()):
            x = torch.zeros(1, prompt.shape[1], 1)
            edit = method.edit(site, x, prompt, {Function("query_key", layer): ask}, State())
            assert edit is not None
            prompt = prompt.after(edit)
        alive.append(prompt.visual[0])

    assert sum(alive) / 32 == average
    assert prompt.live == (3,)


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (DuetVLM(), traits(encoder_layers=None), "needs encoder attention"),
        (DuetVLM(place="features"), traits(vision_sites=frozenset({"projected"})), "place='features'"),
        (DuetVLM(ratios=(0.5,)), traits(), "ratios=(0.5,): must be one for each of layers=(16, 24)"),
        (DuetVLM(layers=(16, 32)), traits(), "layers=(16, 32): must be in 1..31"),
        (DuetVLM(positions="contiguous"), traits(rotary_rows=3), "multi-row"),
    ],
)
def test_what_cannot_be_is_refused_at_attach(method: DuetVLM, model: Traits, reason: str) -> None:
    assert reason in str(method.check(model))


@pytest.mark.parametrize(
    "parameters", [{"dominant": 0}, {"contextual": -1}, {"pool": 0}, {"layers": (3, 2)}, {"ratios": (2.0, 0.0)}]
)
def test_parameters_that_mean_nothing_are_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"duet_vlm: {next(iter(parameters))}="):
        DuetVLM(**parameters)
