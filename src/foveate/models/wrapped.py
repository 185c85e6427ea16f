"""The model inside what others put around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from foveate.core.errors import FoveateError


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's adapters, `DistributedDataParallel` and ``torch.compile``: they call it as it is.

    Raises:
        FoveateError: if what is around it does not.
    """
    if isinstance(model, DataParallel):
        raise FoveateError("model: DataParallel runs copies of it; attach to its .module, and call that")
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    if isinstance(model, OptimizedModule):
        return unwrapped(model._orig_mod)
    inner: Any = getattr(model, "get_base_model", None)
    if inner is None:
        return model
    base: nn.Module = inner()
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise FoveateError(
            "model: a PeftModel with prompt learning puts rows of its own before prompts; attach to its get_base_model()"
        )
    return unwrapped(base)


def unpack(model: nn.Module) -> None:
    """Have compressed-tensors unpack ``model`` now, which it would do in the first forward: parts are called before that."""
    waiting = getattr(model, "ct_decompress_hook", None)
    if waiting is not None:
        model._forward_pre_hooks[waiting.id](model, ())  # which takes itself away
