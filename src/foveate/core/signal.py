"""What a method asks to see. The engine records exactly that, beside fused kernels, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from foveate.core.reduction import Reduction


@dataclass(frozen=True)
class Site:
    """A place in the model, in the order in which a request meets them.

    ``patches`` (before the vision encoder), ``encoder[i]`` (a block of the encoder; ``part`` is before, in the *middle*
    between attention and MLP, or after it), ``pre_projector``, ``projected`` (behind it), ``sequence`` (before the language
    model), ``decoder[i]`` (before a layer of the language model).
    """

    kind: Literal["patches", "encoder", "pre_projector", "projected", "sequence", "decoder"]
    layer: int = 0
    part: Literal["before", "middle", "after"] = "before"

    def __str__(self) -> str:
        if self.kind not in ("encoder", "decoder"):
            return self.kind
        return f"{self.kind}[{self.layer}]" + ("" if self.part == "before" else f".{self.part}")

    @property
    def in_vision(self) -> bool:
        """Whether rows there are those of images (tiles), not of prompts."""
        return self.kind not in ("sequence", "decoder")


@dataclass(frozen=True)
class Rows:
    """Attention rows at a site, delivered as `Attention`.

    Attributes:
        site: where.
        queries: ``"cls"`` (encoder sites), the last ``queries`` rows of each prompt, or ``"question"``: the text rows
            behind the last visual row of this turn (see `foveate.core.layout.Layout.question`), padded on the left.
        keys: over the keys of the current rows, or of the whole ``"cache"``, earlier turns included.
    """

    site: Site
    queries: Literal["cls", "question"] | int = 1
    keys: Literal["rows", "cache"] = "rows"


@dataclass(frozen=True)
class Columns:
    """Attention received by each key at a site: the mean over heads and over the queries that can see the key.

    Streamed in chunks of queries, never as a full map. Delivered as ``[B, n]``, float32: at encoder sites one row for
    each image, CLS column dropped; at decoder sites one for each sample.

    Attributes:
        by_head: at decoder sites, of each key-value head by itself, the mean over its query heads: ``[B, n, Hkv]``.
    """

    site: Site
    by_head: bool = False


@dataclass(frozen=True)
class Features:
    """What the projector is fed: encoder features of each image ``[I, n, D]``, CLS dropped.

    Attributes:
        cells: all rows that a token is made of, end to end ``[I, n, g * D]``, instead of their mean.
    """

    cells: bool = False


@dataclass(frozen=True)
class Summary:
    """Summary rows (CLS) of the encoder beside its features: ``[I, p, D]``. Delivered at the site ``pre_projector`` only."""


@dataclass(frozen=True)
class Keys:
    """Mean over heads of the keys that enter an encoder block's attention. Delivered ``[I, n, d]``, float32, CLS dropped."""

    site: Site


@dataclass(frozen=True)
class Pixels:
    """Pixels of each token, normalised as the encoder gets them: ``[I, n, P]``, P as `Traits.cell` says.

    At the language model's sites, of encoders that offer the site *patches*.
    """


@dataclass(frozen=True)
class Aligned:
    """Encoder features in the space of the companion's text tower: ``[I, n, d]``. Needs a companion."""


@dataclass(frozen=True)
class Question:
    """The companion's embeddings of each prompt's question: a list of ``[M, d]``, by sample. Needs a companion."""


@dataclass(frozen=True)
class Ids:
    """Ids of the tokens ``[B, n]``, in steps of decoding, too. A merged row has its anchor's, a row put in that of the one
    before; those of padding mean nothing.
    """


@dataclass(frozen=True)
class Heard:
    """Attention that each row of sound gets in the last block of its encoder ``[B, n]``, float32, 0 for all other rows.

    The mean over heads and over all queries of the same sound. At the language model's sites, of prompts with sound; only
    where `foveate.core.traits.Traits.hears`.
    """


