"""Hi-Lo Prune: the card's worked example and invariants, and the pixels that the engine hands over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.items import ItemBatch
from foveate.core.method import Method
from foveate.core.signal import Pixels, Site
from foveate.core.state import State
from foveate.methods import HiLoPrune
from foveate.methods.in_llm.hi_lo_prune import coarse_to_fine, fused
from foveate.ops.farthest import farthest_first
from tests.methods.bodiless import layout, traits
from tests.suite.bodies import BODIES

PIXELS = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 1.0], [-1.0, 0.2]]])
TOKENS = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.7, 0.7], [0.9, 0.1], [-1.0, 0.0]]])


class Pictures:
    """Pixels of each token as a signal by picture, as many as are asked for."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def of(self, items: Any) -> Tensor:
        return self.pixels[: len(items)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_worked_example() -> None:
    kept, found = coarse_to_fine(PIXELS, TOKENS, 2, 4)

    assert found.tolist() == [[0, 5, 3, 4]]
    assert kept.tolist() == [[0, 5]]


def test_one_step_alone_is_the_other_limit() -> None:
    pixels, tokens, first = drawn(2, 20, 6), drawn(2, 20, 9).flip(1), torch.zeros(2, dtype=torch.long)

    kept, found = coarse_to_fine(pixels, tokens, 5, 5)
    assert (
        kept.sort().values.tolist()
        == found.sort().values.tolist()
        == farthest_first(pixels, 5, first).sort().values.tolist()
    )
    assert coarse_to_fine(pixels, tokens, 5, 20)[0].tolist() == farthest_first(tokens, 5, first).tolist()


def test_what_is_kept_was_found_before() -> None:
    kept, found = coarse_to_fine(drawn(3, 30, 5), drawn(3, 30, 8), 4, 13, "isolated")

    for mine, among in zip(kept.tolist(), found.tolist()):
        assert len(set(mine)) == 4
        assert len(set(among)) == 13
        assert set(mine) <= set(among)


def test_all_tokens_live_until_the_cut() -> None:
    method, rows, state = HiLoPrune(keep=2, candidates=1 / 3), layout("t111111tt"), State()
    x = torch.cat([torch.zeros(1, 1, 2), TOKENS, torch.zeros(1, 2, 2)], dim=1)
    seen: dict[Any, Any] = {Pixels(): Pictures(PIXELS)}

    assert method.edit(Site("sequence"), x, rows, seen, state) is None
    edit = method.edit(Site("decoder", 2), x, rows, seen, state)
    assert edit is not None
    assert edit.reduction.anchor.tolist() == [[0, 1, 6, 7, 8]]
    assert rows.after(edit).positions[0].tolist() == [[0, 1, 6, 7, 8]]


def boosted(logits: Tensor, **given: Any) -> Tensor:
    """What is added with the settings of the card's example, where keys 1 and 2 of four are candidates."""
    settings = {"factor": 0.5, "threshold": 0.8, "share": 0.75} | given
    return fused(logits, torch.tensor([False, True, True, False]), **settings)


def test_the_worked_example_of_fusion() -> None:
    logits = torch.tensor([[[[2.0, 1.0, 1.5, 0.2]]]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])

    more = logits + boosted(logits)

    assert more.flatten().tolist() == [2.0, 1.0, 2.25, pytest.approx(0.2)]
    torch.testing.assert_close(
        more.softmax(-1).flatten(), torch.tensor([0.354962, 0.130583, 0.455780, 0.058675]), rtol=1e-5, atol=0
    )
    assert logits.softmax(-1).flatten() @ values == pytest.approx(1.970617)
    assert more.softmax(-1).flatten() @ values == pytest.approx(2.218168)


def test_limits_of_fusion() -> None:
    logits = drawn(2, 3, 5, 4)
    closed = logits.masked_fill(torch.ones(5, 4, dtype=torch.bool).triu(1), float("-inf"))

    assert not boosted(logits, factor=0.0).any()
    assert not boosted(logits, threshold=4.0).any()  # no weight is above 1
    assert torch.isfinite(boosted(closed, threshold=0.0, share=1.0)).all()  # what is not seen gets nothing
    every = boosted(logits, threshold=0.0, share=1.0)
    torch.testing.assert_close(every[..., 1:3], 0.5 * logits[..., 1:3])
    assert not every[..., [0, 3]].any()
    assert (boosted(logits, threshold=0.0, share=1.0, boost="magnitude")[..., 1:3] >= 0).all()
    # One key of four: the largest of all, which may be no candidate, or the larger candidate.
    one = boosted(logits, threshold=0.0, share=0.25)
    assert torch.equal(one != 0, (logits == logits.amax(-1, keepdim=True)) & (every != 0))
    mine = boosted(logits, threshold=0.0, share=0.25, among="candidates")
    assert torch.equal((mine != 0).sum(-1), torch.ones(2, 3, 5, dtype=torch.long))
    assert torch.equal(mine != 0, (logits == logits[..., 1:3].amax(-1, keepdim=True)) & (every != 0))


def test_candidates_are_what_the_coarse_step_found_and_the_fine_one_dropped() -> None:
    method, rows, state = HiLoPrune(keep=2, candidates=1 / 3, threshold=0.0, share=1.0), layout("t111111tt"), State()
    x = torch.cat([torch.zeros(1, 1, 2), TOKENS, torch.zeros(1, 2, 2)], dim=1)
    seen: dict[Any, Any] = {Pixels(): Pictures(PIXELS)}
    logits = torch.ones(1, 1, 9, 9)

    assert method.bias(0, logits, slice(0, 9), rows, seen, state) is None
    method.edit(Site("sequence"), x, rows, seen, state)
    added = method.bias(0, logits, slice(0, 9), rows, seen, state)
    assert added is not None
    candidates = [4, 5]  # tokens 3 and 4, behind a row of text
    wanted = torch.zeros(9, 9)
    wanted[:, candidates] = 0.5
    wanted[candidates] = 0
    assert torch.equal(added[0, 0], wanted)
    # Some queries, over a cache that had two entries before.
    some = method.bias(0, torch.ones(1, 1, 3, 11), slice(3, 6), rows, seen, state)
    assert some is not None
    assert torch.equal(some[0, 0], torch.nn.functional.pad(wanted[3:6], (2, 0)))


def test_it_acts_in_the_layers_before_the_cut() -> None:
    there = traits(cell=(3, 14, 14))
    assert HiLoPrune(layer=3).leaned(there) == (0, 1, 2)
    assert (
        HiLoPrune(layer=0).leaned(there) == HiLoPrune(fusion=0).leaned(there) == HiLoPrune(candidates=0).leaned(there) == ()
    )
    assert "fusion=0.5: layers [1] are recurrent" in str(HiLoPrune().check(traits(cell=(3, 14, 14), recurrent=(1, 5))))


def test_fusion_changes_what_leaves_and_no_fusion_changes_nothing() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs([(3, 2, 6)])

    def last(recipe: str) -> Tensor:
        with foveate.attach(model, recipe):
            return model(**inputs).logits[:, -1]  # type: ignore[no-any-return]

    plain = last("hi_lo_prune(keep=4, fusion=0)")
    assert torch.equal(last("hi_lo_prune(keep=4, candidates=0)"), last("hi_lo_prune(keep=4, candidates=0, fusion=0)"))
    torch.testing.assert_close(last("hi_lo_prune(keep=4, threshold=100)"), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(last("hi_lo_prune(keep=4, share=1.0)"), plain, rtol=1e-5, atol=1e-5)


def test_other_methods_of_the_same_layers() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs([(3, 2, 6)])
    with pytest.raises(
        foveate.FoveateError, match=r"shortv \+ hi_lo_prune: hi_lo_prune adds to the attention of decoder layer 1"
    ):
        foveate.attach(model, "hi_lo_prune(keep=4) + shortv(layers=(1, 2))")
    with foveate.attach(model, "hi_lo_prune(keep=4) + shortv(layers=(2,)) + snapkv(keep=0.5, window=4)") as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert session.report.idle == ()


def test_it_says_what_it_needs() -> None:
    assert "needs the pixels of each token" in str(HiLoPrune().check(traits()))
    assert "layer=32: must be in 0..31" in str(HiLoPrune(layer=32).check(traits(cell=(3, 14, 14))))


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_each_token_has_its_own_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, found = BODIES[name], []
    model, inputs = body.model(), body.inputs([(3, 2, 6)])

    def choose(method: Method, images: ItemBatch, k: int) -> tuple[Tensor, Tensor]:
        found.append(images.seen[Pixels()])
        first = torch.arange(k).expand(len(images.number), -1)
        return first, first

    monkeypatch.setattr(HiLoPrune, "_choose", choose)
    with foveate.attach(model, "hi_lo_prune(keep=4)") as session:
        model(**inputs)
    cell = session.anatomy.traits().cell
    assert cell is not None
    channels, rows, columns = cell
    (pixels,) = found

    assert pixels.shape == (2, 16, channels * rows * columns)
    if name == "llava-clip":
        image = inputs["pixel_values"][1, :, rows : 2 * rows, 2 * columns : 3 * columns]
        torch.testing.assert_close(pixels[1, 4 + 2], image.flatten())
    assert not torch.equal(pixels[0], pixels[1])
