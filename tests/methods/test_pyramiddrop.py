"""PyramidDrop: the card's worked example and its counts."""

from __future__ import annotations

import torch

from foveate.core.signal import Function, Site
from foveate.core.state import State
from foveate.methods import PyramidDrop
from foveate.ops.select import top_rows
from tests.methods.bodiless import LLAVA_13B, layout, traits
from tests.methods.llama import random_query_key


def test_the_worked_example() -> None:
    rows = torch.tensor([[0.2, 0.1, 0.05, 0.3, 0.05, 0.1, 0.1, 0.1], [0.1, 0.3, 0.05, 0.1, 0.15, 0.05, 0.15, 0.1]])
    prompt = layout("tt1111tt")
    edit = prompt.keeping(top_rows(rows.mean(0)[None], prompt.rows(2), (2,)), (2,), "contiguous")

    assert edit.reduction.anchor.tolist() == [[0, 1, 3, 4, 6, 7]]
    assert prompt.after(edit).positions[0].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_stages_of_other_depths() -> None:
    assert PyramidDrop().fitted(traits()).layers == (8, 16, 24)
    assert PyramidDrop().fitted(traits(LLAVA_13B, decoder_layers=40)).layers == (10, 20, 30)
    assert "one for each of layers=(8, 16, 24)" in str(PyramidDrop(ratios=(0.5,)).check(traits()))


def test_counts_are_shares_of_the_original_ones() -> None:
    prompt = layout("t" + "1" * 16 + "tt")
    method = PyramidDrop(layers=(1, 2, 3), ratios=(0.5, 0.25, 0.0))
    counts = []
    for layer in (1, 2, 3):
        x = torch.randn(*prompt.shape, 8, generator=torch.Generator().manual_seed(layer))
        seen = {Function("query_key", layer): random_query_key(8)}
        edit = method.edit(Site("decoder", layer), x, prompt, seen, State())
        assert edit is not None
        prompt = prompt.after(edit)
        counts.append(prompt.visual[0])

    assert counts == [8, 4, 0]
    assert prompt.positions[0].tolist() == [[0, 1, 2]]
