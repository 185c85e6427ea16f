"""Models that accelerate spreads over devices or keeps on disk: the answer is that of the model in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoModelForImageTextToText

import foveate
from foveate.core.recipe import Recipe
from foveate.models import anatomy
from tests import pretend
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits
from tests.suite.test_experts import Skip

RECIPES = [
    "none",
    "hiprune(keep=9) + fastv(layer=2, keep=5) + snapkv(keep=0.5, window=4)",
    "tome(keep=6) + shortv(layers=(1, 2))",
    "sparsevila(keep=6, decode_keep=0.5)",
    "feather(layers=(1, 3)) + prefixkv(keep=8, search='bisect')",
]
LLAVA = BODIES["llava-clip"]


def spread(model: Any, place: Callable[[int, int], Any], rest: Any) -> dict[str, Any]:
    """A device map: ``place(number, count)`` of each block of the vision tower and of the language model, else ``rest``."""
    parts = anatomy(model)
    stacks = [list(parts.layers), list(parts.encoder.blocks)]
    placed = {id(block): place(number, len(stack)) for stack in stacks for number, block in enumerate(stack)}
    found: dict[str, Any] = {}

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in placed or not any(id(inside) in placed for inside in module.modules()):
            found[name] = placed.get(id(module), rest)
            return
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *module.named_children()]
        for part, inside in own:
            whole = f"{name}.{part}" if name else part
            if isinstance(inside, nn.Module):
                walk(inside, whole)
            else:
                found[whole] = rest

    walk(model, "")
    return found


def halved(model: Any) -> Any:
    """The first half of both stacks on one device that is not there, the second half on another."""
    places = spread(model, lambda number, count: pretend.device(2 * number // count), pretend.device(0))
    return dispatch_model(model, places, main_device=pretend.device(0))


def answer(model: Any, recipe: Recipe | str, inputs: dict[str, torch.Tensor], steps: int = 3) -> torch.Tensor:
    with torch.no_grad(), foveate.attach(model, recipe):
        return logits(generate(model, inputs, steps)).cpu()


def there(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(pretend.device(0)) for name, value in inputs.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_devices_give_the_answer_of_one(recipe: str) -> None:
    inputs = LLAVA.inputs(RAGGED)
    expected = answer(LLAVA.model(attention="eager"), recipe, inputs)
    with pretend.Pretended():
        found = answer(halved(LLAVA.model(attention="eager")), recipe, there(inputs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl_moe", "internvl", "qwen3_5"])
def test_every_kind_of_table_and_mask_crosses_devices(name: str) -> None:
    body = BODIES[name]
    inputs = body.inputs(RAGGED)
    recipe = Recipe.of("uniform(keep=9) + fastv(layer=3, keep=5)" if name != "qwen3_5" else "uniform(keep=9)")
    if name == "qwen3_vl_moe":
        recipe = Recipe((*recipe.methods, Skip(below=0.3)))
    expected = answer(body.model(attention="eager"), recipe, inputs)
    with pretend.Pretended():
        found = answer(halved(body.model(attention="eager")), recipe, there(inputs))
    assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    LLAVA.model().save_pretrained(path)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_partly_on_disk_gives_the_same_answer(recipe: str, folder: Path, tmp_path: Path) -> None:
    inputs = LLAVA.inputs(RAGGED)
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    places = spread(whole, lambda number, count: "cpu" if number % 2 else "disk", "cpu")
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map=places, offload_folder=tmp_path).eval()
    assert next(model.model.language_model.layers[0].parameters()).device.type == "meta"
    assert torch.equal(answer(model, recipe, inputs), answer(whole, recipe, inputs))


def test_a_model_all_on_disk_gives_the_same_answer(folder: Path, tmp_path: Path) -> None:
    inputs = LLAVA.inputs(RAGGED)
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path).eval()
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert torch.equal(answer(model, RECIPES[1], inputs), answer(whole, RECIPES[1], inputs))


def test_tome_leaves_hooked_blocks_as_they_were() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    block = anatomy(model).encoder.blocks[0]
    before = block.forward, block._old_forward
    with foveate.attach(model, "tome(keep=6)"):
        generate(model, inputs, 1)
    assert (block.forward, block._old_forward) == before


def test_tensors_on_two_pretended_devices_do_not_meet() -> None:
    with pretend.Pretended():
        here, elsewhere = torch.ones(2, device=pretend.device(0)), torch.ones(2).to(pretend.device(1))
        with pytest.raises(RuntimeError, match="tensors on lazy:0, lazy:1"):
            here + elsewhere
        with pytest.raises(RuntimeError, match="tensors on cpu, lazy:0"):
            here + torch.ones(2)
        assert (here + elsewhere.to(here.device)).tolist() == [2.0, 2.0]
