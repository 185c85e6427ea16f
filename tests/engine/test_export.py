"""Checkpoints of compressed-tensors that transformers loads without Foveate, and what is refused instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import foveate
from foveate import checkpoint, tasks
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.weights import Replaced
from foveate.engine.export import export, refuse_export
from foveate.engine.linears import linears_of, tensors_of
from foveate.engine.quantize import quantize
from foveate.methods import RTN
from foveate.ops.grid import Grid
from tests.suite.bodies import BODIES, RAGGED

pytest.importorskip("compressed_tensors")


@torch.no_grad()
def both(model: Any, artifact: Artifact, recipe: str, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits under the artifact, and of the checkpoint."""
    inputs = BODIES["llava-clip"].inputs(RAGGED)
    kept = inputs["attention_mask"].bool()
    export(model, artifact, folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with foveate.attach(model, recipe, artifacts=[artifact]):
        ours = model(**inputs).logits[kept]
    return ours, loaded(**inputs).logits[kept]


@pytest.mark.parametrize("recipe", ["rtn(bits=4, group_size=16)", "rtn(bits=3)", "rtn(bits=8)", "rtn(bits=2, clip=True)"])
def test_weights_alone_load_as_they_are(recipe: str, tmp_path: Path) -> None:
    model = BODIES["llava-clip"].model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours, theirs = both(model, quantize(model, recipe), recipe, tmp_path)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_checkpoint_whose_file_names_modules_otherwise_loads_as_it_is(tmp_path: Path) -> None:
    """That of the reference model has one name more in front of its encoder's layers, which end like the decoder's."""
    loaded = checkpoint.load("reference", "cpu", "float32")
    (asked,) = tasks.questions("shape", 1, seed=0, split="validation")
    inputs, artifact = loaded.inputs([asked.images], [asked.prompt]), quantize(loaded.model, "rtn(bits=4)")
    export(loaded.model, artifact, tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with foveate.attach(loaded.model, "rtn(bits=4)", artifacts=[artifact]):
        assert torch.equal(loaded.model(**inputs).logits, theirs(**inputs).logits)


def test_weights_of_the_encoder_load_as_they_are_and_grids_of_inputs_are_refused(tmp_path: Path) -> None:
    model, batches = BODIES["llava-clip"].model(), [BODIES["llava-clip"].inputs(RAGGED)]
    recipe = "ls_vit(bits=3, symmetric=True, steps=0, candidates=16, rounds=0{})"
    ours, theirs = both(model, quantize(model, recipe.format(""), batches), recipe.format(""), tmp_path)
    assert torch.equal(ours, theirs)
    with pytest.raises(FoveateError, match="ls_vit: rounds inputs to grids of its own, which are not written"):
        export(model, quantize(model, recipe.format(", activations=4"), batches), tmp_path)


def test_rounded_activations_are_rounded_by_the_loaders_own_rule(tmp_path: Path) -> None:
    model = BODIES["llava-clip"].model()
    for bits in (8, 4):
        recipe = f"rtn(bits={bits}, activations=8)"
        ours, theirs = both(model, quantize(model, recipe), recipe, tmp_path / str(bits))
        assert (ours - theirs).norm() < 0.03 * ours.norm()
    # Four bits a weight although inputs are rounded, too.
    sizes = [(tmp_path / bits / "model.safetensors").stat().st_size for bits in "84"]
    assert sizes[0] - sizes[1] > 0.4 * sum(
        linear.weight.numel() for layer in model.model.language_model.layers for linear in linears_of(layer, "").values()
    )


@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "qwen3_5"])
def test_what_inputs_are_divided_by_is_folded_into_norms_and_linears(name: str) -> None:
    """As each family multiplies by its norm's weight: by it, or by one more than it."""
    from foveate.engine.export import _fold

    body = BODIES[name]
    model = body.model(**({"kv_heads": 4} if name == "llava-clip" else {}))
    layer = model.model.language_model.layers[3]
    attention = "self_attn"
    torch.manual_seed(0)
    shared = {group: torch.rand(48) + 0.5 for group in ("attention", "mlp")} | {"down": torch.rand(96) + 0.5}
    sources = {f"{attention}.{part}_proj": "input_layernorm" for part in "qkv"}
    norm = "pre_feedforward_layernorm" if name == "gemma3" else "post_attention_layernorm"
    sources |= {"mlp.gate_proj": norm, "mlp.up_proj": norm, "mlp.down_proj": "mlp.up_proj"}
    found = {}
    for linear, source in sources.items():
        divide = shared["down" if linear == "mlp.down_proj" else "attention" if source == "input_layernorm" else "mlp"]
        weight = layer.get_submodule(linear).weight.detach() * divide
        grid = Grid.of(weight, 8)
        found[linear] = Replaced(grid, grid.integers(weight), divide)

    inputs = body.inputs(RAGGED)
    with torch.no_grad():
        plain = model(**inputs).logits
        _fold(layer, found, sources, "block 3")
        for linear, one in found.items():
            assert one.divide is None
            layer.get_submodule(linear).weight.copy_(one.grid.values(one.integers))
        folded = model(**inputs).logits
    kept = inputs["attention_mask"].bool()
    assert (folded - plain)[kept].norm() < 0.02 * plain[kept].norm()


def test_methods_that_divide_are_exported_folded(tmp_path: Path) -> None:
    model = BODIES["llava-clip"].model(kv_heads=4)
    batches = [BODIES["llava-clip"].inputs(RAGGED)]
    recipe = "awq(bits=4, group_size=16, symmetric=True)"
    ours, theirs = both(model, quantize(model, recipe, batches), recipe, tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_what_needs_code_of_ours_never_looks_like_a_checkpoint(tmp_path: Path) -> None:
    model = BODIES["llava-clip"].model()
    with pytest.raises(FoveateError, match=r"rtn: symmetric=False: .*; use symmetric=True, or the artifact"):
        export(model, quantize(model, "rtn(symmetric=False)"), tmp_path)
    with pytest.raises(FoveateError, match="hiprune: replaces no weights"):
        export(model, Artifact("hiprune", quantize(model, "rtn").fingerprint, {}), tmp_path)
    artifact = quantize(model, "rtn")
    layer = model.model.language_model.layers[0]
    weight = layer.self_attn.o_proj.weight.detach()
    grid = Grid.of(weight, 4)
    divided = tensors_of(Replaced(grid, grid.integers(weight), torch.full((48,), 2.0)), torch.float32)
    numbers = dict(artifact.numbers) | {f"0.self_attn.o_proj.{name}": tensor for name, tensor in divided.items()}
    with pytest.raises(FoveateError, match=r"self_attn\.o_proj of block 0: nothing in front of it can divide its input"):
        export(model, replace(artifact, numbers=numbers), tmp_path)
    with torch.no_grad():
        layer.mlp.up_proj.weight[5, 7] += 1
    with pytest.raises(FoveateError, match=r"artifact of rtn: made of other weights .*, as block 0 of the decoder shows"):
        export(model, artifact, tmp_path)
    assert not list(tmp_path.iterdir())
    quantize(model, "rtn", out=tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_library_that_names_linears_otherwise_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("foveate.engine.export.version", lambda name: "0.17.0")
    with pytest.raises(
        FoveateError, match=r"^export: compressed-tensors 0\.17\.0 names .* pip install 'compressed-tensors>=0\.20'$"
    ):
        refuse_export(RTN())
