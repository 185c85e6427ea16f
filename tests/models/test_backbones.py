"""LLaVA over the decoders that it can be built with: what runs equals masking, what cannot is refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import foveate
from foveate.core.errors import FoveateError
from foveate.engine.calibrate import Calibration
from foveate.models import anatomy
from foveate.models.decoder import listening, remembering
from foveate.models.specimens import SHAPES
from tests.suite.oracle import masked_logits, noting

SLIDING = ("mistral", "gemma2", "olmo3", "exaone4", "gpt_oss", "cohere2")
SIDE_BY_SIDE = ("phi", "cohere", "cohere2", "gpt_neox")
BEHIND = ("olmo2", "olmo3", "exaone4")
"""Norms stand behind attention and MLP only."""
KINDS = (
    *("qwen3", "mistral", "gemma2", "phi", "phi3", "olmo2", "cohere", "granite", "gpt_neox"),
    *("cohere2", "exaone4", "glm4", "gpt_oss", "jetmoe", "mixtral", "nemotron", "olmo3", "smollm3", "stablelm"),
)
METHODS = ("uniform(keep=5)", "fastv(layer=2, keep=5)", "shortv(layers=(2, 3))", "snapkv(keep=0.5)", "hidrop", "feather")
IDS = torch.tensor([[1, 20, *[4] * 16, 21, 22, 23], [0, 1, 20, *[4] * 16, 21, 23]])
LATER = torch.tensor([[30, 31], [33, 34]])
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
MASK = torch.cat([(IDS != 0).long(), torch.ones_like(LATER)], dim=1)
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)


@cache
def backbone(kind: str) -> Any:
    """Weights three times as large as usual, so that attention is uneven."""
    text = dict(SHAPES["llava"]["text_config"], hidden_size=64, head_dim=16, num_hidden_layers=5, model_type=kind)
    torch.manual_seed(0)
    for without in ((), ("head_dim",)):  # which some take from the width
        text = {name: value for name, value in text.items() if name not in without}
        try:
            config = AutoConfig.for_model("llava", **dict(SHAPES["llava"], text_config=text))
            model = AutoModelForImageTextToText.from_config(config).eval()
            break
        except (AttributeError, RuntimeError, ValueError):
            continue
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return model


def answered(model: Any) -> Tensor:
    """Logits ``[B, 3, V]`` of the prompt's last row and of two more steps."""
    rows = IDS.shape[1]
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK[:, :rows], position_ids=POSITIONS[:, :rows], pixel_values=PIXELS)
        logits = [out.logits[:, -1:]]
        for step in range(2):
            here = slice(rows + step, rows + step + 1)
            options = dict(attention_mask=MASK[:, : here.stop], position_ids=POSITIONS[:, here])
            out = model(input_ids=LATER[:, step : step + 1], past_key_values=out.past_key_values, **options)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", METHODS)
