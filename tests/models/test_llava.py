"""Which block of the encoder the projector is fed by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError
from foveate.models import anatomy
from tests.suite.bodies import BODIES, ONE


def fed_by(body: str, feature_layer: Any) -> Any:
    model = BODIES[body].model()
    model.config.vision_feature_layer = feature_layer
    return model


@pytest.mark.parametrize("body", ["llava-clip", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("layer", [-1, -2, 3])
def test_a_list_of_one_feature_layer_is_that_layer(body: str, layer: int) -> None:
    inputs = BODIES[body].inputs(ONE)
    answers = []
    for named in (layer, [layer]):
        with foveate.attach(fed_by(body, named), "hiprune(keep=6)") as session, torch.no_grad():
            answers.append((session.anatomy.encoder.feature_layer, session.anatomy.model(**inputs).logits))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize("layers", [[-1, -2], [], 0, -5, [5]])
def test_other_than_the_output_of_one_block_is_refused(layers: Any) -> None:
    with pytest.raises(FoveateError, match="vision_feature_layer="):
        anatomy(fed_by("llava-clip", layers))
