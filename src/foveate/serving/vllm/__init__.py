"""vLLM's plug-in: recipes that act before the language model, on the families of `families`.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). A recipe comes with
``--hf-overrides '{"foveate": {"recipe": "hiprune(keep=64)"}}'``; without one, every class is what it was derived from.
Nothing here imports vLLM but the modules that hold such classes: ``processor``, ``model``, ``mrope``, ``packed``, those of
the families, and ``other``.
"""

from __future__ import annotations

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}
"""What vLLM calls the models of a family, and the module here that holds ours, by the same name."""


def register() -> None:
    """Put our classes in the places of vLLM's own; of another version than those tested, classes that refuse a recipe."""
    from vllm import ModelRegistry, __version__

    from foveate.serving.vllm.contract import tested

    for architecture, module in ARCHITECTURES.items():
        home = module if tested(__version__) else "other"
        ModelRegistry.register_model(architecture, f"{__name__}.{home}:{architecture}")