def test_removal_equals_masking(kind: str, recipe: str) -> None:
    model = backbone(kind)
    routes = recipe.startswith(("shortv", "hidrop"))
    if kind in SLIDING and routes:
        with pytest.raises(FoveateError, match="sliding attention"):
            foveate.attach(model, recipe)
        return
    if kind == "mistral" and recipe.startswith("snapkv"):
        with pytest.raises(FoveateError, match="every layer of this model sees a window"):
            foveate.attach(model, recipe)
        return
    with noting() as notes, foveate.attach(model, recipe) as session:
        got = answered(model)
        assert session.report.flops > 0
    whole = dict(input_ids=torch.cat([IDS, LATER], dim=1), attention_mask=MASK, pixel_values=PIXELS)
    expected = masked_logits(model, whole, session.trace, (0,), notes)[:, -3:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_those_of_the_layer_or_refused(kind: str) -> None:
    parts = anatomy(backbone(kind))
    if kind in (*SIDE_BY_SIDE, *BEHIND):
        with pytest.raises(FoveateError, match="transprune: decoder layer 1: is not attention and then MLP"):
            foveate.attach(parts.model, "transprune(layers=(2,), ratios=(0.5,), accumulate=(2,))")
        return
    made: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda module, args, out: made.append(out[0] if isinstance(out, tuple) else out))
        for part in parts.halves(1)
    ]
    x = torch.randn(1, 4, 64)
    with torch.no_grad():
        rope = parts.rotary(1, x, torch.arange(4)[None, None])
        out = parts.layers[1](x, position_embeddings=rope, attention_mask=None)
    for handle in handles:
        handle.remove()
    assert len(made) == 4
    torch.testing.assert_close(x + made[1] + made[3], out)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_keys_and_values_are_those_that_enter_attention_and_cache(kind: str) -> None:
    parts, layer, x = anatomy(backbone(kind)), 2, torch.randn(2, 6, 64)
    rope = parts.rotary(layer, x, torch.arange(3, 9).expand(1, 2, -1))
    with torch.no_grad(), listening(parts.attention(layer)) as heard:
        module = parts.layers[layer]
        module(x, position_embeddings=rope, attention_mask=None, **remembering(module, heard.cache))
    entered = heard.calls[0]
    with torch.no_grad():
        query, key = parts.query_key(layer, x, rope)
        stored = parts.keys_values(layer, x, rope)
        plain = parts.query_key(layer, x, None)
        turned = parts.rotate(layer, *plain, rope)
    for mine, theirs in zip((query, key, *stored, *turned), (*(entered.query, entered.key), *entered.cached, query, key)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("kind", "columns"), [("llama", 16), ("cohere", 16), ("gpt_oss", 8), ("phi", 8)])
def test_each_part_of_the_frequencies_turns_by_its_own_position(kind: str, columns: int) -> None:
    parts = anatomy(backbone(kind))
    (count,) = parts.rotary_axes
    x = torch.zeros(1, 1, 64)
    plain = [parts.rotary(2, x, torch.tensor([[[place]]]))[1][0, 0] for place in (2, 5, 7)]

    both = parts.rotary(2, x, torch.tensor([2, 5, 7])[:, None, None])[1][0, 0]

    assert both.shape == (columns,)
    assert count == (columns if kind == "gpt_oss" else columns // 2)
    # The columns of one frequency are those that turn alike at every position.
    of_frequency = {tuple(each.tolist()): [] for each in torch.stack(plain, dim=1)}
    for column, each in enumerate(torch.stack(plain, dim=1)):
        of_frequency[tuple(each.tolist())].append(column)
    assert len(of_frequency) == count
    for number, members in enumerate(of_frequency.values()):
        assert both[members].tolist() == plain[number * 3 // count][members].tolist()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doge", "DogeDecoderLayer cannot be taken apart .*; use a text model of another family"),
        ("hrm_text", "text model HrmTextModel: its layers are not given rotary positions from outside"),
        ("llama4_text", "text model Llama4TextModel: its rotary positions are no cosines and sines"),
    ],
)
def test_a_decoder_that_is_built_otherwise_is_refused_by_name(kind: str, reason: str) -> None:
    with pytest.raises(FoveateError, match=reason):
        foveate.attach(backbone(kind), "uniform(keep=5)")


@pytest.mark.parametrize(("kind", "name"), [("phi3", "query"), ("gpt_neox", "key"), ("olmo2", "query")])
def test_weights_that_do_not_make_the_queries_alone_are_not_calibrated_on(kind: str, name: Any) -> None:
    with pytest.raises(FoveateError, match=rf"decoder layer 1: its {name} is not made by a plain linear projection"):
        Calibration(backbone(kind), []).weight(1, name)


def test_watching_a_layer_leaves_nothing_behind() -> None:
    model = backbone("phi").train()
    before = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    state = torch.get_rng_state()

    anatomy(model).build(1)

    assert {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
