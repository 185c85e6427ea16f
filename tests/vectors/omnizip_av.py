"""OmniZip: the sound that counts and what it takes in, the rates of the windows, and the video tokens kept."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.methods.before_llm.omnizip_av import drop_rates, interleaved, joined_sound, kept_audio
from foveate.ops.select import top_of_groups
from tests.vectors import Case

LOW, HIGH = 0.35, 0.75


def check_audio(case: Case) -> None:
    salient, anchors = kept_audio(case["audio_importance"], case["rho_audio"], _context(case))

    assert torch.equal(salient.index_fill(0, anchors, True), case["out_audio_mask"].bool())
    assert set(case["out_anchor"].tolist()) == set(anchors.tolist())


def check_anchors(case: Case) -> None:
    sound, video = (case["input_embeds"][case["input_ids"] == case[f"{kind}_token_id"]] for kind in ("audio", "video"))
    expected = case["out_embeds"][case["input_ids"] == case["audio_token_id"]]
    salient, anchors = kept_audio(case["audio_importance"], case["rho_audio"], _context(case))
    if not len(anchors):
        assert_close(sound, expected)
        return
    to, weight = joined_sound(sound, video, salient, anchors, int(case["g"]))
    kept = to == torch.arange(len(sound))
    joined = torch.zeros_like(sound).index_add(0, to[to >= 0], (sound * weight[:, None])[to >= 0])
    members = {(int(anchor), place) for place, anchor in enumerate(to.tolist()) if anchor not in (-1, place)}

    assert members == {(a, m) for a, m in zip(case["out_anchor"].tolist(), case["out_anchor_member"].tolist()) if m >= 0}
    assert_close(joined[kept], expected[kept], atol=1e-5, rtol=1e-5)


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
