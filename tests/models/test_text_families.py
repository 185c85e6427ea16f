"""Decoders of many families without pictures, tiny and random: what runs on them, or is refused by name (docs/text.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import foveate
from foveate import FoveateError
from foveate.models import anatomy
from tests import tiny

LENGTH = 40
WINDOW = 16
"""Of layers that see the last tokens only."""
COMMON: dict[str, Any] = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 12}
WINDOWED = {**GROUPED, "sliding_window": WINDOW}
ALTERNATING = {**WINDOWED, "query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma2": ALTERNATING,
    "gemma3_text": ALTERNATING,
    "phi3": {**COMMON, "num_key_value_heads": 2},
    "gpt_neox": COMMON,
    # Rotary positions of three axes, without pictures; three of four layers have a recurrent state, the last one attention.
    "qwen3_5_text": {
        **GROUPED,
        "head_dim": 24,
        "rope_parameters": dict(
            rope_type="default",
            rope_theta=10000.0,
            partial_rotary_factor=0.5,
            mrope_section=[2, 2, 2],
            mrope_interleaved=True,
        ),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
CACHES = {
    "snapkv": "window=4",
    "h2o": "steps=False",
    "streamingllm": "steps=False",
    "pyramidkv": "window=4, beta=3",
    "mixkv": "window=4",
    "flashcache": "recent=3",
    "prefixkv": "distance=-1",
}


def made(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return tiny._ready(model, "eager" if kind == "gemma2" else "sdpa")


def answer(model: Any, count: int = 2) -> tuple[torch.Tensor, ...]:
    """What is generated for prompts of different lengths, padded on the left; ids, and the logits of each step."""
    ids = torch.randint(11, tiny.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    there = torch.arange(LENGTH) >= 7 * torch.arange(count)[:, None]
    output = model.generate(
        input_ids=ids.where(there, 0),
        attention_mask=there.long(),
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, *output.logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_caches_that_keep_all_are_the_model_and_half_of_them_is_half(kind: str) -> None:
    model = made(kind, FAMILIES[kind])
    traits, plain = anatomy(model).traits(), answer(model)
    whole = [layer for layer in range(4) if layer not in {*traits.sliding, *traits.recurrent}]

    assert traits.family == "text"
    assert traits.rotary_rows == (3 if kind == "qwen3_5_text" else 1)
    for name, options in CACHES.items():
        with foveate.attach(model, f"{name}(keep=1.0, {options})"):
            assert all(map(torch.equal, answer(model), plain)), name
        with foveate.attach(model, f"{name}(keep=0.5, {options})") as session:
            answer(model)
            kept = [session.report.kv_kept[layer] for layer in whole]
        assert 0.4 < sum(kept) / len(kept) < 0.65, name


def test_layers_that_all_see_a_window_have_nothing_to_drop() -> None:
    model = made("mistral", WINDOWED)
    plain = answer(model)

    with foveate.attach(model, "none"):
        assert all(map(torch.equal, answer(model), plain))
    for name in (*CACHES, "kivi"):
        with pytest.raises(FoveateError, match=rf"^{name}: every layer of this model sees a window of the last tokens"):
            foveate.attach(model, name)


def test_nor_have_they_behind_an_encoder() -> None:
    config = tiny.gemma3().config
    config.text_config.layer_types = ["sliding_attention"] * config.text_config.num_hidden_layers
    model = type(tiny.gemma3())(config).eval()

    foveate.attach(model, "random(keep=0.5)").detach()
    with pytest.raises(FoveateError, match=r"^snapkv: every layer of this model sees a window of the last tokens"):
        foveate.attach(model, "snapkv")
