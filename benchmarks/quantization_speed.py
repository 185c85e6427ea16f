"""Whole-model times of quantized linears on a processor, for `benchmarks.quantization`: every arm once a round."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate

WIDTH, INNER, LAYERS, HEADS, WORDS = 1024, 2816, 4, 16, 200
PROMPT, STEPS = 128, 16


@dataclass(frozen=True)
class Arm:
    """What is timed: a dtype, and a method that replaces weights, if any."""

    name: str
    dtype: torch.dtype
    method: str = "none"


ARMS = (
    Arm("float32", torch.float32),
    Arm("bfloat16", torch.bfloat16),
    Arm("W8, bfloat16", torch.bfloat16, "rtn(bits=8)"),
    Arm("W4 g128, bfloat16", torch.bfloat16, "rtn(bits=4, group_size=128)"),
    Arm("W3 g128, bfloat16", torch.bfloat16, "rtn(bits=3, group_size=128)"),
    Arm("W4 g128, float32", torch.float32, "rtn(bits=4, group_size=128)"),
)


class Speed:
    """Models of one shape with random weights, in each dtype, and what was made of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        text = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=WORDS,
            max_position_embeddings=1024,
        )
        vision = CLIPVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28
        )
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=WORDS - 1)
        single = LlavaForConditionalGeneration(config).eval()
        self.models: dict[torch.dtype, Any] = {
            torch.float32: single,
            torch.bfloat16: copy.deepcopy(single).to(torch.bfloat16),
        }
        self.artifacts = {
            arm.name: foveate.quantize(self.models[arm.dtype], arm.method) for arm in ARMS if arm.method != "none"
        }
        self.ids = torch.randint(3, WORDS - 2, (1, PROMPT))

    def round(self) -> dict[str, dict[str, float]]:
        """Of every arm the seconds of CPU of a prompt and of a step, and the bits of a weight on disk and in memory."""
        return {arm.name: self._once(arm) for arm in ARMS}

    @torch.inference_mode()
    def _once(self, arm: Arm) -> dict[str, float]:
        model = self.models[arm.dtype]
        artifact = self.artifacts.get(arm.name)
        floats = 8 * arm.dtype.itemsize
        with foveate.attach(model, arm.method, artifacts=[] if artifact is None else [artifact]) as session:
            model(input_ids=self.ids[:, :8])
            times = [time.process_time()]
            out = model(input_ids=self.ids, use_cache=True)
            times.append(time.process_time())
            for step in range(STEPS):
                out = model(input_ids=self.ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            times.append(time.process_time())
            report = session.report
        disk, memory = float(floats), float(floats)
        if artifact is not None:
            size = artifact.numbers["size"]
            disk = 8 * sum(count for name, count in size.items() if name != "weights") / size["weights"]
            memory = 8 * report.weight_bytes / report.weights
        return {
            "prefill": round(times[1] - times[0], 4),
            "step": round((times[2] - times[1]) / STEPS, 5),
            "disk": round(disk, 3),
            "memory": round(memory, 3),
            "unpacked": report.unpacked,
        }
