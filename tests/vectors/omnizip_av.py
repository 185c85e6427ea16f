"""OmniZip: the sound that counts, the rates of the windows, and the video tokens kept."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.methods.before_llm.omnizip_av import drop_rates, interleaved, kept_audio
from foveate.ops.select import top_of_groups
from tests.vectors import Case

LOW, HIGH = 0.35, 0.75


def check_audio(case: Case) -> None:
    assert torch.equal(
        kept_audio(case["audio_importance"], case["rho_audio"], _context(case)), case["out_audio_mask"].bool()
    )


def check_rates(case: Case) -> None:
    retention = case["out_window_retention"].tolist()
    sizes = [len(window) for window in _windows(case)]
    guided = sizes[: len(retention)]
    rates = drop_rates(retention, guided, case["rho_video"], LOW, HIGH, sum(sizes) - sum(guided))

    assert_close(torch.tensor(rates, dtype=torch.float64), case["out_window_rate"], atol=1e-6, rtol=0)


def check_video(case: Case) -> None:
    rates = case["out_window_rate"].tolist()
    windows = _windows(case)
    frame = int(case["video_grid_thw"][1] // 2 * (case["video_grid_thw"][2] // 2))
    rates += [case["rho_video"]] * (len(windows) - len(rates))
    for rate, window in zip(rates, windows):
        frames = case["input_embeds"][window].reshape(-1, frame, case["input_embeds"].shape[1])
        group = torch.arange(len(frames)).repeat_interleave(frame)[None]
        scores = interleaved(frames, [0]).reshape(1, -1)
        kept = top_of_groups(scores, group, [[int(frame * (1 - rate))] * len(frames)])

        assert kept[0].tolist() == case["out_global_mask"][window].bool().tolist()


def _context(case: Case) -> float:
    return case["contextual_ratio"] if case["g"] else 0.0


def _windows(case: Case) -> list[torch.Tensor]:
    """Rows of each unbroken run of video tokens."""
    rows = (case["input_ids"] == case["video_token_id"]).nonzero()[:, 0]
    breaks = (rows.diff() != 1).nonzero()[:, 0] + 1
    return list(rows.tensor_split(breaks.tolist()))
