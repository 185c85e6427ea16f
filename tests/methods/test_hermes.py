"""HERMES: the card's worked examples and limiting cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.bounded import Held
from foveate.methods import Hermes
from foveate.methods.kv_cache.hermes import depth_score, depths, folded, smoothed
from foveate.ops.ranks import closed_up

ATTENTION = torch.tensor([0.1, 0.4, 0.2, 0.3])


def test_layers_by_depth() -> None:
    kinds = [kind for kind, _ in depths(28, 0.1, 0.3)]

    assert [kinds.index(kind) for kind in ("shallow", "middle", "deep")] == [0, 2, 19]


@pytest.mark.parametrize(
    ("kind", "progress", "expected"),
    [
        ("shallow", 0.0, [0, 1.6e-6, 1.27e-3, 1]),
        ("deep", 1.0, [0, 1, 1 / 3, 2 / 3]),
        ("middle", 0.5, [0, 0.5505, 0.1981, 0.8167]),
    ],
)
def test_scores_by_depth(kind: str, progress: float, expected: list[float]) -> None:
    found = depth_score(ATTENTION, kind, progress, 0.75, 0.6)  # type: ignore[arg-type]

    assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-2)


def test_smoothing_from_the_last_layer_down() -> None:
    shallow, deep = smoothed([torch.tensor([0.0, 0, 0, 1]), torch.tensor([0, 1, 1 / 3, 2 / 3])], ["shallow", "deep"])

    assert_close(shallow, torch.tensor([0, 0.1, 0.0333, 0.9667]), atol=1e-4, rtol=0)
    assert_close(deep, torch.tensor([0, 1, 1 / 3, 2 / 3]))
    assert shallow.topk(2).indices.tolist() == [3, 1]


def test_raw_smoothing_takes_the_next_layer_as_it_was() -> None:
    layers, kinds = [torch.tensor([1.0, 0]), torch.tensor([0.0, 1]), torch.tensor([1.0, 0])], ["deep"] * 3
    whole, raw = (smoothed(layers, kinds, raw=raw)[0] for raw in (False, True))  # type: ignore[arg-type]

    assert_close(raw, torch.tensor([0.6, 0.4]))
    assert_close(whole, torch.tensor([0.6 + 0.4 * 0.4, 0.4 * 0.6]))


def turned(layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Pairs of numbers, by a twelfth of a circle each position."""
    angle = ((new - old)[0] * (torch.pi / 6))[:, None]
    half = torch.stack([-keys[..., 1], keys[..., 0]], dim=-1)
    return keys * angle.cos() + half * angle.sin()


def test_entries_are_folded_at_one_position() -> None:
    unit = torch.tensor([1.0, 0]).expand(1, 1, 2, 2)
    at = torch.tensor([[1, 3]])
    keys = turned(0, unit, torch.zeros_like(at), at)
    key, _ = folded(turned(0, keys, at, torch.full_like(at, 4)), keys)

    assert_close(key[0, 0, 0], torch.tensor([-0.5, 0.75**0.5]))


def test_positions_close_up_on_each_axis() -> None:
    axes = torch.tensor([[0, 1, 5, 5, 9, 20], [0, 1, 5, 6, 9, 20], [0, 1, 7, 6, 12, 20]])

    assert closed_up(axes, 2).tolist() == [[0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 3, 2, 4, 5]]


def held(count: int, layers: int = 10, prefix: int = 3) -> list[Held]:
    torch.manual_seed(0)
    positions = torch.arange(count)[None] * 2
    return [
        Held(
            torch.randn(1, 2, count, 2),
            torch.randn(1, 2, count, 2),
            positions,
            prefix,
            (torch.rand(count), torch.rand(count)),
        )
        for _ in range(layers)
    ]


def test_the_prefix_stays_and_every_layer_is_bounded() -> None:
    before = held(50)
    left = Hermes(keep=12).retain(before, turned, None)

    assert [layer.keys.shape[2] for layer in left] == [15] * 10
    assert all(torch.equal(new.keys[:, :, :3], old.keys[:, :, :3]) for new, old in zip(left, before))
    assert left[0].positions[0, -9:].tolist() == list(range(82, 100, 2))  # what came last, but for what smoothing brings in
    assert int(left[-1].positions[0, -1]) == int(left[-1].positions[0, -2]) + 1  # one entry for all that goes


def test_nothing_goes_where_all_fits_and_nothing_is_folded() -> None:
    before = held(20, prefix=3)
    left = Hermes(keep=18).retain(before, turned, None)

    assert all(torch.equal(new.keys, old.keys) for new, old in zip(left, before))


def test_positions_are_closed_up_when_the_model_knows_no_larger_ones() -> None:
    lazy, full, eager = (
        Hermes(keep=12, headroom=10, reindex=reindex).retain(held(50), turned, limit)  # type: ignore[arg-type]
        for reindex, limit in (("lazy", 109), ("lazy", 107), ("eager", None))
    )

    assert int(lazy[0].positions.max()) == 98
    assert full[0].positions[0].tolist() == eager[0].positions[0].tolist() == [0, 2, 4, *range(5, 17)]


def test_a_layer_that_is_shallow_and_deep_is_refused() -> None:
    from foveate import FoveateError, attach
    from tests import tiny

    with pytest.raises(FoveateError, match=r"hermes: shallow=0.8: must be 0.7 or less"):
        attach(tiny.llava(), "hermes(shallow=0.8)")
