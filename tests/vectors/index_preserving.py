"""Index-preserving pruning: the classifier, the cells that stay, and the positions of the shortened prompt.

Window order and rotary tables of the encoder are the model family's, not the method's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Numbers, Site
from foveate.core.state import State
from foveate.methods import IndexPreserving
from foveate.methods.before_encoder.index_preserving import cell_logits, dilated
from tests.vectors import Case

IMAGE = 7


def check_logits(case: Case) -> None:
    logits = cell_logits(_cells(case), _weights(case))

    assert_close(logits.flatten()[:, None], case["out_logit"], atol=1e-5, rtol=1e-5)


def check_cells_kept(case: Case) -> None:
    if case["cfg_given_score"]:
        scores = case["in_score"].reshape(-1, case["cfg_temporal_patch"])[:, 0]
        layout = _images(case)
        foreground = _padded(scores[:, None] > case["cfg_threshold"], case)[..., 0]
        kept = dilated(foreground, layout)
    else:
        kept = _kept(case)

    assert _numbers(kept, case) == case["out_indices"].tolist()
    assert kept.sum(1).tolist() == case["out_tokens_per_image"].tolist()


def check_pixels_kept(case: Case) -> None:
    if not case["cfg_given_score"]:
        rows = case["in_pixel_values"].unflatten(0, (-1, case["cfg_merge"] ** 2))

        assert torch.equal(rows[_numbers(_kept(case), case)].flatten(0, 1), case["out_pixel_values"])


def check_positions(case: Case) -> None:
    edit, layout = _prompt_edit(case)
    after = layout.after(replace(edit, positions="anchor", text_after=IndexPreserving().text_after))

    assert after.positions.tolist() == case["out_position_ids"].tolist()
    assert edit.reduction.take(case["in_input_ids"]).tolist() == case["out_input_ids"].tolist()
    assert int(after.positions.max()) + 1 - after.shape[1] == case["out_rope_delta"].item()


def check_positions_that_text_keeps(case: Case) -> None:
    edit, layout = _prompt_edit(case)
    after = layout.after(replace(edit, positions="anchor", text_after="keep"))

    assert torch.equal(after.positions[:, 0], case["out_full_position_ids"][:, 0, edit.reduction.anchor[0]])


def _grids(case: Case) -> list[Item]:
    merge = case["cfg_merge"]
    return [Item(h // merge, w // merge, number) for number, (_, h, w) in enumerate(case["in_grid_thw"].tolist())]


def _cells(case: Case) -> Tensor:
    """``[N, T, C * 2P * 2P]``: the pixels of each cell, its sub-patches put together."""
    merge, channels, copies, patch = (case[f"cfg_{name}"] for name in ("merge", "channels", "temporal_patch", "patch"))
    rows = case["in_pixel_values"].reshape(-1, merge, merge, channels, copies, patch, patch)
    return rows.permute(0, 4, 3, 1, 5, 2, 6).flatten(2)


def _weights(case: Case) -> dict[str, Tensor]:
    return {
        "norm_weight": case["w_norm.weight"].flatten(),
        "norm_bias": case["w_norm.bias"].flatten(),
        "hidden_weight": case["w_conv.weight"].flatten(1),
        "hidden_bias": case["w_conv.bias"],
        "head_weight": case["w_fc.weight"],
        "head_bias": case["w_fc.bias"],
    }


def _padded(by_cell: Tensor, case: Case) -> Tensor:
    """``[I, N, ...]`` of all cells ``[sum of N, ...]``, padded on the left."""
    parts = by_cell.split([grid.count for grid in _grids(case)])
    out = by_cell.new_zeros(len(parts), max(map(len, parts)), *by_cell.shape[1:])
    for row, part in zip(out, parts):
        row[len(row) - len(part) :] = part
    return out


def _images(case: Case) -> Layout:
    grids = _grids(case)
    there = _padded(torch.ones(sum(grid.count for grid in grids), 1, dtype=torch.bool), case)[..., 0]
    positions = torch.zeros(1, *there.shape, dtype=torch.long)
    return Layout.build(there, there, positions, [[grid] for grid in grids])


def _kept(case: Case) -> Tensor:
    """``[I, N]`` what the method keeps of the first temporal copies."""
    layout, cells = _images(case), _padded(_cells(case)[:, 0], case)
    method = IndexPreserving(threshold=case["cfg_threshold"])
    edit = method.edit(Site("patches"), cells, layout, {Numbers("index_preserving"): _weights(case)}, State())
    reduction = Reduction.keeping(layout.valid) if edit is None else edit.reduction
    kept = torch.zeros_like(layout.valid, dtype=torch.long)
    return kept.scatter_add(1, reduction.anchor.clamp(min=0), reduction.valid.long()) > 0


def _numbers(kept: Tensor, case: Case) -> list[int]:
    return kept[_images(case).valid].nonzero().flatten().tolist()


def _prompt_edit(case: Case) -> tuple[Edit, Layout]:
    """The prompt's layout, and the edit that its image rows follow."""
    ids = case["in_input_ids"]
    visual = ids == IMAGE
    layout = Layout.build(visual, torch.ones_like(visual), case["out_full_position_ids"], [_grids(case)])
    keep = ~visual
    keep[0, visual[0].nonzero().flatten()[case["out_indices"]]] = True
    return Edit(Reduction.keeping(keep)), layout
