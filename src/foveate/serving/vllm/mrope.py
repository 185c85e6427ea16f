"""M-RoPE: what stays of a picture keeps its place in the grid.

vLLM makes positions once, when a request arrives, and knows no picture's rows by then. So all placeholders of a picture get
the position where its grid begins, and text behind it the one that it has without a recipe; where in the grid a row is rides
with its embedding, as six more columns, and is added where the model reads positions. Rows that are not computed (prefix
caching, a chunk of a prompt) need none, and nothing is remembered beyond a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.core.device import upload
from foveate.serving.vllm.fields import COLUMNS, apart, stretched, with_places
from foveate.serving.vllm.model import PruningModel


class PlacingModel(PruningModel):
    """Beside vLLM's model of a family with M-RoPE."""

    _places: tuple[Tensor, Tensor] | None = None

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """What stays of each picture, with places; videos have theirs in vLLM's positions already."""
        made = super().embed_multimodal(**kwargs)
        if self.pruner is None or "pixel_values" in kwargs:
            return made
        return [pad(rows, (0, COLUMNS)) for rows in made]

    def placed(self, rows: Tensor, place: Tensor) -> Tensor:
        """With its place."""
        return with_places(rows, place)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Cut the places off, for this step's `forward`."""
        if self.pruner is not None:
            self._places = None
            if multimodal_embeddings is not None and len(multimodal_embeddings) and is_multimodal is not None:
                parts = [apart(rows) for rows in multimodal_embeddings]
                multimodal_embeddings = [rows for rows, _ in parts]
                where = is_multimodal.cpu().nonzero()[:, 0]  # it is on the host where vLLM made it
                self._places = upload(where, input_ids.device), torch.cat([place for _, place in parts])
        made: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)  # type: ignore[misc]
        return made

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add the places."""
        if self._places is not None and inputs_embeds is not None and positions.ndim == 2:
            where, place = self._places
            positions = positions.index_add(1, where, place.T.to(positions.dtype))
        self._places = None
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Those of the whole pictures, of which placeholders that are there get their grid's first."""
        parent: Any = super()
        if self.pruner is None:
            return parent.get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[no-any-return]
        merge = self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        features = sorted(mm_features, key=lambda each: each.mm_position.offset)
        spans = [
            (
                each.mm_position.offset,
                each.mm_position.length,
                int(each.data["image_grid_thw"].data.prod()) // merge**2 if each.modality == "image" else None,
            )
            for each in features
        ]
        whole, found, columns = stretched(input_tokens, spans)
        moved = [
            replace(each, mm_position=replace(each.mm_position, offset=begin, length=length))
            for each, (begin, length) in zip(features, found)
        ]
        positions, _ = parent.get_mrope_input_positions(whole, moved)
        return positions[:, columns], int(positions.max()) + 1 - len(input_tokens)
