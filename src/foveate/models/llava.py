"""LLaVA-1.5: a CLIP or SigLIP encoder, an MLP projector, one square grid of tokens an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.models.anatomy import Anatomy, Encoder, Halves, Patches, Projections, square_pictures
from foveate.models.decoder import layers_of


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``LlavaForConditionalGeneration``."""
    config, inner = model.config, model.model
    return Anatomy(
        family="llava",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=layers_of(inner.language_model),
        image_tokens=(config.image_token_id,),
        pictures=square_pictures(config.vision_config.image_size // config.vision_config.patch_size),
        encoder=encoder(config, inner, frozenset({"patches", "encoder", "middle", "pre_projector"})),
        one_grid=True,
        config=config.text_config,
    )


def blocks(tower: Any) -> nn.ModuleList:
    """The blocks of a CLIP or SigLIP tower, which some versions of transformers nest one level deeper."""
    return getattr(tower, "vision_model", tower).encoder.layers


def feature_block(feature_layer: int | Sequence[int], blocks: int) -> int:
    """Number of the block whose output ``vision_feature_layer`` (a number, or a list of one) means.

    Raises:
        FoveateError: if it means several, or the embedding before the first block.
    """
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    if len(layers) != 1:
        raise FoveateError(f"vision_feature_layer={feature_layer}: several feature layers are not supported; use one")
    # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i - 1.
    block = layers[0] - 1 if layers[0] >= 0 else blocks + layers[0]
    if not 0 <= block < blocks:
        raise FoveateError(f"vision_feature_layer={feature_layer}: must be the output of one of {blocks} encoder blocks")
    return block


def halves(block: Any) -> Halves:
    """The parts of a CLIP or SigLIP block."""
    attention = block.self_attn
    projections = Projections(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return Halves(block.layer_norm1, attention, block.layer_norm2, block.mlp, projections)


def square_patches(vision: Any) -> Patches:
    """Square pictures cut into cells; the engine drops rows behind the patch embedding, which costs next to nothing."""
    size = vision.patch_size

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        images, channels, height, width = pixels.shape
        # Like the patch embedding, leave out what does not fill a patch (SigLIP: 384 pixels, 14 a patch).
        rows, columns = height // size, width // size
        pixels = pixels[..., : rows * size, : columns * size]
        cells = pixels.reshape(images, channels, rows, size, columns, size)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size, size)

    return Patches(cell=(vision.num_channels, size, size), read=read)


def encoder(config: Any, inner: Any, sites: frozenset[str]) -> Encoder:
    """The parts of a CLIP or SigLIP tower in front of a projector."""
    layers = blocks(inner.vision_tower)
    return Encoder(
        blocks=layers,
        attention=[layer.self_attn for layer in layers],
        feature_layer=feature_block(config.vision_feature_layer, len(layers)),
        prefix=int(config.vision_feature_select_strategy == "default"),
        projector=inner.multi_modal_projector,
        tile=(config.vision_config.image_size // config.vision_config.patch_size) ** 2,
        sites=sites,
        halves=halves,
        patches=square_patches(config.vision_config) if "patches" in sites else None,
    )
