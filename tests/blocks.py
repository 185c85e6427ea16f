"""A decoder layer by itself, as methods that replace weights are handed one, for the published code's vectors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from foveate.core.roles import Role
from foveate.core.weights import Stream
from foveate.engine.replay import Replay, Watched, first
from foveate.engine.slopes import Slopes
from foveate.engine.trial import Trial

NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
GROUPS = {
    "attn": tuple(NAMES[name] for name in "qkv"),
    "o": (NAMES["o"],),
    "mlp": (NAMES["gate"], NAMES["up"]),
    "down": (NAMES["down"],),
}
"""The vectors' names of linears that share an input."""


def llama_layer(case: Mapping[str, Any]) -> LlamaDecoderLayer:
    """With the weights of a case: no biases, no rotation, causal."""
    inner, width = case["gate_proj"].shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=case["num_heads"],
        num_key_value_heads=case["num_kv_heads"],
        head_dim=width // case["num_heads"],
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
    )
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    for name in NAMES.values():
        cast(nn.Linear, layer.get_submodule(name)).weight.copy_(case[name.rpartition(".")[2]])
    layer.input_layernorm.weight.copy_(case["input_norm"])
    layer.post_attention_layernorm.weight.copy_(case["post_norm"])
    return layer


class OneBlock:
    """What `foveate.engine.replay.Replay` is to a trial, for one layer and one batch."""

    part = "decoder"

    def __init__(self, layer: nn.Module, x: Tensor, role: Tensor) -> None:
        self.blocks: Sequence[nn.Module] = [layer]
        sample = torch.arange(len(x))[:, None].expand(x.shape[:2])
        self.batches = [Watched(x, role=role, sample=sample)]
        self._width = x.shape[2]

    def copy(self, number: int) -> nn.Module:
        return copy.deepcopy(self.blocks[number])

    def run(self, block: nn.Module, number: int, batch: int, x: Tensor, whole: bool = True) -> Tensor:
        width = cast(Any, block).self_attn.head_dim
        turned = torch.ones(1, x.shape[1], width), torch.zeros(1, x.shape[1], width)
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)[None, None]
        made = block(x, position_embeddings=turned, attention_mask=mask)
        return first(made)


def trial(case: Mapping[str, Any]) -> Trial:
    """Of a case with ``x``, maybe ``x_q`` (what quantized blocks before it make of the samples) and masks of rows."""
    role = torch.full(case["x"].shape[:2], int(Role.TEXT))
    role = role.masked_fill(case["vis_mask"].bool(), int(Role.IMAGE)).masked_fill(case["ans_mask"].bool(), int(Role.ANSWER))
    replay = cast(Replay, OneBlock(llama_layer(case), case["x"], role))
    states: dict[Stream, Sequence[Tensor]] = {"exact": [case["x"]], "reached": [case.get("x_q", case["x"])]}
    return Trial(replay, 0, states, cast(Slopes, None), print)


def drawn(seed: int = 0, heads: int = 4, kv_heads: int = 4) -> dict[str, Any]:
    """A case of random weights and rows: four visual ones, three of text and two of an answer in each of two samples."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, inner = 32, 48
    inputs = {"o": width, "down": inner}
    outputs = {"k": width * kv_heads // heads, "v": width * kv_heads // heads, "gate": inner, "up": inner}
    shapes = {name: (outputs.get(name, width), inputs.get(name, width)) for name in NAMES}
    weights = {NAMES[name].rpartition(".")[2]: random(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    x = random(2, 9, width) * (1 + 9 * (torch.rand(width, generator=generator) < 0.1))
    marks = torch.arange(9).expand(2, 9)
    return {
        **weights,
        "x": x,
        "x_q": x + random(2, 9, width) / 20,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "input_norm": 1 + random(width) / 10,
        "post_norm": 1 + random(width) / 10,
        "vis_mask": (marks >= 1) & (marks < 5),
        "ans_mask": marks >= 7,
    }
