"""STC: what the pruner scores and keeps, chunk by chunk, and an encoder block that runs in part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from foveate.core.roles import Item
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.core.stream import Memory
from foveate.engine.clock import Clock
from foveate.engine.grids import picture_layout
from foveate.engine.reuse import Chain
from foveate.methods import STC
from foveate.methods.in_encoder.stc import Past, familiarity, most_changed
from foveate.models.llava import halves
from tests.vectors import Case


def check_scores(case: Case) -> None:
    past: Past | None = None
    before: Any = 0
    for number, z in enumerate(_chunks(case)):
        score, past = familiarity(z[None, None], past)
        assert_close(score[0, 0], case["out_frame_score"][number] + case["out_memory_score"][number], atol=2e-5, rtol=0)
        assert_close(past[0][0] - before, case["out_memory"][number], atol=1e-5, rtol=0)
        before = past[0][0]


def check_kept(case: Case) -> None:
    tokens, keep, memory = case["cfg_tokens_per_frame"], case["cfg_keep"], Memory()
    for number, z in enumerate(_chunks(case)):
        method = STC(keep=keep, variant="released", chunk=len(z))
        item = Item(len(z) * tokens, 1, 0, len(z))
        x = z.reshape(1, -1, z.shape[2])
        layout = picture_layout([(item.rows, 1, len(z))], torch.ones(x.shape[:2], dtype=torch.bool), 0)
        edit = method.edit(Site("projected"), x, layout, {}, State(memory=memory))
        kept = range(x.shape[1]) if edit is None else edit.reduction.anchor[0].tolist()
        expected = case["out_pruner_kept"][number]
        if case["cfg_mapper"] != "flat":  # row ends, which are no visual tokens here, stand behind the frame's
            expected = expected[:keep]
            expected = expected - expected // 14
        assert list(kept) == expected.tolist()


def check_block(case: Case) -> None:
    share, interval, memory = case["cfg_update_ratio"], case["cfg_cache_interval"], Memory()
    block, hidden = _block(case), case["in_hidden"]
    method = _Spied(update=share, interval=interval, chunk=hidden.shape[1])
    for x, expected in zip(hidden, case["out_hidden"]):
        chain = Chain(method, [range(len(x))], memory, Clock(x.device), set())
        assert_close(chain.run(0, halves(block), x), expected, atol=1e-5, rtol=0)
    assert [rows.tolist() for rows in method.spied] == case["out_updated"].tolist()


class _Spied(STC):
    """Remembers which rows it chose."""

    @property
    def spied(self) -> list[Tensor]:
        return self.__dict__.setdefault("_spied", [])

    def stale(self, layer: int, keys: Tensor, reference: Tensor) -> Tensor:
        self.spied.append(most_changed(keys, reference, self.update))
        return self.spied[-1]


def _chunks(case: Case) -> list[Tensor]:
    """``[F, P, d]`` each."""
    features: Tensor = case["in_features"]
    return list(features.unflatten(1, (-1, case["cfg_tokens_per_frame"])))


@torch.no_grad()
def _block(case: Case) -> Any:
    weights = {name[2:]: value for name, value in case.items() if name.startswith("w_")}
    weights = {name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2"): value for name, value in weights.items()}
    inside, width = weights["mlp.fc1.weight"].shape
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=inside,
        num_attention_heads=case["cfg_heads"],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    block = SiglipEncoderLayer(config).eval().requires_grad_(False)
    block.load_state_dict(weights)
    return block
