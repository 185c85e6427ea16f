"""What a sample keeps, and is answered, in a batch is what it keeps alone: padding is never asked and never asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.method import Method
from tests.suite.bodies import Body, Sample
from tests.suite.kept import kept
from tests.suite.pairs import HOSTED, READ, artifacts, parts

SAMPLES: list[Sample] = [(3, 1, 40), (2, 0, 9), (2, 1, 2), (1, 2, 12)]
"""One longer than the windows below, one without a picture, one with few words: both shorter than windows and budgets."""
BATCHES = ([0, 1], [1, 0], [2, 0, 1, 3])


def roomier(method: Method) -> list[Method]:
    """The method, and with a window and a budget that are larger than the short samples."""
    if hasattr(method, "window"):
        return [method, replace(method, window=32), replace(method, window=32, keep=30)]
    if hasattr(method, "search"):  # a budget of entries
        return [method, replace(method, keep=30)]
    return [method]


CASES = [
    pytest.param(fits, param.values[1], id=f"{param.values[1].name}-{fits}", marks=param.marks)
    for param in [*HOSTED, *READ]
    for fits in roomier(param.values[0])
]


def padded(body: Body, samples: list[Sample], on: str) -> tuple[dict[str, Tensor], list[range]]:
    """Inputs that are padded on one side, in double precision, and the columns of each sample."""
    inputs = body.inputs(samples)
    counts, width = inputs["attention_mask"].sum(1).tolist(), inputs["attention_mask"].shape[1]
    if on == "right":
        for key in ("input_ids", "attention_mask", *([body.type_key] if body.type_key else [])):
            inputs[key] = torch.stack([row.roll(count - width) for row, count in zip(inputs[key], counts)])
    if parts(body).rotary_rows == 1:  # as generate numbers them; other families do so themselves
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    columns = [range(count) if on == "right" else range(width - count, width) for count in counts]
    return double(inputs), columns


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize(("method", "body"), CASES)
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(method: Method, body: Body) -> None:
    model = body.model().double()

    def shown(session: Any, inputs: dict[str, Tensor], columns: list[range]) -> list[Any]:
        with torch.no_grad():
            output = model(**inputs, use_cache=True)
        assert output.logits.isfinite().all()
        cache = output.past_key_values
        return [(kept(session, cache, i, c), output.logits[i, c.stop - 1]) for i, c in enumerate(columns)]

    with foveate.attach(model, method, artifacts=artifacts(body)) as session:
        for batch in BATCHES:
            samples = [SAMPLES[place] for place in batch]
            alone = []
            for place in range(len(samples)):
                inputs = double(body.inputs(samples, only=place))
                alone += shown(session, inputs, [range(inputs["input_ids"].shape[1])])
            for side in ("left", "right"):
                together = shown(session, *padded(body, samples, side))
                for sample, mine, apart in zip(samples, together, alone):
                    assert mine[0] == apart[0], (side, batch, sample)
                    torch.testing.assert_close(mine[1], apart[1], rtol=1e-6, atol=1e-6)