@dataclass(frozen=True)
class QueryKey:
    """Queries ``[B, H, n, d]`` and keys ``[B, Hkv, n, d]`` that enter a site's attention.

    At encoder sites of all rows, CLS included; at decoder sites rotated, of the current rows. At the site ``pre_projector``,
    where rows are tokens, each is the mean over a token's cells, if it has several.
    """

    site: Site


@dataclass(frozen=True)
class Values:
    """Values ``[I, H, n, d]`` that enter an encoder block's attention, of all rows, CLS included."""

    site: Site


@dataclass(frozen=True)
class KeyValue:
    """Keys (rotated) and values ``[B, Hkv, n, d]`` that a decoder layer made of the current rows."""

    site: Site


@dataclass(frozen=True)
class Hidden:
    """Hidden states ``[B, n, D]`` that entered a decoder layer."""

    site: Site


@dataclass(frozen=True)
class Halves:
    """Input (after its norm) and output (before the residual) of both halves of a decoder layer.

    Delivered as ``((x, y) of the attention, (x, y) of the MLP)``, each ``[B, n, D]``.
    """

    site: Site


@dataclass(frozen=True)
class Function:
    """A part of the model as a function, called by the method itself under its own chunking.

    * ``query_key``: ``f(x [B, n, D], layout, rope=True)`` -> queries ``[B, H, n, d]`` and keys ``[B, Hkv, n, d]`` that
      decoder ``layer`` makes of its input rows (its norm, projections and, if asked, rotation); the logits' factor is
      ``d ** -0.5``, whatever the family's own.
    * ``norm``: ``f(x)``, the input norm of decoder ``layer``, or the final norm if ``layer`` is None.
    * ``head``: ``f(x [..., D])`` -> logits ``[..., V]``, without the final norm.
    * ``embedding``: ``f(ids)`` -> ``[..., D]``.
    * ``projector``: ``f(cells [..., g * D])`` -> ``[..., D']``, the tokens that the projector makes of these rows
      (see `Features`), in float32 if they are; only where `foveate.core.traits.Traits.projects`. With ``rank``, by a copy
      of the projector whose linear layers have no larger rank than that, in float32.
    * ``rotate``, ``unrotate``: ``f(x [B, H, n, d], positions [R, B, n])``.
    * ``through``: ``f(x [B, N, D])`` -> ``[B, N, D]``, what would enter decoder ``layer`` if ``x`` entered the first one in
      the place of the current rows, with their positions and what they may see. The layers before it run plain: nothing is
      recorded or cached and no other method acts. Gradients pass if they are on and ``x`` is no tensor made in inference
      mode (`foveate.ops.gradients`). At the site ``sequence`` only.
    """

    name: Literal["query_key", "norm", "head", "embedding", "projector", "rotate", "unrotate", "through"]
    layer: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Scorer:
    """A press of the library kvpress as a function, on a decoder layer; only where that is installed.

    Delivered as ``f(x [1, n, D], positions [R, 1, n], keys, values [1, Hkv, n, d], drop, spared [1, n])`` -> scores
    ``[1, Hkv, n]`` (float32) of the entries of one prompt, without padding. ``x`` is what entered the layer, ``drop`` how
    many entries are to go. Presses that choose by themselves (not `kvpress.ScorerPress`) give -inf to what goes, nothing of
    which is ``spared`` (bool, or None), and 0 to the others.

    Attributes:
        press: as Python writes it, with its options: ``"SnapKVPress(window_size=16)"``.
        layer: of the decoder.
    """

    press: str
    layer: int


@dataclass(frozen=True)
class Numbers:
    """The numbers of the artifact of ``method``, by name; tensors among them on the model's device.

    A method asks for its own once `check` has found that they are there and fit the model.
    """

    method: str


@dataclass(frozen=True)
class Seed:
    """The session's seed, an int, for methods that draw and get no `State` (`foveate.ops.draw`)."""


