"""What others put around a model: it runs as the model inside, or is refused with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foveate
from foveate.core.errors import FoveateError
from foveate.engine.calibrate import Calibration
from tests.suite.bodies import BODIES, RAGGED

RECIPE = "fastv(layer=2, keep=5) + shortv(layers=(3,))"


def adapted() -> Any:
    settings = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(BODIES["llava-clip"].model(), settings).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**BODIES["llava-clip"].inputs(RAGGED)).logits


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_adapters_take_part() -> None:
    model = adapted()
    with foveate.attach(model.get_base_model(), RECIPE):
        expected = logits(model)
    with foveate.attach(model, RECIPE):
        assert torch.equal(logits(model), expected)
        with pytest.raises(FoveateError, match="already runs under"):
            foveate.attach(model, RECIPE)
    with model.disable_adapter(), foveate.attach(model, RECIPE):
        assert not torch.allclose(logits(model), expected)


def test_weights_under_an_adapter_are_not_calibrated_on() -> None:
    with pytest.raises(FoveateError, match=r"its query is not made by a plain linear projection.*adapters merged"):
        Calibration(adapted(), []).weight(1, "query")


def test_a_model_in_distributed_training(alone: None) -> None:
    model = BODIES["llava-clip"].model()
    with foveate.attach(model, RECIPE):
        expected = logits(model)
    wrapped = DistributedDataParallel(model)
    with foveate.attach(wrapped, RECIPE):
        assert torch.equal(logits(wrapped), expected)


def prompted() -> nn.Module:
    settings = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=48, num_layers=4, num_attention_heads=4
    )
    return get_peft_model(BODIES["llava-clip"].model(), settings)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (prompted, r"prompt learning .*; attach to its get_base_model\(\)"),
        (lambda: nn.DataParallel(BODIES["llava-clip"].model()), r"model: DataParallel .*; attach to its \.module"),
    ],
)
def test_wrappers_that_do_more_are_refused(build: Any, reason: str) -> None:
    with pytest.raises(FoveateError, match=reason):
        foveate.attach(build(), RECIPE)
