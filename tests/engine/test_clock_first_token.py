"""From entering the model to the first token's logits, and to the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foveate
from foveate.models import anatomy
from tests.suite.bodies import BODIES, RAGGED

BODY = BODIES["llava-clip"]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, torch.Tensor], list[float]]:
    """A model whose encoder takes long by a clock of its own, and so does each forward of the head."""
    model, clock = BODY.model(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def take(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            clock[0] += seconds

        return hook

    anatomy(model).vision.register_forward_hook(take(100.0))
    model.lm_head.register_forward_hook(take(10.0))
    anatomy(model).layers[0].register_forward_hook(take(1.0))
    return model, BODY.inputs(RAGGED), clock


@pytest.mark.parametrize(
    ("recipe", "options"), [("none", {}), ("fastv(layer=1, keep=3)", {}), ("uniform(keep=3)", {"prefill_chunk_size": 99})]
)
def test_encoder_and_head_are_in_the_time_to_the_first_token(slow: Any, recipe: str, options: dict[str, Any]) -> None:
    model, inputs, _ = slow
    with foveate.attach(model, recipe) as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=-1, **options)

    assert (session.report.first_token_seconds, session.report.total_seconds) == (111, 133)


def test_a_loop_of_the_caller_s_own_counts_its_calls(slow: Any) -> None:
    model, inputs, clock = slow
    with foveate.attach(model, "none") as session, torch.no_grad():
        out = model(**inputs)
        clock[0] += 1000.0  # the caller's own time
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["attention_mask"][:, :1])], dim=1)
        ids = out.logits[:, -1:].argmax(-1)
        model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)

    assert (session.report.first_token_seconds, session.report.total_seconds) == (111, 122)
