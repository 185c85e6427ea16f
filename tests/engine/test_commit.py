"""``Session.commit``: floats go for good, answers stay, and nothing takes what is left for a model."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError
from foveate.engine.quantize import quantize
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits

RECIPE = "rtn(bits=4) + hiprune(keep=4) + snapkv(keep=0.5, window=4)"


def held(model: torch.nn.Module) -> int:
    """Bytes of all parameters, each place once."""
    stores = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in model.parameters()}
    return sum(stores.values())


@pytest.mark.parametrize(("name", "method"), [("llava-clip", "rtn(bits=4)"), ("qwen2_5_vl", "dasq(bits=3)")])
def test_floats_go_and_answers_stay(name: str, method: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    artifact = quantize(model, method)
    recipe = f"{method} + uniform(keep=4) + snapkv(keep=0.5, window=4)"
    session = foveate.attach(model, recipe, artifacts=[artifact])
    before, size = logits(generate(model, inputs, 4)), held(model)

    with session:
        freed = session.commit()
        assert session.commit() == 0
    assert session.committed
    assert session.attached
    gc.collect()
    assert freed == artifact.numbers["size"]["weights"] * 4
    assert held(model) == pytest.approx(size - freed, abs=4 * 8 * 8 * 4)
    assert torch.equal(logits(generate(model, inputs, 4)), before)
    assert session.report.weights == artifact.numbers["size"]["weights"]


def test_what_is_left_is_no_model(tmp_path: Path) -> None:
    body = BODIES["llava-clip"]
    model: Any = body.model()
    session = foveate.attach(model, RECIPE, artifacts=[quantize(model, "rtn(bits=4)")])
    session.commit()
    for act, words in (
        (session.detach, "cannot be given back"),
        (lambda: copy.deepcopy(model), "cannot be copied"),
        (lambda: model.save_pretrained(tmp_path), "cannot be saved"),
        (lambda: torch.save(model.state_dict(), tmp_path / "weights.pt"), "cannot be saved"),
        (lambda: quantize(model, "rtn(bits=4)"), "self_attn.q_proj was given up"),
    ):
        with pytest.raises(FoveateError, match=f"{words}.*load the model again") as raised:
            act()
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert session.attached


def test_it_is_refused_where_nothing_can_be_let_go() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    plain = model(**inputs).logits
    with foveate.attach(model, "hiprune(keep=4)") as session, pytest.raises(FoveateError, match="replaces no weights"):
        session.commit()
    artifact = quantize(model, "rtn(bits=4)")
    with foveate.attach(model, "rtn(bits=4)", artifacts=[artifact]) as session:
        pass
    with pytest.raises(FoveateError, match="the session is detached; commit while it is at work"):
        session.commit()
    session.detach()
    assert torch.equal(model(**inputs).logits, plain)
