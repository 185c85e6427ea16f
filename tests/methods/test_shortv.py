"""ShortV: the card's arithmetic, mask and layer lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.roles import VISUAL
from foveate.core.state import State
from foveate.engine.masks import pick
from foveate.methods import ShortV
from foveate.ops.divergence import divergence
from tests.methods.bodiless import LLAVA_7B, LLAVA_13B, layout, traits

ELSEWHERE = Fingerprint("llava", 4, 48, 64)
logits = st.lists(st.floats(-5, 5), min_size=4, max_size=4).map(torch.tensor)


def test_the_contribution_of_the_worked_example() -> None:
    original, modified = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 3.0, 1.0])

    assert divergence(original, modified).item() == pytest.approx(0.811154, abs=1e-6)
    assert divergence(modified, original).item() == pytest.approx(0.938024, abs=1e-6)


@given(logits, logits)
def test_a_contribution_is_a_divergence(original: torch.Tensor, modified: torch.Tensor) -> None:
    assert divergence(original, original).abs() < 1e-12
    assert divergence(original, modified) > -1e-12


@given(logits, logits)
def test_a_constant_added_to_the_logits_contributes_nothing(original: torch.Tensor, modified: torch.Tensor) -> None:
    assert_close(
        divergence(original, modified),
        divergence(original.double() + 2, modified.double() - 1),
        atol=1e-9,
        rtol=0,
    )


def test_each_sample_has_its_own_contribution() -> None:
    batch = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])

    assert divergence(batch, torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])).tolist() == [
        pytest.approx(0.811154, abs=1e-6),
        pytest.approx(0.0, abs=1e-12),
    ]


def test_text_rows_see_in_a_frozen_layer_what_they_see_in_a_plain_one() -> None:
    text, every = torch.tensor([[0, 1, 5, 6]]), torch.arange(7)[None, None]
    mask = pick(None, text, every, past=0, kernel="sdpa", x=torch.zeros(1))

    assert mask[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]


def test_visual_rows_are_frozen_and_text_stays_active() -> None:
    prompts = layout("tt111tt", "..t11tt")
    plan = ShortV(layers=(0,)).plan(0, torch.empty(2, 7, 1), prompts, {}, State())

    assert plan is not None
    assert plan.frozen
    assert torch.equal(~plan.active & prompts.valid, prompts.rows(*VISUAL))
    assert plan.counts == (4, 3)


def test_a_prompt_of_text_runs_plainly() -> None:
    assert ShortV(layers=(0,)).plan(0, torch.empty(1, 5, 1), layout("ttttt"), {}, State()) is None


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (LLAVA_7B, [31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19]),
        (
            LLAVA_13B,
            [39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17],
        ),
    ],
)
def test_published_models_freeze_the_published_layers(model: Fingerprint, published: list[int]) -> None:
    assert ShortV().routed(traits(model)) == tuple(sorted(published))
    assert ShortV(frozen=3).routed(traits(model)) == tuple(sorted(published[:3]))


def test_a_calibrated_order_is_followed() -> None:
    order = {"shortv": Artifact("shortv", ELSEWHERE, {"order": [3, 0, 2, 1]})}
    known = traits(ELSEWHERE, artifacts=order)

    assert ShortV(frozen=0.5).routed(known) == (0, 3)
    assert ShortV(frozen=1.0).routed(known) == (0, 1, 2, 3)
    assert ShortV(frozen=0).routed(known) == ()


def test_layers_may_be_named() -> None:
    assert ShortV(layers=(2, 1, 2)).routed(traits(ELSEWHERE)) == (1, 2)
    assert ShortV(layers=2).routed(traits(ELSEWHERE)) == (2,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "model", "remedy"),
    [
        (ShortV(), traits(ELSEWHERE), "run `foveate calibrate shortv` on this model, or give layers=(...)"),
        (ShortV(layers=(4,)), traits(ELSEWHERE), "layers=(4,): must be in 0..3"),
        (ShortV(frozen=20), traits(), "frozen=20: the order known for this model has 19 layers"),
        (ShortV(layers=(1,)), traits(mask_free=True), "load with attn_implementation='sdpa'"),
    ],
    ids=["no order", "no such layer", "too many", "flash attention"],
)
def test_what_cannot_be_frozen_is_refused_with_the_remedy(method: ShortV, model: object, remedy: str) -> None:
    reason = method.check(model)  # type: ignore[arg-type]

    assert reason is not None
    assert reason.endswith(remedy)


@pytest.mark.parametrize("frozen", [-1, 1.5, -0.5, "many", None])
def test_a_share_out_of_range_is_refused_by_name(frozen: object) -> None:
    with pytest.raises(FoveateError, match=r"shortv: frozen=.*: must be a number of layers or a share"):
        ShortV(frozen=frozen)  # type: ignore[arg-type]
