"""What a method may know of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.positions import Positions


@dataclass(frozen=True)
class TowerTraits:
    """One of several encoders.

    Attributes:
        first: number of its first block, counted over the blocks of all encoders, as in sites.
        feature_layer: its own number of the block whose output feeds its projector.
        has_cls: whether it has a CLS token.
        tokens: of an image in the encoder, CLS not counted; None where images differ.
    """

    first: int
    feature_layer: int
    has_cls: bool
    tokens: int | None


@dataclass(frozen=True)
class Traits:
    """What a method may know of a model when it is attached.

    Attributes:
        family: the model family.
        decoder_layers: layers of the language model.
        encoder_layers: blocks of the vision encoder, or None where its signals cannot be read.
        feature_layer: block of the encoder whose output feeds the projector.
        has_cls: whether the encoder has a CLS token.
        rotary_rows: rows of the rotary positions (1; 3 or 4 for M-RoPE).
        mask_free: whether the attention kernel takes no 4-D mask (FlashAttention).
        fingerprint: what artifacts are bound to.
        artifacts: calibrated numbers at hand, by method name.
        vision_sites: kinds of vision sites where rows may be dropped or merged; ``"middle"`` stands for the place between
            attention and MLP of encoder blocks, ``"tiles"`` for behind its blocks where some rows of a tile are no tokens
            (borders): they may be dropped there, but not merged, and how many tokens are left is not known.
        rotary_axes: frequencies of each axis of the rotary embedding: one number, or three under M-RoPE.
        recurrent: decoder layers with a recurrent state instead of attention.
        sliding: decoder layers with sliding attention.
        cell: pixels ``(channels, rows, columns)`` that make one token, where the patches site is open.
        merge: patches on each side of such a cell.
        companion: whether a text tower was given.
        patches: tokens of an image in the encoder, CLS not counted; None where images differ.
        one_grid: whether every picture gets the same grid, whatever its size.
        experts: how many experts the router chooses for each row; None for a dense model.
        sparse: decoder layers with experts.
        heads: of a decoder layer's attention.
        projects: whether single tokens can be asked for what the projector makes of them.
        reuses: whether blocks of the encoder can run for some rows of a frame (`foveate.core.reuse.Reuse`).
        hears: whether prompts may have sound, and what its encoder attends to can be read.
        sees: whether prompts may have pictures; not those of a text model.
        towers: the encoders, where there are several; what is said of *the* encoder is then unknown.
    """

    family: str
    decoder_layers: int
    encoder_layers: int | None
    feature_layer: int | None
    has_cls: bool
    rotary_rows: int
    mask_free: bool
    fingerprint: Fingerprint
    artifacts: Mapping[str, Artifact]
    vision_sites: frozenset[str] = frozenset()
    rotary_axes: tuple[int, ...] = ()
    recurrent: tuple[int, ...] = ()
    sliding: tuple[int, ...] = ()
    cell: tuple[int, int, int] | None = None
    merge: int = 1
    companion: bool = False
    patches: int | None = None
    one_grid: bool = False
    experts: int | None = None
    sparse: tuple[int, ...] = ()
    heads: int = 1
    projects: bool = False
    reuses: bool = False
    hears: bool = False
    sees: bool = True
    towers: tuple[TowerTraits, ...] = ()

    def numbers(self, method: str, parameters: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The numbers of the artifact of ``method``, None if there is none.

        Raises:
            FoveateError: if they were made on another model, or with other ``parameters`` of the method.
        """
        artifact = self.artifacts.get(method)
        if artifact is None:
            return None
        artifact.check(self.fingerprint, parameters)
        return artifact.numbers

    def refuse_sites(self, *kinds: str) -> str | None:
        """Why rows cannot be dropped at vision sites of these kinds; None if they can."""
        for kind in kinds:
            if kind not in self.vision_sites:
                there = ", ".join(sorted(self.vision_sites)) or "none"
                return f"needs the site {kind!r}, which {self.family} does not offer (its vision sites: {there})"
        return None

    def same_depth(self, layers: Sequence[int], of: int) -> tuple[int, ...]:
        """Decoder layers at the same shares of the depth as ``layers`` of ``of``: at least 1, strictly ascending."""
        found: list[int] = []
        for layer in layers:
            found.append(max(round(layer * self.decoder_layers / of), found[-1] + 1 if found else 1))
        return tuple(found)

    def refuse_positions(self, positions: Positions | None) -> str | None:
        """Why what stays cannot be numbered so: contiguous positions have no meaning under M-RoPE; None if it can."""
        if positions == "contiguous" and self.rotary_rows > 1:
            return f"positions='contiguous': {self.family} has multi-row rotary positions; use 'anchor', 'rank' or 'auto'"
        return None

    def refuse_layers(
        self, parameter: str, value: int | tuple[int, ...], attention: Sequence[int] = (), least: int = 1
    ) -> str | None:
        """Why rows cannot go before the decoder layers in ``value`` of ``parameter``, given the ``attention`` of others.

        ``least``: 0 where a method takes 0 for the place before the language model.
        """
        layers = (value,) if isinstance(value, int) else value
        if any(not least <= layer < self.decoder_layers for layer in layers):
            return f"{parameter}={value}: must be in {least}..{self.decoder_layers - 1}"
        recurrent = sorted(set(attention) & set(self.recurrent))
        if recurrent:
            return f"{parameter}={value}: reads the attention of layers {recurrent}, which are recurrent; choose others"
        return None
