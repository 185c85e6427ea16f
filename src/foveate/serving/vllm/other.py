"""In the places of vLLM's models, of a version that the plug-in is not tested with: those, but that they refuse a recipe."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foveate.core.errors import FoveateError
from foveate.serving.vllm import ARCHITECTURES
from foveate.serving.vllm.contract import TESTED


def __getattr__(name: str) -> Any:
    if name not in ARCHITECTURES:
        raise AttributeError(name)
    own = getattr(import_module(f"vllm.model_executor.models.{ARCHITECTURES[name]}"), name)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: N807
        if getattr(vllm_config.model_config.hf_config, "foveate", None) is not None:
            from vllm import __version__

            raise FoveateError(
                f"vllm {__version__}: recipes are tested with {TESTED}; install that, or serve without a recipe"
            )
        own.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(name, (own,), {"__init__": __init__, "__module__": __name__})
