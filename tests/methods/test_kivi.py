"""KIVI: which entries are packed, in how many bytes, and how far the answers then are from the model's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.methods import KIVI
from foveate.methods.kv_cache.kivi import first_of, packable
from foveate.ops.quantized import Quantized
from tests import tiny
from tests.methods.bodiless import layout, traits
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_whole_groups_are_packed_and_the_window_stays() -> None:
    assert packable([300, 161, 160, 159, 10], 32, 128) == [160, 32, 32, 0, 0]
    assert packable([40], 8, 0) == [40]


def test_the_first_rows_of_each_sample() -> None:
    rows = torch.tensor([[True] * 5, [False, True, True, False, True]])
    index, mask = first_of(rows, [3, 2])

    assert index.tolist() == [[0, 1, 2], [1, 2, -1]]
    assert mask.tolist() == [[True, True, True, False, False], [False, True, True, False, False]]


def test_text_and_pictures_alike_are_packed_from_the_front() -> None:
    before = layout("t" * 4 + "1" * 18 + "tt", "." * 6 + "t" * 18)
    keys, values = random(2, 2, 24, 8), random(2, 2, 24, 8, seed=1)
    made = KIVI(bits=8, size=8, residual=3).pack(0, keys, values, {}, before)
    assert made is not None
    assert isinstance(made.store, Quantized)

    assert made.entries[:, 0].tolist() == [[*range(16)], [*range(6, 14), *[-1] * 8]]
    assert made.rest[:, 0].tolist() == [[-1, -1, *range(16, 24)], [*range(14, 24)]]
    assert made.counts == (8, 10)
    rebuilt = made.store.rebuilt(lambda x, positions: x)
    assert_close(rebuilt[0][0], keys[0, :, :16], atol=0.02, rtol=0)
    assert_close(rebuilt[1][1, :, :8], values[1, :, 6:14], atol=0.02, rtol=0)


def test_a_prompt_no_longer_than_the_window_is_left_alone() -> None:
    before = layout("t" * 40)

    assert KIVI().pack(0, random(1, 2, 40, 8), random(1, 2, 40, 8), {}, before) is None


def test_it_asks_for_nothing() -> None:
    assert KIVI().reads(traits()) == ()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bits": 3}, r"kivi: bits=3: must be 2, 4 or 8"),
        ({"size": 12}, r"kivi: size=12: must be a multiple of 8, such as 32"),
        ({"residual": -1}, r"kivi: residual=-1: must be an integer, 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        KIVI(**parameters)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl", "gemma3"])
def test_the_more_bits_the_nearer_the_answer(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    plain, errors = logits(generate(model, inputs, 2)), []
    for method in (*(KIVI(bits=bits, size=8, residual=0) for bits in (2, 4, 8)), KIVI(residual=100)):  # type: ignore[arg-type]
        with foveate.attach(model, method):
            errors.append((logits(generate(model, inputs, 2))[:, 1] - plain[:, 1]).norm().item())

    assert errors[0] > 4 * errors[1] > 16 * errors[2] > errors[3]
    assert errors[2] < 0.02 * plain[:, 1].norm()
    assert errors[3] < 1e-4


def test_the_report_tells_the_bytes_that_are_held() -> None:
    model = tiny.llava(grid=12)
    ids = torch.tensor([[1, *[tiny.IMAGE] * 144, *range(20, 59)]])
    held = {}
    for method in (KIVI(residual=1000), KIVI(residual=24), replace(KIVI(), residual=24, bits=8)):
        with torch.no_grad(), foveate.attach(model, method) as session:
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, 96, 96))
        held[method.bits, method.residual] = sum(session.report.kv_bytes)
    numbers, layers = 2 * 2 * 12, 4  # keys and values of two heads

    assert held[2, 1000] == layers * 184 * numbers * 4
    # 160 tokens: a quarter of a byte each, two floats for 32 tokens of a key's channel and for 4 channels of a value.
    groups = 2 * 12 * 160 // 32 + 2 * 3 * 160
    assert held[2, 24] == layers * (24 * numbers * 4 + 160 * numbers // 4 + groups * 8)
    assert held[8, 24] == layers * (24 * numbers * 4 + 160 * numbers + groups * 8)
