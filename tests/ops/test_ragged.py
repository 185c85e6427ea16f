"""Attention over entries that are stored by head equals attention over the same entries, masked."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from foveate.ops.ragged import SIZE, Blocks


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 2),
    rows=st.integers(1, 3),
    held=st.integers(1, 80),
    later=st.integers(0, 5),
    seed=st.integers(0, 10_000),
)
def test_it_equals_masked_attention(
    batch: int, kv_heads: int, group: int, rows: int, held: int, later: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(batch, kv_heads, held, generator=generator) < 0.4
    kept[..., 0] = True
    keys, values = (torch.randn(batch, kv_heads, held, 8, generator=generator) for _ in range(2))
    more, others = (torch.randn(batch, kv_heads, later, 8, generator=generator) for _ in range(2))
    query = torch.randn(batch, kv_heads * group, rows, 8, generator=generator)
    allowed = torch.rand(batch, 1, rows, later, generator=generator) < 0.5

    blocks = Blocks.of(keys, values, entries(kept), kept.sum(-1).tolist())
    out = blocks.attend(query, more, others, allowed, 0.3, unturned)

    visible = torch.cat([kept[:, :, None].expand(-1, -1, rows, -1), allowed.expand(-1, kv_heads, -1, -1)], dim=-1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([keys, more], dim=2).repeat_interleave(group, dim=1),
        torch.cat([values, others], dim=2).repeat_interleave(group, dim=1),
        attn_mask=visible.repeat_interleave(group, dim=1),
        scale=0.3,
    )
    assert_close(out, expected, atol=1e-5, rtol=1e-5)
    shown = (query @ keys.repeat_interleave(group, dim=1).mT * 0.3).masked_fill(
        ~kept.repeat_interleave(group, dim=1)[:, :, None], float("-inf")
    )
    assert_close(blocks.log_mass(query, 0.3, unturned), shown.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_a_head_wastes_less_than_a_block() -> None:
    kept = torch.zeros(1, 3, 200, dtype=torch.bool)
    kept[0, 0, :150], kept[0, 1, :1], kept[0, 2, :32] = True, True, True
    x = torch.randn(1, 3, 200, 4)
    blocks = Blocks.of(x, x, entries(kept), kept.sum(-1).tolist())

    assert blocks.owner.tolist() == [0] * 5 + [1, 2]
    assert blocks.there.sum().item() == 183
    assert blocks.nbytes == 2 * 7 * SIZE * 4 * 4


def test_beams_take_their_blocks_along() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 2, 90, generator=generator) < 0.5
    x = torch.randn(2, 2, 90, 4, generator=generator)
    blocks = Blocks.of(x, x, entries(kept), kept.sum(-1).tolist())
    order = torch.tensor([1, 1, 0])
    query, nothing = torch.randn(2, 2, 1, 4, generator=generator), torch.zeros(2, 2, 0, 4)

    out = blocks.batched(order).attend(query[order], nothing[order], nothing[order], None, 1.0, unturned)

    assert_close(out, blocks.attend(query, nothing, nothing, None, 1.0, unturned)[order])


def unturned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    raise AssertionError("blocks hold keys as they were")


def entries(kept: torch.Tensor) -> torch.Tensor:
    """``[B, H, n]`` bool as ascending indices, padded with -1 on the left."""
    index = torch.where(kept, torch.arange(kept.shape[2]), -1)
    return index.sort(dim=-1).values[..., -int(kept.sum(-1).max()) :]
