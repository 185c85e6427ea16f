"""Models whose projections hold integers: under every kind of recipe what the masked model, as quantized, answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import foveate
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.engine.calibrate import Calibration
from foveate.models import anatomy
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits
from tests.suite.oracle import masked_logits, noting
from tests.suite.pairs import lent, refusal

CLOSE = dict(rtol=1e-4, atol=1e-4)

PLACES = {
    "before encoder": "index_preserving",
    "encoder": "folder(keep=6)",
    "between halves": "tome(keep=6)",
    "before LLM": "hiprune(keep=6)",
    "layer": "fastv(layer=2, keep=5)",
    "halves of a layer": "transprune(layers=(1, 3), ratios=(0.6, 0.3), accumulate=(1, 2))",
    "keys and queries": "ivc_prune(layer=1, mode='fixed')",
    "routing": "shortv(layers=(1, 2))",
    "cache": "snapkv(keep=0.5, window=4)",
    "cache by head": "mixkv(keep=0.5, host='adakv', window=4)",
    "cache by step": "prefixkv(keep=0.5, distance=-4)",
    "cache in factors": "attentionpack(rank=6)",
    "cache in few bits": "kivi(size=8, residual=4)",
}
FAMILIES = ("llava-clip", "qwen2_5_vl", "gemma3")


class Integers(nn.Linear):
    """A linear layer that keeps integers and a scale for each row, unpacked when called; a subclass, as bitsandbytes'."""

    def __init__(self, whole: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = whole.in_features, whole.out_features, whole.bias
        weight = whole.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        integers = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers.reshape(-1, 1), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features).to(input.dtype) * self.scale
        return nn.functional.linear(input, weight, self.bias)


def projections(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if type(part) is nn.Linear and "lm_head" not in name]


def integers(model: Any) -> Any:
    for name in projections(model):
        model.set_submodule(name, Integers(model.get_submodule(name)))
    return model


def compressed(model: Any, bits: int = 4, activations: int | None = None) -> Any:
    """So many bits a weight, by compressed-tensors, and so many for each token's inputs; unpacked, as once it has run."""
    tensors = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = tensors.QuantizationArgs(num_bits=bits, type="int", strategy="channel", symmetric=True)
    names = projections(model)
    inputs = activations and tensors.QuantizationArgs(num_bits=activations, type="int", strategy="token", dynamic=True)
    scheme = tensors.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    tensors.apply_quantization_config(
        model, tensors.QuantizationConfig(config_groups={"linear": scheme}, ignore=["lm_head"])
    )
    for part in map(model.get_submodule, names):
        low, high = part.weight.detach().amin(1, keepdim=True), part.weight.detach().amax(1, keepdim=True)
        part.weight_scale.data.copy_(calculate_qparams(low, high, weights)[0])
        part.quantization_status = tensors.QuantizationStatus.FROZEN
    return model


