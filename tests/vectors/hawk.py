"""HAWK: which rows ask, what each head matches, the score, and what is left of the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Seen, Site
from foveate.core.state import State
from foveate.methods import Hawk
from foveate.methods.before_llm.hawk import Normalise, instruction, matches, weighed
from tests.vectors import Case

IMAGE, VIDEO = 151655, 151656
NORMALISE: tuple[Normalise, ...] = ("l2", "softmax", "minmax")


def check_question(case: Case) -> None:
    if "out_queries" in case:
        asking = instruction(_layout(case).question, *_template(case))

        assert asking[0].nonzero()[:, 0].tolist() == case["out_queries"].tolist()


def check_scores(case: Case) -> None:
    if "out_scores" in case:
        layout = _layout(case)
        visual = layout.rows(*VISUAL)
        query, key = _query_key(case)(case["in_embeds"][None], layout, rope=False)
        logits = matches(query, key, instruction(layout.question, *_template(case)))
        scores = weighed(logits, visual, case["in_head_weights"], NORMALISE[case["cfg_norm"]])

        assert_close(logits[0][:, visual[0]], case["out_mean_logits"], atol=2e-6, rtol=0)
        assert_close(scores[visual], case["out_scores"], atol=1e-6, rtol=0)


def check_kept(case: Case) -> None:
    layout, x = _layout(case), case["in_embeds"][None]
    skip, tail = _template(case)
    method = Hawk(
        # The share rounded up, and never fewer than the bound.
        keep=int(case["out_num_visual_kept"]) if case["cfg_min_visual"] > 1 else case["cfg_keep_ratio"],
        weights=tuple(case["in_head_weights"].tolist()),
        normalise=NORMALISE[case["cfg_norm"]],
        skip=skip,
        tail=tail,
    )
    seen: Seen = {Function("query_key", 0): _query_key(case)}
    edit = method.edit(Site("sequence"), x, layout, seen, State())
    after = layout if edit is None else layout.after(edit)

    assert after.visual == (case["out_num_visual_kept"],)
    assert after.origin[0].tolist() == case["out_keep"].tolist()
    assert torch.equal(after.positions[:, 0], case["out_position_ids"])
    assert torch.equal(x[0, after.origin[0]], case["out_embeds"])


def _layout(case: Case) -> Layout:
    ids = case["in_input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    valid = case["in_attention_mask"].bool() if "in_attention_mask" in case else torch.ones_like(visual)
    items = [[Item(1, int((visual & valid).sum()), 0)]]
    return Layout.build((visual & valid)[None], valid[None], case["in_position_ids"][:, None], items)


def _template(case: Case) -> tuple[int, int]:
    """Rows that the code's special tokens leave out in front of the question and behind it."""
    question, asked = _layout(case).question[0].nonzero()[:, 0], case.get("out_queries")
    if asked is None:
        return 0, 0
    return int((question < asked[0]).sum()), int((question > asked[-1]).sum())


def _query_key(case: Case) -> Any:
    width = case["in_embeds"].shape[1] // case["cfg_heads"]

    def function(x: Tensor, layout: Layout, rope: bool = True) -> tuple[Tensor, Tensor]:
        assert not rope
        normed = x * (x.square().mean(-1, keepdim=True) + case["cfg_rms_eps"]).rsqrt() * case["in_norm"]
        query, key = (torch.nn.functional.linear(normed, case[f"in_w{name}"], case[f"in_b{name}"]) for name in ("q", "k"))
        return tuple(made.reshape(*x.shape[:2], -1, width).transpose(1, 2) for made in (query, key))  # type: ignore

    return function
