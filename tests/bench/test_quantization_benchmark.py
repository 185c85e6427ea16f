"""The benchmark of quantized models: copies with outliers compute the same, and every method has its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.quantization import MODELS, SETTINGS, Cell, Kept, cells, method_of, variants
from benchmarks.quantization_page import page
from benchmarks.sick import sick
from tests.suite.bodies import BODIES, RAGGED

from foveate.core import registry
from foveate.core.weights import Weights
from foveate.models import anatomy


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_sick_copies_compute_the_same_with_outliers(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = sick(model, [inputs], 100.0)
    torch.testing.assert_close(copied(**inputs).logits, model(**inputs).logits, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def largest(of: torch.nn.Module, layer: int, linear: str) -> float:
        """Of the mean magnitudes of a linear's inputs, the largest over the median."""
        seen: list[torch.Tensor] = []
        found = anatomy(of).layers[layer].get_submodule(linear)
        handle = found.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten(0, -2).mean(0)))
        of(**inputs)
        handle.remove()
        return float((seen[0].amax() / seen[0].median()).detach())

    for linear in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        assert largest(copied, 1, linear) > 10 * largest(model, 1, linear)
        assert largest(copied, 0, linear) == pytest.approx(largest(model, 0, linear), rel=1e-3)


def test_every_method_that_replaces_weights_is_measured_and_shown() -> None:
    names = {name for name, kind in registry.methods().items() if issubclass(kind, Weights)}
    assert {kind.name for _, kind in variants()} == names
    every = list(dict.fromkeys(cells(MODELS)))
    assert {cell.method.partition("(")[0] for cell in every} == names
    for cell in every:
        method = method_of(cell.method, cell.setting)
        assert method is not None
        assert method.bits == SETTINGS[cell.setting]["bits"]
        assert method.symmetric
    record = {"kl": [0.1, 0.3], "same": [1.0, 0.5], "right": [1.0, 0.0], "spent": 3.0, "bits": 2.2, "exact": 1.0}
    two = [cell for cell in every if (cell.model, cell.sick, cell.setting) == (MODELS[0], True, "W2") and cell.seed < 2]
    text = page({"cells": {cell.key: record for cell in two}, "speed": []}, tuple(SETTINGS))
    for text_of, _ in {row for row in variants() if method_of(row[0], "W2") is not None}:
        assert f"| `{text_of}` | **0.20** [" in text
    assert "| 75 / 50 |" in text


def test_at_a_glance_each_stands_beside_plain_rounding() -> None:
    def record(kl: float) -> dict[str, object]:
        return {"kl": [kl], "same": [1.0], "right": [1.0], "spent": 3.0, "bits": 2.2, "exact": 1.0}

    kls = {
        "rtn(clip=True)": (0.1, 0.4),
        "gptq": (0.05, 0.05),
        "awq": (0.0, 0.0),
        "dasq(density=0.0)": (1.0,),
        "dasq": (0.5,),
    }
    measured = {
        Cell(model, False, method, "W2", 0).key: record(kl)
        for method, of_models in kls.items()
        for model, kl in zip(MODELS, of_models, strict=False)
    }
    text = page({"cells": measured, "speed": []}, tuple(SETTINGS))
    glance = text[text.index("## At a glance") : text.index(f"## `{MODELS[1]}`")]
    assert "| `gptq` | 0.25 |" in glance  # of 1/2 and 1/8
    assert "| `awq` | **0.001** |" in glance
    assert "| `dasq` | **0.5** |" in glance
    assert "`rtn(clip=True)` |" not in glance


def test_records_of_several_commands_stay(tmp_path: Path) -> None:
    kept, other = (Kept(tmp_path / "records.json") for _ in range(2))
    kept.add("one", {"kl": [0.0]})
    other.add("two", {"kl": [1.0]})
    kept.add("three", {"kl": [2.0]})
    assert list(kept.content["cells"]) == ["one", "two", "three"]
    assert json.loads(kept.path.read_text())["speed"] == []
    assert [path.name for path in kept.path.parent.iterdir()] == ["records.json"]