@dataclass(frozen=True)
class Side:
    """What the caller handed over beside the pictures under a name (``Session.side``): a depth map, an audio track, ...

    Delivered at every site as a `ByItem` whose ``of`` gives a list: for each item the value of the picture or video that it
    shows, None where there is none, tensors on the model's device. At vision sites items are ``(row of the batch, 0)``.

    Attributes:
        name: as the caller writes it.
        needed: whether a picture without it is refused before it is encoded.
    """

    name: str
    needed: bool = True


Signal = (
    Rows
    | Columns
    | Keys
    | Features
    | Pixels
    | Summary
    | Aligned
    | Question
    | Ids
    | Heard
    | QueryKey
    | Values
    | KeyValue
    | Hidden
    | Halves
    | Function
    | Scorer
    | Numbers
    | Seed
    | Side
)


@dataclass(frozen=True)
class Attention:
    """Rows of attention before the softmax, so that any card's softmax can be formed.

    Attributes:
        logits: ``[B, H, Q, K]`` float32, scaled, masked keys and padding queries at -inf.
        lse: ``[B, H, Q]`` log-sum-exp over *all* keys, also those of earlier turns (0 for padding queries).
    """

    logits: Tensor
    lse: Tensor

    def probabilities(self) -> Tensor:
        """``[B, H, Q, K]`` softmax over all keys."""
        return (self.logits - self.lse[..., None]).exp()

    def __getitem__(self, batch: Tensor) -> Attention:
        """The rows of some entries of the batch."""
        return Attention(self.logits[batch], self.lse[batch])

    def to(self, device: torch.device) -> Attention:
        """The same on ``device``."""
        return Attention(self.logits.to(device), self.lse.to(device))

    def after(self, reduction: Reduction) -> Attention:
        """The same rows over the keys that live on after an edit of the sequence."""
        keys = self.logits.permute(0, 3, 1, 2)
        kept = reduction.take(keys).masked_fill(~reduction.valid[..., None, None], float("-inf"))
        return Attention(kept.permute(0, 2, 3, 1), self.lse)


@runtime_checkable
class ByItem(Protocol):
    """An encoder signal as it is delivered at the sequence site, where rows are those of prompts; `Side` data anywhere."""

    def of(self, items: Sequence[tuple[int, int]]) -> Any:
        """The signal of some items, given as (sample, number), that have n tokens alive each: ``[I, n, ...]``.

        Attention rows come as `Attention` with K = n, `Side` data as a list of I values.
        """


Seen = Mapping[Signal, Any]
"""What was recorded, by the signal that asked for it. `Hidden`, `Halves`, `QueryKey` and `KeyValue` of a layer are there
until the next layer's edits are made; everything else stays to the end of the forward."""


def on(value: Any, device: torch.device) -> Any:
    """A recorded signal (or numbers, or several) on ``device``; functions and signals by picture as they are."""
    if isinstance(value, Tensor | Attention):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(on(part, device) for part in value)
    if type(value) is dict:
        return {name: on(part, device) for name, part in value.items()}
    return value


def follow(value: Any, reduction: Reduction) -> Any:
    """A recorded signal after an edit of the rows that it is about; what is about other rows, and functions, stay.

    Rows are the second dimension, the third of queries, keys and values, and the keys of attention. Integers are names, and
    not summed.
    """
    value = on(value, reduction.anchor.device)
    if isinstance(value, Attention):
        return value.after(reduction) if value.logits.shape[-1] == reduction.inputs else value
    if isinstance(value, tuple):
        return tuple(follow(part, reduction) for part in value)
    if not isinstance(value, Tensor):
        return value
    rows = value.transpose(1, 2) if value.ndim == 4 else value
    if rows.ndim < 2 or rows.shape[1] != reduction.inputs:
        return value
    rows = reduction.apply(rows) if rows.is_floating_point() else reduction.take(rows)
    return rows.transpose(1, 2) if value.ndim == 4 else rows
