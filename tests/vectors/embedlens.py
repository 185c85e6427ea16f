"""EmbedLens: which tokens match a word, what is left without them, and as many others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from foveate.bench.probes.embedlens import Without, as_many_others
from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Function, Site
from foveate.core.state import State
from foveate.methods import EmbedLens
from foveate.ops.vocabulary import Vocabulary, matching, nearest
from tests.vectors import Case


def check_matching(case: Case) -> None:
    matched = _matched(case)

    assert matched.nonzero()[:, 0].tolist() == case["out_cluster"].tolist() == case["out_removed"].tolist()
    assert (_visual(case) & ~matched).nonzero()[:, 0].tolist() == case["out_inverse_removed"].tolist()


def check_what_is_left(case: Case) -> None:
    x, vocabulary, visual = case["in_embeds"][None], case["in_vocab"], _visual(case)[None]
    words, top_k = tuple(case["cfg_target_ids"].tolist()), case["cfg_top_k"]
    layout = Layout.build(
        visual, torch.ones_like(visual), torch.arange(x.shape[1])[None, None], [[Item(1, int(visual.sum()), 0)]]
    )
    state = State()
    state.put("session", "traits", SimpleNamespace(fingerprint=SimpleNamespace(vocabulary=len(vocabulary))))
    for method in (EmbedLens(ids=words, top_k=top_k), Without(words, top_k)):
        edit = method.edit(Site("sequence"), x, layout, {Function("embedding"): vocabulary.__getitem__}, state)
        after = layout if edit is None else layout.after(edit)

        assert after.positions[0, 0].tolist() == case["out_position_ids"].tolist()
        assert torch.equal(x[:, after.origin[0]][0], case["out_embeds"])


def check_as_many_others(case: Case) -> None:
    matched, visual = _matched(case), _visual(case)
    if not matched.any():
        pytest.skip("the published control removes everything where nothing matches; ours removes as many as matched")
    others = (visual & ~matched).nonzero()[:, 0]
    drawn = others[case["in_perm"][case["in_perm"] < len(others)]]
    scores = torch.zeros(len(visual)).index_put((drawn,), torch.arange(len(drawn), 0.0, -1.0))

    removed = as_many_others(matched[None], visual[None], scores[None])[0]

    assert removed.nonzero()[:, 0].tolist() == sorted(case["out_control_removed"].tolist())


def _visual(case: Case) -> Tensor:
    first, end = case["cfg_visual_span"].tolist()
    place = torch.arange(len(case["in_embeds"]))
    return (place >= first) & (place < end)


def _matched(case: Case) -> Tensor:
    """Rows of the prompt that are visual and have a target among their nearest words."""
    ids = nearest(case["in_embeds"], Vocabulary(case["in_vocab"].__getitem__, len(case["in_vocab"])), case["cfg_top_k"])
    return matching(ids, case["cfg_target_ids"].tolist()) & _visual(case)
