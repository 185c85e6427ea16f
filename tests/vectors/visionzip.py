"""VisionZip: the score, what is chosen and who joins whom, and the tokens that come out.

How a picture's tiles are laid out behind the encoder is not done as in the published code: see the method.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.signal import Attention, Columns, Keys, Rows, Seen, Site, Summary
from foveate.methods.before_llm.visionzip import Zipped, edit_of, salience, zipped
from tests.methods.vision import vision_layout
from tests.vectors import Case

SITE = Site("encoder", 22)


def check_score(case: Case) -> None:
    if case["variant"] != "clip":
        pytest.skip("attention received is the engine's")

    assert_close(salience(attention(case["attn_cls"])), case["score"], atol=1e-6, rtol=0)


def check_choice(case: Case) -> None:
    made, keep, targets = _zipped(case)
    kept, last = (mask.nonzero()[:, 1].reshape(len(mask), -1) for mask in (made.dominant, made.contextual))

    assert kept.tolist() == keep.tolist()
    assert last.tolist() == targets.tolist()


def check_members(case: Case) -> None:
    made, _, targets = _zipped(case)
    if "assign" not in case:
        pytest.skip("the case does not say")
    place = torch.arange(made.joins.shape[1])
    for joins, mine, assigned in zip(made.joins, targets, case["assign"]):
        joined = joins[(joins >= 0) & (joins != place)]
        assert joined.tolist() == mine[assigned].tolist()


def check_tokens(case: Case) -> None:
    made, *_ = _zipped(case)
    x, seen = read(case)
    cls = len(seen) - 2
    counts = [sum(_split(case)) - cls] * len(x)
    tokens = made.reduction(counts, raster=not cls).apply(x)

    assert_close(tokens, case["tokens"].reshape(len(x), -1, x.shape[2])[:, cls:], atol=1e-5, rtol=0)


def check_edit(case: Case) -> None:
    _skip_tiles(case)
    x, seen = read(case)
    if sum(_split(case)) >= x.shape[1]:
        pytest.skip("as many tokens as there are: a picture is then left as it is, without CLS")
    layout = vision_layout([x.shape[1]] * len(x), cls=False)
    edit = edit_of([_split(case)] * len(x), x, layout, seen)
    tokens = edit.reduction.apply(x) if edit.values is None else edit.values
    expected = case["tokens"].reshape(tokens.shape)

    assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert torch.equal(tokens[:, 0], expected[:, 0])
    if edit.values is None:
        assert edit.reduction.anchor[0].tolist() == case["keep"].tolist()


def attention(probabilities: Tensor) -> Attention:
    """CLS's attention ``[B, H, N + 1]`` as a method is shown it."""
    logits = probabilities[:, :, None, 1:].log()
    return Attention(logits, logits.new_zeros(logits.shape[:3]))


def read(case: Case) -> tuple[Tensor, Seen]:
    """Tokens ``[B, N, C]``, and what the encoder shows."""
    if "embeds" in case:
        metric = case["metric"] if "metric" in case else case["keys"]
        return case["embeds"][None], {Columns(SITE): case["score"][None], Keys(SITE): metric[None]}
    seen: Seen = {
        Rows(SITE, "cls"): attention(case["attn_cls"]),
        Keys(SITE): case["keys"].mean(1)[:, 1:],
        Summary(): case["hidden"][:, :1],
    }
    return case["hidden"][:, 1:], seen


def _split(case: Case) -> tuple[int, int]:
    """Dominant and contextual tokens, CLS counted."""
    if case["variant"] == "clip":
        return case["dominant"], case["contextual"]
    count = len(case["embeds"])
    return int(case["dominant_ratio"] * count), max(int(case["contextual_ratio"] * count), 1)


def _zipped(case: Case) -> tuple[Zipped, Tensor, Tensor]:
    """What becomes of the tokens, and the dominant tokens and targets as published ``[B, k]``."""
    _skip_tiles(case)
    x, seen = read(case)
    images, tokens = x.shape[:2]
    dominant, contextual = _split(case)
    attention, keys, *cls = seen.values()
    counts = [[tokens] * images, [dominant - len(cls)] * images, [contextual] * images]
    made = zipped(salience(attention), keys, torch.ones(images, tokens).bool(), *counts)
    if not cls:
        return made, case["dominant"][None], case["targets"][None]
    rest = torch.stack([row.nonzero()[:, 0] for row in ~made.dominant])
    return made, case["keep"], rest[:, case["target_pos"]]


def _skip_tiles(case: Case) -> None:
    if case["variant"] == "tiles":
        pytest.skip("tiles of a picture stay one grid in raster order, with its line ends: a choice of ours, see the method")
