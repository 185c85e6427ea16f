"""What a family's configuration says of its pictures and of itself: all that is known before there are weights.

The server's process asks it how many tokens a picture has, in which grids; the worker's, which rows they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from foveate.core.artifact import Fingerprint
from foveate.core.traits import Traits
from foveate.models import llava_next, llava_onevision, qwen_vision
from foveate.models.anatomy import Picture, square_pictures
from foveate.models.llava import feature_block

Pictures = Callable[[Mapping[str, Any]], list[Picture]]
"""What stands behind the placeholders of pictures, given the processor's fields of them (`Anatomy.pictures`)."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: as `foveate.models` has it.
        pictures: given the configuration.
        packed: whether its tower takes all pictures as one sequence; such towers have no CLS, and M-RoPE behind them.
        sites: kinds of vision sites that the family opens under `foveate.attach`.
    """

    name: str
    pictures: Callable[[Any], Pictures]
    packed: bool = False
    sites: frozenset[str] = frozenset()

    def built(self, config: Any) -> int:
        """Blocks of the encoder that vLLM builds: none above the one that feeds the projector."""
        vision = config.vision_config
        return vision.depth if self.packed else feature_block(config.vision_feature_layer, vision.num_hidden_layers) + 1

    def traits(self, config: Any) -> Traits:
        """What methods may know of a model."""
        vision, text = config.vision_config, config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rope = getattr(text, "rope_parameters", None) or {}
        return Traits(
            family=self.name,
            decoder_layers=text.num_hidden_layers,
            encoder_layers=vision.depth if self.packed else vision.num_hidden_layers,
            feature_layer=self.built(config) - 1,
            has_cls=not self.packed and config.vision_feature_select_strategy == "default",
            rotary_rows=3 if self.packed else 1,
            mask_free=False,
            fingerprint=Fingerprint(self.name, text.num_hidden_layers, text.hidden_size, text.vocab_size),
            artifacts={},
            vision_sites=self.sites | {"projected"},
            rotary_axes=tuple(rope.get("mrope_section") or ()) if self.packed else (width // 2,),
            patches=None if self.packed else llava_next.side(config) ** 2,
            one_grid=self.name == "llava",
            heads=text.num_attention_heads,
            projects=True,
        )


def _next(config: Any) -> Pictures:
    from transformers import LlavaNextModel

    pack: Any = LlavaNextModel.pack_image_features
    return llava_next.pictures(config, partial(pack, SimpleNamespace(config=config)))


def _onevision(config: Any) -> Pictures:
    from transformers import LlavaOnevisionModel

    # vLLM shows every picture in detail, however many a prompt has, in nine tiles at most.
    pack: Any = LlavaOnevisionModel.pack_image_features
    found = llava_onevision.pictures_of(config, partial(pack, SimpleNamespace(config=config)))
    return lambda bound: found({"image_sizes": bound["image_sizes"], "vision_aspect_ratio": "anyres_max_9"})


def _qwen(config: Any) -> Pictures:
    return qwen_vision.pictures(config.vision_config.spatial_merge_size)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llava",
            lambda config: square_pictures(llava_next.side(config)),
            sites=frozenset({"patches", "encoder", "middle", "pre_projector"}),
        ),
        Family("llava_next", _next),
        Family("llava_onevision", _onevision),
        Family("qwen2_5_vl", _qwen, packed=True, sites=frozenset({"patches"})),
        Family("qwen3_vl", _qwen, packed=True, sites=frozenset({"patches"})),
    )
}
