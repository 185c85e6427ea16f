"""Two fine-tunes of one shape are told apart; one checkpoint is itself, in whatever dtype and wherever it lies."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import foveate
from foveate import reference
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.engine.calibrate import calibrate
from foveate.models import anatomy
from foveate.models.sketch import sketch
from tests.suite.bodies import BODIES, RAGGED

BODY = BODIES["llava-clip"]


@pytest.fixture(scope="module")
def order() -> Artifact:
    """Layers of the body, least contributing first."""
    return calibrate("shortv", BODY.model(), [BODY.inputs(RAGGED)])


def hosted(model: Any, artifact: Artifact) -> None:
    foveate.attach(model, "shortv(frozen=2)", artifacts=[artifact]).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_model_is_the_same(order: Artifact, dtype: torch.dtype) -> None:
    hosted(BODY.model().to(dtype), order)


def test_numbers_made_in_one_dtype_fit_the_others() -> None:
    order = calibrate("shortv", BODY.model().bfloat16(), [_cast(BODY.inputs(RAGGED), torch.bfloat16)])
    hosted(BODY.model(), order)
    hosted(BODY.model().half(), order)


@pytest.mark.parametrize("layer", range(4))
def test_a_fine_tune_of_one_layer_is_another_model(order: Artifact, layer: int) -> None:
    model = BODY.model()
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in anatomy(model).layers[layer].mlp.parameters():
            parameter *= 1 + 0.01 * torch.randn(parameter.shape, generator=generator)
    with pytest.raises(FoveateError, match=rf"other weights.*, as layers\.{layer}\.mlp\..* shows; calibrate"):
        hosted(model, order)


def test_a_fine_tuned_projector_is_another_model(order: Artifact) -> None:
    model = BODY.model()
    with torch.no_grad():
        next(anatomy(model).encoder.projector.parameters()).mul_(1.01)
    with pytest.raises(FoveateError, match=r"as projector.* shows; calibrate it again"):
        hosted(model, order)


def test_adapters_make_another_model_until_they_are_merged_without_a_trace(order: Artifact) -> None:
    wrapped = get_peft_model(BODY.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(FoveateError, match=r"made on a model without .*q_proj.*; merge adapters, or calibrate it again"):
        hosted(wrapped, order)
    hosted(wrapped, calibrate("shortv", wrapped, [BODY.inputs(RAGGED)]))

    hosted(wrapped.merge_and_unload(), order)  # untrained, they change nothing
    trained = get_peft_model(BODY.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(FoveateError, match=r"q_proj\.weight shows"):
        hosted(trained.merge_and_unload(), order)


def test_what_is_on_disk_is_not_compared_and_not_calibrated_on(order: Artifact, tmp_path: Path) -> None:
    model = BODY.model()
    with torch.no_grad():
        anatomy(model).layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path)
    places = {"": "disk"}
    away = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "away").eval()

    assert set(anatomy(away).weights) == set(anatomy(model).weights)
    assert not any(anatomy(away).weights.values())
    hosted(away, order)
    with pytest.raises(FoveateError, match="offloaded; calibrate on a model loaded without offloading"):
        calibrate("shortv", away, [BODY.inputs(RAGGED)])


class Quantized(nn.Module):
    """A linear layer in eight bits."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", whole.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((whole.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T.to(x.dtype)


def test_what_is_quantized_is_not_compared(order: Artifact) -> None:
    model = BODY.model()
    for layer in anatomy(model).layers:
        layer.mlp.up_proj = Quantized(layer.mlp.up_proj)
    hosted(model, order)

    with torch.no_grad():
        anatomy(model).layers[1].input_layernorm.weight.mul_(1.1)
    with pytest.raises(FoveateError, match=r"layers\.1\.input_layernorm\.weight shows"):
        hosted(model, order)


@pytest.mark.parametrize("folder", map(reference.path, reference.MODELS), ids=str)
def test_shipped_numbers_are_those_of_the_shipped_weights(folder: Path) -> None:
    parts = anatomy(AutoModelForImageTextToText.from_pretrained(folder))
    shipped = sorted((folder / "foveate").glob("*.json"))

    assert shipped
    for path in shipped:
        found = Artifact.load(path).fingerprint
        assert found.weights
        assert found.unlike(parts.traits().fingerprint) is None


class Copies(TorchDispatchMode):
    """Counts the numbers that operations make which do not stay in the storage they were given."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.made += out.numel()
        return out


def test_only_the_entries_are_copied() -> None:
    part = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)))
    with Copies() as copies:
        found = sketch({"part": part})

    assert len(found) == 20
    assert copies.made <= 3 * sum(map(len, found.values()))


def test_it_is_read_in_no_time() -> None:
    parts = {f"layers.{number}": layer for number, layer in enumerate(anatomy(BODY.model()).layers)}
    seconds = []
    for _ in range(10):
        start = perf_counter()
        sketch(parts)
        seconds.append(perf_counter() - start)

    assert min(seconds) < 0.005


def _cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
