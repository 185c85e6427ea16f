"""What a person reads after a request."""

from __future__ import annotations

import json
from dataclasses import fields, replace

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
    first_token_seconds=2.0,
    total_seconds=2.625,
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


def test_a_report_says_everything_on_eight_lines() -> None:
    assert str(REPORT).splitlines() == [
        "recipe         fastv(keep=0.5)",
        "visual tokens  64 -> 64 (layers 0-1), 32 (layer 2)",
        "rows           80 (layers 0-1), 48 (layer 2) (32 visual in the last layer)",
        "KV cache       2.50 MiB (60-100 % of the tokens so far)",
        "workspace      1.50 MiB at most",
        "prefill FLOPs  7.5e+09 (25.0% saved)",
        "seconds        encode 0.5000, prefill 1.2500 (methods 0.1250, engine 0.0625), per token 0.1250",
        "from entry     first token 2.0000 s, whole answer 2.6250 s (1 at once, 8.0 tokens/s)",
    ]


def test_layers_that_were_left_out_are_said() -> None:
    assert str(replace(REPORT, layers=0.625)).splitlines()[6] == "layers         62.5% ran for what predicts a token"


def test_experts_that_did_not_run_are_said() -> None:
    assert str(replace(REPORT, experts=0.375)).splitlines()[6] == "experts        37.5% of those chosen ran"


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


def test_a_report_is_a_line_a_table_and_data() -> None:
    assert repr(REPORT) == "<Report of fastv(keep=0.5): visual tokens 64 -> 32, 25.0% of prefill FLOPs saved>"
    assert repr(NOTHING) == "<Report of none: visual tokens 0 -> 0, 0.0% of prefill FLOPs saved>"
    table = replace(REPORT, recipe="a <b>")._repr_html_()
    assert table.count("<tr>") == len(str(REPORT).splitlines())
    assert '<td style="text-align:left">a &lt;b&gt;</td>' in table
    said = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert set(said) == {field.name for field in fields(REPORT)}
    assert (said["kv_bytes"], said["recipe"]) == ([2**20, 2**20, 2**19], "fastv(keep=0.5)")


def test_a_trace_is_a_line_and_data() -> None:
    before = layout(2, 3)
    after = before.after(Edit(Reduction.gather(torch.tensor([[1, 4]]), 6)))
    trace = Trace(log=[[before, after, after]])

    assert repr(trace) == "<Trace of 2 layers: visual tokens 6 (layer 0), 2 (layers 1-2)>"
    assert json.loads(json.dumps(trace.to_dict())) == {
        "grids": [[[2, 3]]],
        "alive": [[[[0, 1, 2, 3, 4, 5]]], [[[1, 4]]], [[[1, 4]]]],
    }
    assert repr(Trace()) == "<Trace of nothing>"
    assert Trace().to_dict() == {"grids": [], "alive": []}
