"""Information Horizon: the tokens of each window, what each says of the answer, and the random stage.

The DART stage before it is `dart`'s.
"""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.bench.probes.horizon import information, window_of
from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.ops.select import first_rows
from tests.vectors import Case


def check_windows(case: Case) -> None:
    side, size = case["cfg_grid"], case["cfg_window"]
    number = window_of(side, side, size)

    for x, column in enumerate(case["out_windows"]):
        for y, tokens in enumerate(column):
            assert (number == y * (side // size) + x).nonzero()[:, 0].tolist() == tokens.tolist()


def check_information(case: Case) -> None:
    side, size = case["cfg_grid"], case["cfg_window"]
    by_window = case["in_window_logits"].transpose(0, 1).flatten(0, 1)  # theirs count columns first

    found = information(by_window, case["in_base_logits"], case["cfg_label"])

    expected = case["out_token_scores"] - case["out_p_base"]
    assert_close(found[window_of(side, side, size)], expected, atol=1e-6, rtol=0)
    assert torch.isfinite(found).all()


def check_random_stage(case: Case) -> None:
    start, total = case["cfg_image_start"], case["cfg_num_image"]
    place = torch.arange(len(case["in_hidden"]))
    visual = (place >= start) & (place < start + total)
    layout = Layout.build(visual[None], torch.ones_like(visual)[None], place[None, None], [[Item(1, total, 0)]])
    for slots in (torch.arange(total)[case["out_dart_kept"]], case["out_dart_kept"][case["out_random_drawn"]]):
        kept = first_rows(torch.arange(len(slots))[None], slots[None] + start, (len(slots),), len(place))
        layout = layout.after(layout.keeping(kept[:, layout.origin[0]], (len(slots),), "auto"))

    assert layout.ordinals()[0][0].tolist() == case["out_final_kept"].tolist()
    assert layout.positions[0, 0].tolist() == case["out_position_ids"].tolist()