def packed(model: Any, folder: Path) -> Any:
    """The same as a checkpoint: packed integers until the whole has run."""
    from compressed_tensors import ModelCompressor

    model = compressed(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def torchao(model: Any) -> Any:
    """Eight bits a weight, in tensors of torchao's own type."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda part, name: type(part) is nn.Linear and "lm_head" not in name,
    )
    return model


def bitsandbytes(model: Any) -> Any:
    """Four bits a weight."""
    library = pytest.importorskip("bitsandbytes")
    for name in projections(model):
        whole = model.get_submodule(name)
        part = library.nn.Linear4bit(
            whole.in_features, whole.out_features, whole.bias is not None, torch.float32, quant_type="nf4"
        )
        part.weight = library.nn.Params4bit(whole.weight.detach(), requires_grad=False, quant_type="nf4")
        part.bias = whole.bias
        part.support_avx512bf16_for_cpu = False  # that kernel wants widths that 32 divides
        model.set_submodule(name, part)
    return model.to("cpu").eval()


def quanto(model: Any) -> Any:
    """Eight bits a weight."""
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8, exclude=["lm_head", "*embed*"])
    library.freeze(model)
    return model


@pytest.mark.parametrize("recipe", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", [integers, compressed, torchao, bitsandbytes, quanto])
def test_removal_equals_masking_and_detaching_restores(quantize: Callable[[Any], Any], family: str, recipe: str) -> None:
    body = BODIES[family]
    method = Recipe.parse(recipe).methods[0]
    if (reason := refusal(method, body)) is not None:
        pytest.skip(reason)
    model, inputs = quantize(body.model()), body.inputs(RAGGED)
    prompt, plain = inputs["input_ids"].shape[1], logits(generate(model, inputs, 4))
    with noting() as notes, foveate.attach(model, recipe, artifacts=lent(body, model)) as session:
        output = generate(model, inputs, 8)
    assert session.report.visual_tokens
    assert torch.equal(logits(generate(model, inputs, 4)), plain)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    torch.testing.assert_close(
        logits(output), masked_logits(model, whole, notes.trace, (0,), notes)[:, prompt - 1 :], **CLOSE
    )


@pytest.mark.parametrize("recipe", ["hiprune(keep=6)", "fastv(layer=2, keep=5)", "snapkv(keep=0.5, window=4)"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rounded_activations_leave_removal_and_masking_as_near_as_rounding_does(family: str, recipe: str) -> None:
    """A last bit that is another rounds an activation up instead of down, so the two are equal no further than that."""
    body = BODIES[family]
    model, inputs = compressed(body.model(), 8, 8), body.inputs(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    with noting() as notes, foveate.attach(model, recipe):
        output = generate(model, inputs, 8)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    masked = masked_logits(model, whole, notes.trace, (0,), notes)[:, prompt - 1 :]
    plain = model(**whole).logits[:, prompt - 1 :]
    assert (logits(output) - masked).abs().mean() < 0.1 * (plain - masked).abs().mean()


@pytest.mark.parametrize("family", ["llava-clip", "qwen2_5_vl"])
def test_a_packed_checkpoint_is_unpacked_before_its_layers_are_looked_at(family: str, tmp_path: Path) -> None:
    body = BODIES[family]
    inputs = body.inputs(RAGGED)
    once = packed(body.model(), tmp_path)
    once(**inputs)
    recipe = "hiprune(keep=9) + fastv(layer=2, keep=5) + snapkv(keep=0.5, window=4)"
    with foveate.attach(once, recipe):
        expected = logits(generate(once, inputs, 4))

    fresh = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with foveate.attach(fresh, recipe):
        assert torch.equal(logits(generate(fresh, inputs, 4)), expected)
    assert torch.equal(fresh(**inputs).logits, once(**inputs).logits)


def test_modules_without_parameters_are_hosted_and_given_back() -> None:
    """PyTorch's dynamic layers, whose scale depends on all rows of a call: no mask is equal to a removal there."""
    body = BODIES["llava-clip"]
    model = torch.ao.quantization.quantize_dynamic(body.model(), {nn.Linear}, dtype=torch.qint8)
    inputs = body.inputs(RAGGED)
    plain = logits(generate(model, inputs, 4))
    with foveate.attach(model, "none"):
        assert torch.equal(logits(generate(model, inputs, 4)), plain)
    with foveate.attach(model, "hiprune(keep=9) + fastv(layer=2, keep=5) + snapkv(keep=0.5, window=4)") as session:
        generate(model, inputs, 4)
    assert session.report.visual_tokens == (12.0, 12.0, 5.0, 5.0)
    assert torch.equal(logits(generate(model, inputs, 4)), plain)


def test_an_embedding_of_integers_does_not_say_what_hidden_states_are() -> None:
    model = BODIES["llava-clip"].model().bfloat16()
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.detach().to(torch.int8), requires_grad=False)

    assert anatomy(model).dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", [integers, torchao, bitsandbytes])
def test_weights_in_another_form_are_not_calibrated_on(quantize: Callable[[Any], Any]) -> None:
    model = quantize(BODIES["llava-clip"].model())
    with pytest.raises(FoveateError, match=r"not made by a plain linear projection.*weights not quantized"):
        Calibration(model, []).weight(1, "query")
