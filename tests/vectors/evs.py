"""EVS: which tokens of a video stay, as vLLM computes it."""

from __future__ import annotations

from foveate.methods import EVS
from foveate.methods.before_llm.evs import retained
from tests.methods.bodiless import images
from tests.vectors import Case


def check_what_stays(case: Case) -> None:
    frames, tokens = case["frames"], case["tokens"]
    batch = images(frames * tokens, 1, x=case["x"][None], frames=frames)

    assert retained(frames, tokens, case["rate"]) == case["count"]
    assert EVS(rate=case["rate"]).select(batch, case["count"])[0].tolist() == case["kept"].nonzero()[:, 0].tolist()
