"""Our tiny models, as transformers' mixins ask for them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from tests.suite.bodies import Body

FAMILIES = {
    "llava": "llava-clip",
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen3_5": "qwen3_5",
    "internvl": "internvl",
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "smolvlm": "smolvlm",
}
"""The body of each family."""


class ModelTester:
    """Config and inputs of a tiny model: what a ``model_tester`` of transformers is asked for.

    Attributes:
        body: the model behind it.
    """

    is_training = True
    batch_size = 2

    def __init__(self, body: Body) -> None:
        self.body = body
        model = body.model()
        self._config, self._inputs = model.config, body.inputs([(3, 1, 6)] * self.batch_size)
        text = self._config.get_text_config()
        self.seq_length = self._inputs["input_ids"].shape[1]
        self.num_hidden_layers = text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads
        self.hidden_size = text.hidden_size
        self.pad_token_id = text.pad_token_id
        self.vision_config = self._config.vision_config.to_dict()

    def get_config(self) -> Any:
        return type(self._config).from_dict(self._config.to_dict())  # a kernel was not chosen yet

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        return self.get_config(), copy.deepcopy(self._inputs)
