"""What a person sees of a session at a prompt and in a notebook, and what a program does."""

from __future__ import annotations

import json

import foveate
from tests.suite.bodies import BODIES, ONE


def test_a_session_says_what_runs_where() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with foveate.attach(model, "fastv(layer=1, keep=5)") as session:
        assert repr(session) == "<Session on llava: fastv(layer=1, keep=5), attached>"
        json.dumps(session.to_dict())  # before any request, too
        session._repr_html_()
        model(**body.inputs(ONE))
    assert repr(session) == "<Session on llava: fastv(layer=1, keep=5), detached>"
    told = json.loads(json.dumps(session.to_dict(), allow_nan=False))
    assert (told["model"], told["recipe"], told["attached"]) == ("llava", "fastv(layer=1, keep=5)", False)
    assert told["report"] == json.loads(json.dumps(session.report.to_dict()))
    assert "LlavaForConditionalGeneration" in session._repr_html_()
    assert "tensor" not in repr(session) + repr(session.report) + repr(session.trace) + session._repr_html_()
