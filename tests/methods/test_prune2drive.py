"""Prune2Drive: a rate for each view, views of different size side by side."""

from __future__ import annotations

import torch

import foveate
from foveate import reference, tasks
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import Prune2Drive
from tests.methods.bodiless import layout, traits

LAYER = Site("decoder", 1)


def kept(method: Prune2Drive, *prompts: str) -> list[list[int]]:
    rows = layout(*prompts)
    x = torch.randn(*rows.shape, 8, generator=torch.Generator().manual_seed(0))
    edit = method.edit(LAYER, x, rows, {}, State())
    assert edit is not None
    return [[row for row in sample if row >= 0] for sample in edit.reduction.anchor.tolist()]


def test_each_view_has_its_rate_and_those_beyond_have_keep() -> None:
    (rows,) = kept(Prune2Drive(keep=0.25, rates=(1.0, 0.5)), "t1111222233334444t")

    assert [sum(start <= row < start + 4 for row in rows) for start in (1, 5, 9, 13)] == [4, 2, 1, 1]
    assert {0, 17} <= set(rows)


def test_no_view_disappears() -> None:
    (rows,) = kept(Prune2Drive(rates=(0.0, 0.1)), "t1111222t")

    assert [sum(start <= row < end for row in rows) for start, end in ((1, 5), (5, 8))] == [1, 1]


def test_a_view_gets_in_a_batch_what_it_gets_alone() -> None:
    both = kept(Prune2Drive(keep=2), "t111111t", ".t22223t")
    alone = kept(Prune2Drive(keep=2), "t111111t")

    assert both[0] == alone[0]
    assert [len(rows) for rows in both] == [4, 5]


def test_rates_of_one_change_nothing() -> None:
    rows = layout("t1122t")

    assert Prune2Drive(rates=(1.0, 1.0)).edit(LAYER, torch.randn(1, 6, 4), rows, {}, State()) is None


def test_it_may_act_before_the_language_model() -> None:
    assert Prune2Drive(layer=0).sites(traits()) == (Site("sequence"),)
    assert "rates=(0.5, 2): must be" in _refusal()


def _refusal() -> str:
    try:
        Prune2Drive(rates=(0.5, 2))
    except ValueError as error:
        return str(error)
    return ""


def test_a_rig_of_six_cameras() -> None:
    model, processor = reference.load("reference-qwen")
    views = [question.images[0] for question in tasks.questions("attribute", n=6, seed=0)]
    content = [*({"type": "image", "image": view} for view in views), {"type": "text", "text": "what is there?"}]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    rates = (1.0, 0.5, 0.5, 0.25, 0.25, 0.25)  # the front shows most of what matters
    with foveate.attach(model, Prune2Drive(rates=rates)) as session:
        model.generate(**inputs, max_new_tokens=2)
    before, after = (session.trace.alive(layer)[0] for layer in (0, model.config.get_text_config().num_hidden_layers))

    counts = [len(view) for view in before]
    assert len(counts) == 6
    assert [len(view) for view in after] == [int(count * rate) for count, rate in zip(counts, rates)]
