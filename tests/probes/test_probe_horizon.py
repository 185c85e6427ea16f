"""The information horizon: windows, what they say, and layers that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import generate, logits
from tests.suite.oracle import masked_logits, noting, short_logits

import foveate
from foveate.bench.probes import horizon
from foveate.bench.probes.horizon import Leave, first_below, information, question_information, window_count, window_of
from foveate.checkpoint import Checkpoint
from foveate.tasks import questions

each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


class Bodily(Checkpoint):
    """A tiny model that sees its body's own picture, whatever it is shown."""

    def inputs(self, pictures: Any, prompts: Any) -> dict[str, torch.Tensor]:
        return BODIES[self.name].inputs(ONE)


@pytest.mark.parametrize(("x", "y", "tokens"), [(1, 2, [8, 9, 12, 13]), (2, 1, [2, 3, 6, 7])])
def test_windows_of_the_card(x: int, y: int, tokens: list[int]) -> None:
    across = 2

    assert (window_of(4, 4, 2) == (y - 1) * across + x - 1).nonzero()[:, 0].tolist() == tokens


def test_windows_at_the_border_may_be_smaller() -> None:
    assert window_of(3, 5, 2).view(3, 5).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert window_count([(3, 5), (1, 1)], 2) == 7


def test_information_of_the_card() -> None:
    found = information(torch.tensor([[0.0, 2.0, 0.0]]), torch.zeros(3), label=1)

    assert found.tolist() == pytest.approx([0.453653], abs=1e-6)


@pytest.mark.parametrize(
    ("values", "layer"),
    [
        ([0.40, 0.22, 0.05, 0.004, 0.003, 0.001], 3),
        ([0.4, 0.004, 0.2, 0.001], 3),
        ([0.001, 0.0], 0),
        ([0.0, 0.02], None),
        ([-0.5, -0.1], 0),
    ],
)
def test_the_horizon_is_where_it_stays_below(values: list[float], layer: int | None) -> None:
    assert first_below(values, 0.01) == layer


@each_body
@pytest.mark.parametrize("windows", [(), (1, 0, 2)], ids=["nothing", "a window"])
def test_what_leaves_is_gone_from_its_layer_on(body: Body, windows: tuple[int, ...]) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    with noting() as notes, foveate.attach(model, Leave(2, windows)) as session:
        output = generate(model, inputs, 4)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    if session.anatomy.traits().recurrent:
        expected = short_logits(model, whole, session.trace, notes)
    else:
        expected = masked_logits(model, whole, session.trace, (0,), notes)

    alive = [sum(map(len, sample)) for sample in session.trace.alive(2)]
    assert session.trace.alive(1)[0][0].tolist() == list(range(body.views[0]))
    assert alive == ([4, 4, 4] if windows else [0, 0, 0])
    torch.testing.assert_close(logits(output), expected[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


def test_only_the_window_goes_when_it_is_inverted() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with foveate.attach(model, Leave(1, (3,), invert=True)) as session:
        model(**body.inputs(ONE))

    assert session.trace.alive(1)[0][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13]


@each_body
def test_a_window_of_the_whole_picture_says_all_of_it(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horizon, "first_answer_token", lambda checkpoint, question: 20)
    checkpoint, (question,) = Bodily(body.name, body.model(), None), questions("shape", 1, 0)

    found = question_information(checkpoint, question, batch_size=8, size=99)
    without = question_information(checkpoint, question, batch_size=8, size=99, leave_one_out=True)

    assert len(found.whole) == checkpoint.layers
    assert any(value != 0 for value in found.whole)
    if len(body.views) == 1:
        assert found.largest == pytest.approx([abs(value) for value in found.whole], abs=1e-5)
        assert without.largest == pytest.approx(found.largest, abs=1e-5)


def test_windows_do_not_depend_on_how_many_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horizon, "first_answer_token", lambda checkpoint, question: 20)
    body = BODIES["qwen2_5_vl"]
    checkpoint, (question,) = Bodily(body.name, body.model(), None), questions("shape", 1, 0)

    one, all_of_them = (question_information(checkpoint, question, batch_size=size) for size in (1, 8))

    assert one.largest == pytest.approx(all_of_them.largest, abs=1e-5)
    assert one.mean == pytest.approx(all_of_them.mean, abs=1e-5)
    assert all(average <= largest for average, largest in zip(one.mean, one.largest))
