"""DUET-VLM: the choice and the tokens of the first stage, score and survivors of the second."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.signal import Seen
from foveate.methods.before_llm.duet_vlm import asked_for
from foveate.methods.before_llm.visionzip import Zipped, edit_of, salience, zipped
from foveate.ops.select import top_rows
from tests.methods.vision import vision_layout
from tests.vectors import Case
from tests.vectors.visionzip import read


def check_score(case: Case) -> None:
    if case["variant"] != "v2v_clip":
        pytest.skip("attention received is the engine's")
    attention, *_ = _first_stage(case)[1].values()

    assert_close(salience(attention), case["score"], atol=1e-6, rtol=0)


def check_choice(case: Case) -> None:
    made, clip = _zipped(case), case["variant"] == "v2v_clip"
    kept = made.dominant if clip else made.dominant | made.contextual
    ranked = torch.where(made.contextual, made.rank, made.rank.amax() + 1).sort(dim=1, stable=True).indices

    assert kept.nonzero()[:, 1].tolist() == case["keep"].flatten().tolist()
    assert ranked[:, : case["contextual"]].flatten().tolist() == case["anchors"].flatten().tolist()


def check_members(case: Case) -> None:
    made = _zipped(case)
    lost = (made.joins < 0).sum(1)
    rest = made.joins.shape[1] - made.dominant.sum(1)
    members = case["members"].reshape(len(lost), -1)
    joined = made.joins.gather(1, members)

    assert (rest - lost - case["contextual"]).tolist() == [members.shape[1]] * len(lost)
    assert bool((joined >= 0).all())
    if "assign" in case:
        assert joined.tolist() == case["anchors"].gather(1, case["assign"]).tolist()


def check_tokens(case: Case) -> None:
    x, seen = _first_stage(case)
    splits = [(case["dominant"], case["contextual"])] * len(x)
    edit = edit_of(splits, x, vision_layout([x.shape[1]] * len(x), cls=False), seen, _pool(case))
    tokens = edit.reduction.apply(x) if edit.values is None else edit.values

    assert_close(tokens, case["tokens"].reshape(tokens.shape), atol=1e-5, rtol=0)


def check_second_stage(case: Case) -> None:
    if case["variant"] != "t2v":
        pytest.skip("the case is of the first stage")
    visual = torch.zeros(1, case["q"].shape[1], dtype=torch.bool)
    visual[:, case["img_start"] : case["img_start"] + case["n_img"]] = True
    scores = asked_for(case["q"][None], case["k"][None], case["text_rows"][None], torch.ones_like(visual))
    chosen = top_rows(scores, visual, [case["keep_num"]])

    assert_close(scores[visual], case["score"], atol=1e-6, rtol=0)
    assert chosen[visual].nonzero()[:, 0].tolist() == case["keep"].tolist()


def _first_stage(case: Case) -> tuple[Tensor, Seen]:
    if case["variant"] == "t2v":
        pytest.skip("the case is of the second stage")
    return read(case)


def _pool(case: Case) -> int | None:
    """None where the published function was told to work as VisionZip."""
    return None if case.get("uniform") else case["pool_factor"]


def _zipped(case: Case) -> Zipped:
    x, seen = _first_stage(case)
    images, tokens = x.shape[:2]
    attention, keys, *cls = seen.values()
    counts = [[tokens] * images, [case["dominant"] - len(cls)] * images, [case["contextual"]] * images]
    return zipped(salience(attention), keys, torch.ones(images, tokens).bool(), *counts, pool=_pool(case))
