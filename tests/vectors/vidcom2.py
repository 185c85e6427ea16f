"""VidCom2: likeness to both means, and which tokens of a video stay, as vLLM computes them."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.core.roles import Item
from foveate.methods import VidCom2
from foveate.methods.before_llm.vidcom2 import likeness
from tests.methods.bodiless import images
from tests.vectors import Case


def check_likeness(case: Case) -> None:
    frame = torch.arange(case["frames"]).repeat_interleave(case["tokens"])[None]
    of_video, of_frame = likeness(case["x"][None], frame, case["frames"], 0.5)

    assert_close(of_video[0], case["of_video"], rtol=1e-5, atol=1e-5)
    assert_close(of_frame[0], case["of_frame"], rtol=1e-5, atol=1e-5)


def check_what_stays(case: Case) -> None:
    frames, tokens = case["frames"], case["tokens"]
    method = VidCom2(keep=1 - case["rate"])
    batch = images(frames * tokens, 1, x=case["x"][None], frames=frames)

    assert method.wanted(Item(frames * tokens, 1, 0, frames)) == case["count"]
    assert method.select(batch, case["count"])[0].tolist() == case["kept"].nonzero()[:, 0].tolist()
