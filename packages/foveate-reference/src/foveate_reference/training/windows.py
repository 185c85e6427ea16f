"""The reference model's forward pass for training: on windows of the patch grid, with packed questions.

On the full grid with a single question it computes what the plain Hugging Face forward computes (a test holds it to that).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from foveate.reference.model import TOKEN_IDS, USER
from foveate.tasks.scenes import COLOURS, LETTERS, SHAPES
from foveate.tasks.spine import COLUMNS, GRID, PATCH, ROWS

from .batches import Batch

EARLY = 2


@dataclass(frozen=True)
class Encoded:
    """``visual`` ``[B, C, decoder_width]``: projected patches; ``pooled`` ``[B, vision_width]``: CLS for the text tower.

    ``early`` and ``late`` ``[B, C, vision_width]``: patches after ``EARLY`` encoder layers, and those that are projected.
    """

    visual: torch.Tensor
    early: torch.Tensor
    late: torch.Tensor
    pooled: torch.Tensor


def encode(model: LlavaForConditionalGeneration, batch: Batch) -> Encoded:
    """Run the vision tower and the projector on the window's patches."""
    tower = model.model.vision_tower
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=batch.pixels.device) * 255
    spread = torch.tensor(OPENAI_CLIP_STD, device=batch.pixels.device) * 255
    pixels = ((batch.pixels - mean) / spread).permute(0, 3, 1, 2)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    table = tower.embeddings.position_embedding.weight
    cls = (tower.embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([cls, patches + table[batch.cells + 1]], 1))
    early = late = hidden
    for index, layer in enumerate(tower.encoder.layers):
        if index == len(tower.encoder.layers) + model.config.vision_feature_layer + 1:
            late = hidden
        if index == EARLY:
            early = hidden
        hidden = layer(hidden, None)
    visual = model.model.multi_modal_projector(late[:, 1:])
    return Encoded(visual, early[:, 1:], late[:, 1:], tower.post_layernorm(hidden[:, 0]))


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch, visual: torch.Tensor) -> torch.Tensor:
    """Logits ``[targets, vocabulary]`` at the text positions that have a target, in row order."""
    decoder = model.model.language_model
    rows, cells = batch.cells.shape
    user = torch.full((rows, 1), TOKEN_IDS[USER], device=batch.ids.device)
    embeds = decoder.embed_tokens(torch.cat([user, batch.ids], 1))
    hidden = torch.cat([embeds[:, :1], visual.to(embeds.dtype), embeds[:, 1:]], 1)
    positions = torch.cat([torch.zeros_like(user), batch.places, batch.positions], 1)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    # Additive, as the unfused attention that is fastest on CPUs wants it.
    mask = visual.new_zeros(()).masked_fill(~packed_mask(batch.blocks, cells + 1), -1e4)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    text = hidden[:, cells + 1 :]
    return model.lm_head(decoder.norm(text[batch.targets >= 0]))


def packed_mask(blocks: torch.Tensor, prefix: int) -> torch.Tensor:
    """May query (row) see key (column)? bool ``[B, 1, prefix + T, prefix + T]`` for block numbers ``[B, T]``.

    Causal; text sees the whole prefix and its own block.
    """
    blocks = nn.functional.pad(blocks, (prefix, 0), value=-1)
    same = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == -1)
    return (same & torch.ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool, device=blocks.device).tril())[:, None]


class PatchReadouts(nn.Module):
    """Auxiliary losses on patches, each of which gets the model off one plateau; nothing of this is in the checkpoint.

    *Words*: a projected patch should read as the words for what it shows and where it is: shape, colour and letter by
    cosine with the decoder's own word embeddings, row and column through a linear map each. Visual tokens so start out
    as words, and the decoder finds the picture within minutes.
    *Classes*: shape and letter once more by free linear maps, because the word embeddings of shapes are nearly parallel
    until they can be told apart.
    *Sketch*: after ``EARLY`` layers a patch should know which of its pixels are figure, whatever the colours: what shapes
    and letters are made of.
    """

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.randn(3, width) * 0.02)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.row = nn.Linear(width, width, bias=False)
        self.column = nn.Linear(width, width, bias=False)
        self.shape = nn.Linear(vision_width, len(SHAPES) + 1)
        self.letter = nn.Linear(vision_width, len(LETTERS) + 1)
        self.sketch = nn.Linear(vision_width, PATCH * PATCH)
        for index, names in enumerate((SHAPES, tuple(COLOURS), tuple(LETTERS), ROWS, COLUMNS)):
            self.register_buffer(f"words_{index}", torch.tensor([TOKEN_IDS[name] for name in names]), persistent=False)

    def forward(self, encoded: Encoded, table: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses by name, for the decoder's word embeddings ``table`` ``[vocabulary, width]``."""
        visual, late, early = encoded.visual.float(), encoded.late.float(), encoded.early.float()
        losses = {}
        for index, (name, target) in enumerate(
            (("shape", batch.shapes), ("colour", batch.colours), ("letter", batch.letters))
        ):
            classes = torch.cat([table[self.get_buffer(f"words_{index}")], self.nothing[index : index + 1]])
            losses[f"{name}_word"] = _patch_loss(self._cosines(visual, classes), target)
        losses["row_word"] = _patch_loss(self._cosines(self.row(visual), table[self.words_3]), batch.cells // GRID)
        losses["column_word"] = _patch_loss(self._cosines(self.column(visual), table[self.words_4]), batch.cells % GRID)
        losses["shape_class"] = _patch_loss(self.shape(late), batch.shapes)
        losses["letter_class"] = _patch_loss(self.letter(late), batch.letters)
        # The mean over pixels would be a 64th of the patch's likelihood; eight weighs as much as the other losses.
        sketch = nn.functional.binary_cross_entropy_with_logits(self.sketch(early), batch.sketches.float())
        losses["sketch"] = 8 * sketch
        return losses

    def _cosines(self, features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self.scale.exp() * nn.functional.normalize(features, dim=-1) @ nn.functional.normalize(classes, dim=-1).T


def _patch_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for ``logits`` ``[B, C, classes]``."""
    balance = torch.ones(logits.shape[-1], device=logits.device)
    if logits.shape[-1] != GRID:
        # The last class means nothing, which most patches show; unweighted it would drown the rest.
        balance[-1] = 0.2
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), balance)
