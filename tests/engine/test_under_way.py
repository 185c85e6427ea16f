"""A session's report while a request is being made."""

from __future__ import annotations

from typing import Any

from transformers import StoppingCriteria

import foveate
from foveate import reference, tasks


class Ask(StoppingCriteria):
    """Asks the session after each token."""

    def __init__(self, session: foveate.Session) -> None:
        self.session = session
        self.reports: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        self.reports.append(self.session.under_way)
        return input_ids.new_zeros(len(input_ids), dtype=bool)


def test_what_a_request_has_cost_is_known_from_its_first_token_on() -> None:
    model, processor = reference.load()
    question = tasks.questions("attribute", n=1, seed=0)[0]
    inputs = processor(images=question.image, text=f"<user><image> {question.prompt}<assistant>", return_tensors="pt")
    with foveate.attach(model, "hiprune(keep=36)") as session:
        ask = Ask(session)

        model.generate(**inputs, max_new_tokens=3, stopping_criteria=[ask])

        assert ask.reports
        assert {(report.original_visual_tokens, report.visual_tokens[-1]) for report in ask.reports} == {(144, 36)}
        assert session.under_way is None
