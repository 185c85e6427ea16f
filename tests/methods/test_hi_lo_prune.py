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
from foveate.methods.in_llm.hi_lo_prune import coarse_to_fine
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


def test_it_says_what_it_needs() -> None:
    assert "needs the pixels of each token" in str(HiLoPrune().check(traits()))
    assert "layer=32: must be in 0..31" in str(HiLoPrune(layer=32).check(traits(cell=(3, 14, 14))))


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_each_token_has_its_own_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, found = BODIES[name], []
    model, inputs = body.model(), body.inputs([(3, 2, 6)])

    def select(method: Method, images: ItemBatch, k: int) -> Tensor:
        found.append(images.seen[Pixels()])
        return torch.arange(k).expand(len(images.number), -1)

    monkeypatch.setattr(HiLoPrune, "select", select)
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
