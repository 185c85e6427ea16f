"""ShortV, through the engine: a LLaVA whose language model carries the case's weights runs with layers frozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate
from foveate.core.recipe import Recipe
from foveate.core.traits import Traits
from foveate.engine import masks
from foveate.methods import ShortV
from foveate.models import anatomy
from foveate.ops.divergence import divergence
from tests.vectors import Case

TEXT, IMAGE = 0, 1
CLOSE = dict(atol=1e-5, rtol=0)


def check_plain_model(case: Case) -> None:
    assert_close(_Body(case).logits(Recipe())[0], case["out_logits_full"], **CLOSE)


def check_first_layer_frozen(case: Case) -> None:
    hidden, _ = _Body(case).run(ShortV(layers=(0,)), layer=0)

    assert_close(hidden, case["out_frozen_layer0"], **CLOSE)
    assert torch.equal(hidden[_visual(case)], case["in_embeds"][_visual(case)])


def check_each_layer_frozen(case: Case) -> None:
    body = _Body(case)
    replaced = [body.logits(Recipe((ShortV(layers=(layer,)),)))[0] for layer in range(case["cfg_layers"])]

    assert_close(torch.stack(replaced), case["out_logits_replaced"], **CLOSE)


def check_least_contributing_layers_frozen(case: Case) -> None:
    layers = tuple(case["out_order"][: case["cfg_frozen"]].tolist())
    hidden, logits = _Body(case).run(ShortV(layers=layers), layer=case["cfg_layers"] - 1)

    assert_close(hidden, case["out_hidden_frozen"], **CLOSE)
    assert_close(logits, case["out_logits_frozen"], **CLOSE)


def check_contribution(case: Case) -> None:
    contribution = divergence(case["out_logits_full"], case["out_logits_replaced"])

    assert_close(contribution.float(), case["out_lc"], atol=1e-6, rtol=0)


def check_calibration(case: Case) -> None:
    found = ShortV().calibrate(_Body(case))

    assert_close(torch.tensor(found["contribution"]), case["out_lc"], atol=1e-6, rtol=0)


def check_order(case: Case) -> None:
    if not case["cfg_num_image"]:
        pytest.skip("without visual tokens every contribution is rounding noise, and so is their order")

    assert ShortV().calibrate(_Body(case))["order"] == case["out_order"].tolist()


def check_mask(case: Case) -> None:
    every = torch.arange(len(case["in_embeds"]))
    text = every[~_visual(case)]
    mask = masks.pick(None, text[None], every[None, None], 0, "sdpa", case["in_embeds"])

    assert mask[0, 0].long().tolist() == case["out_mask"].tolist()


def _visual(case: Case) -> Tensor:
    after = torch.arange(len(case["in_embeds"])) - case["cfg_image_start"]
    return (after >= 0) & (after < case["cfg_num_image"])


@dataclass(frozen=True)
class _Body:
    """The case's model; as a `ModelCall`, its prompt is the only calibration sample."""

    case: Case
    batches = 1

    def begin(self, what: str, steps: int) -> None:
        pass

    @cached_property
    def traits(self) -> Traits:
        return anatomy(self.model).traits()

    @cached_property
    def model(self) -> Any:
        case = self.case
        vocabulary, width = case["in_lm_head"].shape
        text = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=case["in_gate"].shape[1],
            num_hidden_layers=case["cfg_layers"],
            num_attention_heads=case["cfg_heads"],
            num_key_value_heads=case["cfg_kv_heads"],
            rms_norm_eps=case["cfg_rms_eps"],
            rope_parameters=dict(rope_type="default", rope_theta=case["cfg_rope_base"]),
        )
        tower = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=8
        )
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
        ).eval()
        _load(model, case)
        # The case begins with embeddings; they stand for what the table and the encoder would have given: a picture a token.
        model.get_input_embeddings().register_forward_hook(lambda *_: case["in_embeds"][None])
        shown = case["in_embeds"][_visual(case)]
        model.model.multi_modal_projector.register_forward_hook(lambda *_: shown[:, None])
        return model

    def logits(self, recipe: Recipe) -> Tensor:
        with foveate.attach(self.model, recipe):
            return self._forward()[None]

    def run(self, method: ShortV, layer: int) -> tuple[Tensor, Tensor]:
        """Hidden states ``[L, D]`` that ``layer`` puts out under ``method``, and the last token's logits."""
        hidden: list[Tensor] = []
        with foveate.attach(self.model, method):
            module = self.model.model.language_model.layers[layer]
            handle = module.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
            logits = self._forward()
            handle.remove()
        return hidden[0], logits

    @torch.no_grad()
    def _forward(self) -> Tensor:
        visual = _visual(self.case)
        ids, count = torch.where(visual, IMAGE, TEXT)[None], int(visual.sum())
        shown = {"pixel_values": torch.zeros(count, 3, 8, 8)} if count else {}
        return self.model(input_ids=ids, **shown).logits[0, -1]


@torch.no_grad()
def _load(model: Any, case: Case) -> None:
    language = model.model.language_model
    language.norm.weight.copy_(case["in_final_norm"])
    model.lm_head.weight.copy_(case["in_lm_head"])
    for number, layer in enumerate(language.layers):
        parameters = {
            "q": layer.self_attn.q_proj,
            "k": layer.self_attn.k_proj,
            "v": layer.self_attn.v_proj,
            "o": layer.self_attn.o_proj,
            "gate": layer.mlp.gate_proj,
            "up": layer.mlp.up_proj,
            "down": layer.mlp.down_proj,
            "norm1": layer.input_layernorm,
            "norm2": layer.post_attention_layernorm,
        }
        for name, module in parameters.items():
            module.weight.copy_(case[f"in_{name}"][number])
