"""A specimen of every family stands in for it where only shapes count."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from foveate.core.errors import FoveateError
from foveate.engine.hosting import by_family, verdicts
from foveate.models import anatomy
from foveate.models.specimens import FAMILIES, specimen
from foveate.report.hosting_table import WORKS, marks, reasons
from tests import tiny


def test_there_is_one_of_every_supported_family() -> None:
    with pytest.raises(FoveateError) as refused:
        anatomy(nn.Linear(1, 1))

    assert set(re.split(r",? ", str(refused.value).partition("families: ")[2])) - {"several"} == set(
        FAMILIES
    )  # the suite's own


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_of_its_family_and_runs(family: str) -> None:
    model = specimen(family)
    traits = anatomy(model).traits()

    assert (traits.family, traits.decoder_layers, traits.encoder_layers) == (family, 8, 8 if traits.sees else None)
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[1, 20, 21]])).logits.isfinite().all()


def test_hybrids_keep_their_pattern() -> None:
    assert anatomy(specimen("gemma3")).traits().sliding == (0, 1, 2, 3, 4, 6, 7)
    assert anatomy(specimen("qwen3_5")).traits().recurrent == (0, 1, 2, 4, 5, 6)


def test_the_matrix_says_what_attach_says() -> None:
    found = {(each.method, each.model): each.reason for each in by_family()}

    assert found["uniform", "llava"] is None
    assert found["hidrop", "gemma3"] == (
        "decoder layer 0 has sliding attention, which rows cannot leave and come back to; choose full-attention layers"
    )
    assert {model for method, model in found if method == "fastv"} == set(FAMILIES)


def test_an_artifact_that_is_not_there_is_one_reason_for_all() -> None:
    found = verdicts({"a": tiny.llava(), "b": tiny.internvl()})
    (reason,) = {each.reason for each in found if each.method == "shortv"}

    assert reason is not None
    assert reason.startswith("no layer order is known for this model; run `foveate calibrate shortv`")
    assert reasons(found)[reason] == ["shortv"]
    number = 1 + list(reasons(found)).index(reason)
    assert marks(found)["shortv"] == [str(number)] * 2
    assert marks(found)["uniform"] == [WORKS] * 2
