"""PPE: clusters, merged tokens, their positions, a second merge, and the rotation by part of each axis.

The release breaks ties by noise of 1e-6 of a density. Ours has none: the cases leave gaps that are wider.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import PPE
from foveate.methods.before_llm.ppe import cluster_tokens
from foveate.models.anatomy import Anatomy
from foveate.ops.cluster import members
from tests.methods.bodiless import traits
from tests.vectors import Case


def check_clusters(case: Case) -> None:
    tokens = case["in_tokens"]
    centres, cluster = cluster_tokens(tokens[None], len(case["out_merged"]), case["cfg_knn"])

    assert cluster[0].tolist() == case["out_cluster"].tolist()
    assert cluster[0, centres[0]].tolist() == list(range(len(case["out_merged"])))


def check_members(case: Case) -> None:
    cluster, published = case["in_given_cluster"], case["out_given_members"]
    backwards = torch.arange(len(cluster)).flip(0)
    listed = members(cluster[None], backwards[None], *published.shape)

    assert listed[0].tolist() == published.tolist()


def check_merged_tokens_and_their_positions(case: Case) -> None:
    after, tokens = _merged(case)

    assert_close(tokens, case["out_merged"], atol=1e-5, rtol=0)
    assert after.positions[:, 0].tolist() == case["out_position_ids"].tolist()


def check_second_merge(case: Case) -> None:
    if not case["cfg_second"]:
        pytest.skip("the case merges once")
    after, tokens = _merged(case, times=2)

    assert_close(tokens, case["out_second_merged"], atol=1e-5, rtol=0)
    assert after.positions[:, 0].tolist() == case["out_second_position_ids"].tolist()


def check_rotation(case: Case) -> None:
    """The tables of the model's own rotary module, put together by part, on text and merged tokens."""
    slots, rows = case["cfg_ppe_k"], case["cfg_rope_rows"]
    text = case["in_text_pos"].expand(3 * slots, -1)
    after, _ = _merged(case)
    positions = torch.cat([text, after.positions[:, 0, :rows]], dim=1)[:, None]
    cos, sin = (table[:, None] for table in _anatomy(case).rotary(0, torch.zeros(1, 1, 1), positions))
    query = case["in_query"]
    first, second = query.chunk(2, dim=-1)

    assert_close(query * cos + torch.cat([-second, first], dim=-1) * sin, case["out_query"], atol=2e-6, rtol=0)


def _merged(case: Case, times: int = 1) -> tuple[Layout, Tensor]:
    count, slots = len(case["in_tokens"]), case["cfg_ppe_k"]
    axes = tuple(case["cfg_mrope_section"].tolist())
    layout = Layout.build(
        torch.ones(1, count, dtype=torch.bool),
        torch.ones(1, count, dtype=torch.bool),
        case["in_position_ids"][:, None],
        [[Item(1, count, 0)]],
    )
    state = State()
    state.put("session", "traits", traits(rotary_rows=3, rotary_axes=axes))
    method = PPE(keep=case["cfg_ratio"], capacity=slots, neighbours=case["cfg_knn"])
    tokens = case["in_tokens"][None]
    for _ in range(times):
        edit = method.edit(Site("sequence"), tokens, layout, {}, state)
        edit = edit or _reordered(case, layout)
        layout, tokens = layout.after(edit), edit.reduction.apply(tokens)
    return layout, tokens[0]


def _reordered(case: Case, layout: Layout) -> Edit:
    """What the release does where every token is its own cluster and we do nothing: it reorders them."""
    centres, _ = cluster_tokens(case["in_tokens"][None], len(case["in_tokens"]), case["cfg_knn"])
    positions = layout.positions[:, :, centres[0]].repeat_interleave(case["cfg_ppe_k"], dim=0)
    return Edit(Reduction.gather(centres, len(case["in_tokens"])), positions)


class _Rotary(nn.Module):
    """M-RoPE as Qwen2.5-VL has it: each section of the frequencies turns by the positions of its axis."""

    def __init__(self, frequencies: Tensor, sections: Tensor) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(frequencies, requires_grad=False)
        self.axis = torch.arange(len(sections)).repeat_interleave(sections)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[self.axis].permute(1, 2, 0).float() * self.frequencies
        return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()


def _anatomy(case: Case) -> Anatomy:
    body = nn.Module()
    body.rotary_emb = _Rotary(case["in_inv_freq"], case["cfg_mrope_section"])
    body.hidden_size = 1
    return Anatomy("qwen", body, body, body, body, [], (), lambda bound: [], rotary_rows=3, config=body)
