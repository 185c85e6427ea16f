"""The benchmarks of lmms-eval on a model under a recipe.

    lmms-eval --model foveate --model_args "pretrained=reference,recipe=hiprune(keep=64)" --tasks mme

lmms-eval finds the model through the entry-point group ``lmms_eval.models``, which names `manifest`.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model ``foveate``, for lmms-eval's registry."""
    # Whoever imports this package for another reason need not have lmms-eval.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("foveate", chat_class_path="foveate.bench.lmms.model.Foveate")
