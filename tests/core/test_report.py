"""What a person reads after a request."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.report import Report, Trace
from foveate.core.roles import Item

REPORT = Report(
    recipe="fastv(keep=0.5)",
    idle=(),
    largest_grid=64,
    samples=1,
    original_visual_tokens=64.0,
    visual_tokens=(64.0, 64.0, 32.0),
    rows=(80.0, 80.0, 48.0),
    active=(80.0, 80.0, 48.0),
    kv_bytes=(2**20, 2**20, 2**19),
    kv_kept=(1.0, 1.0, 0.6),
    workspace=3 * 2**19,
    encode_seconds=0.5,
    prefill_seconds=1.25,
    decode_seconds=0.5,
    decode_steps=4,
    signal_seconds=0.25,
    method_seconds=0.125,
    engine_seconds=0.0625,
    flops=7.5e9,
    flops_unmodified=1e10,
)

NOTHING = replace(
    REPORT,
    recipe="none",
    samples=0,
    original_visual_tokens=0.0,
    visual_tokens=(),
    rows=(),
    active=(),
    kv_bytes=(),
    kv_kept=(),
    workspace=0,
    decode_steps=0,
    flops=0.0,
    flops_unmodified=0.0,
)


def layout(rows: int, columns: int) -> Layout:
    visual = torch.ones(1, rows * columns, dtype=torch.bool)
    return Layout.build(visual, visual, torch.arange(rows * columns)[None, None], [[Item(rows, columns, 0)]])


def test_a_report_says_everything_on_seven_lines() -> None:
    assert str(REPORT).splitlines() == [
        "recipe         fastv(keep=0.5)",
        "visual tokens  64 -> 64 (layers 0-1), 32 (layer 2)",
        "rows           80 (layers 0-1), 48 (layer 2) (32 visual in the last layer)",
        "KV cache       2.50 MiB (60-100 % of the tokens so far)",
        "workspace      1.50 MiB at most",
        "prefill FLOPs  7.5e+09 (25.0% saved)",
        "seconds        encode 0.5000, prefill 1.2500 (methods 0.1250, engine 0.0625), per token 0.1250",
    ]


def test_a_method_that_changed_nothing_is_named() -> None:
    *_, line = str(replace(REPORT, idle=("fastv(keep=64)",))).splitlines()

    assert line.startswith("idle           fastv(keep=64) changed nothing of the prompt (64 visual tokens, no more than 64")


def test_equal_layers_are_said_once() -> None:
    assert "64 -> 64\n" in str(replace(REPORT, visual_tokens=(64.0, 64.0, 64.0)))


def test_a_report_before_any_request_prints() -> None:
    assert "visual tokens  0 -> -" in str(NOTHING)


def test_a_trace_says_who_entered_each_layer() -> None:
    before = layout(2, 3)
    after = before.after(Edit(Reduction.gather(torch.tensor([[1, 4]]), 6)))
    trace = Trace(log=[[before, after, after]])

    assert [alive.tolist() for (alive,) in (trace.alive(0)[0], trace.alive(2)[0])] == [[0, 1, 2, 3, 4, 5], [1, 4]]
    assert trace.grids == [[(2, 3)]]


def test_of_a_prompt_in_parts_the_last_one_with_images_is_shown() -> None:
    trace = Trace(log=[[layout(1, 2)], [layout(3, 1)]])

    assert trace.alive(0)[0][0].tolist() == [0, 1, 2]
    assert trace.grids == [[(3, 1)]]


def test_a_trace_of_nothing_is_empty() -> None:
    assert Trace().alive(0) == []
    assert Trace().grids == []
