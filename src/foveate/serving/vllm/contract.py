"""All that the plug-in takes of vLLM which vLLM does not promise: names, and what they are called with.

`moved` compares them with the vLLM that is there; a test of the serving environment does, and says what is to be looked at.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from operator import attrgetter

TESTED = "0.32"
"""The release that the plug-in is tested with."""

_MODELS = "vllm.model_executor.models"
_BASE = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"

SIGNATURES = {
    f"{_BASE}.get_dummy_inputs": "self seq_len mm_counts mm_options",
    f"{_BASE}.apply": "self inputs timing_ctx",
    f"{_BASE}._get_mm_hashes": "self inputs",
    f"{_BASE}._apply_hf_processor_main": "self mm_items hf_kwargs",
    f"{_BASE}._get_mm_fields_config": "self hf_inputs hf_processor_mm_kwargs",
    f"{_BASE}._get_prompt_updates": "self mm_items hf_processor_mm_kwargs out_mm_kwargs",
    "vllm.multimodal.processing.processor:PromptReplacement": "modality target replacement",
    "vllm.multimodal.processing.inputs:ProcessorInputs": (
        "prompt mm_data_items mm_uuid_items hf_processor_mm_kwargs media_io_kwargs cache"
    ),
    "vllm.multimodal.processing.context:BaseProcessingInfo.get_mm_max_tokens_per_item": "self seq_len mm_counts",
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": "modality keep_on_cpu",
    "vllm.multimodal.inputs:MultiModalFeatureSpec": "data modality identifier mm_position mm_hash",
    "vllm.multimodal.inputs:PlaceholderRange": "offset length is_embed",
    "vllm.multimodal.registry:MultiModalRegistry.register_processor": "self processor info dummy_inputs",
    f"{_MODELS}.interfaces:SupportsMultiModal.embed_multimodal": "self kwargs",
    f"{_MODELS}.interfaces:SupportsMultiModal.embed_input_ids": "self input_ids multimodal_embeddings is_multimodal",
    "vllm.model_executor.layers.attention:MMEncoderAttention.forward_native": (
        "self query key value cu_seqlens max_seqlen sequence_lengths"
    ),
    f"{_MODELS}.llava:LlavaForConditionalGeneration.forward": (
        "self input_ids positions intermediate_tensors inputs_embeds kwargs"
    ),
    f"{_MODELS}.llava:_build_llava_or_pixtral_hf_info": "ctx",
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.forward": (
        "self input_ids positions intermediate_tensors inputs_embeds kwargs"
    ),
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions": "self input_tokens mm_features",
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer.get_window_index_thw": "self grid_t grid_h grid_w",
    f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration.forward": (
        "self input_ids positions intermediate_tensors inputs_embeds kwargs"
    ),
    f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration.get_mrope_input_positions": "self input_tokens mm_features",
}
"""Parameters of each, in order."""

NAMES = (
    f"{_MODELS}.llava:LlavaMultiModalProcessor",
    f"{_MODELS}.llava:LlavaDummyInputsBuilder",
    f"{_MODELS}.llava:LlavaProcessingInfo",
    f"{_MODELS}.llava_next:LlavaNextMultiModalProcessor",
    f"{_MODELS}.llava_next:LlavaNextProcessingInfo",
    f"{_MODELS}.llava_onevision:LlavaOnevisionMultiModalProcessor",
    f"{_MODELS}.llava_onevision:LlavaOnevisionProcessingInfo",
    f"{_MODELS}.llava_onevision:LlavaOnevisionDummyInputsBuilder",
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLMultiModalProcessor",
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLProcessingInfo",
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLDummyInputsBuilder",
    f"{_MODELS}.qwen3_vl:Qwen3VLMultiModalProcessor",
    f"{_MODELS}.qwen3_vl:Qwen3VLProcessingInfo",
    f"{_MODELS}.qwen3_vl:Qwen3VLDummyInputsBuilder",
    "vllm.multimodal.parse:EmbeddingItems",
    "vllm.multimodal.parse:DictEmbeddingItems",
    "vllm.config.compilation:CUDAGraphMode.has_full_cudagraphs",
    "vllm.config.scheduler:SchedulerConfig.max_num_encoder_input_tokens",
)
"""Others."""


def tested(version: str) -> bool:
    """Whether the plug-in is tested with a version of vLLM."""
    return version == TESTED or version.startswith((f"{TESTED}.", f"{TESTED}+"))


def moved(version: str) -> list[str]:
    """What is not where it was, or is called with other arguments, in the vLLM that is there; a line each."""
    found = []
    for name in (*SIGNATURES, *NAMES):
        module, _, path = name.partition(":")
        try:
            there = attrgetter(path)(import_module(module))
        except (ImportError, AttributeError) as error:
            if path.split(".")[-1] not in getattr(_owner(module, path), "__annotations__", {}):
                found.append(f"vLLM {version}: {name} is gone ({error})")
            continue
        known = SIGNATURES.get(name)
        now = " ".join(inspect.signature(there).parameters) if known is not None else None
        if now != known:
            found.append(f"vLLM {version}: {name} is called with {now!r}, and was with {known!r}")
    return found


def _owner(module: str, path: str) -> object:
    """What a field of a dataclass without a default is named in."""
    try:
        return attrgetter(path.rpartition(".")[0])(import_module(module)) if "." in path else None
    except (ImportError, AttributeError):
        return None
