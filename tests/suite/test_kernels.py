"""Attention kernels that are changed while a recipe is attached."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError
from tests.suite.bodies import BODIES, RAGGED


@torch.no_grad()
def test_another_attention_while_attached_is_right_or_refused() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    with foveate.attach(model, "fastv(layer=2, keep=5) + shortv(layers=(1,))"):
        expected = model(**inputs).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        model.set_attn_implementation("flex_attention")
        with pytest.raises(FoveateError, match=r"attention 'flex_attention': not supported; use model.set_attn_impl"):
            model(**inputs)
        # As `set_attn_implementation` would, where the kernel is installed.
        model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(FoveateError, match=r"attention 'flash_attention_2': takes other masks than .*; attach again"):
            model(**inputs)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(**inputs).logits, expected)
