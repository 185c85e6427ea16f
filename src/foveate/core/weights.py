"""The protocol of methods that replace weights by whole numbers, one block of the model after the other.

A `Weights` method is handed a `Block` at a time: the linears of a decoder layer (or encoder block) in groups that share one
input, what the calibration samples feed them, and the block itself to try things on. For each linear that it replaces it
hands back a `Replaced`. How blocks come by, where results go and what stands in the model later is the engine's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.method import Method
from foveate.core.parameters import AtLeast
from foveate.core.shape import FLOAT, Shape
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable

Stream = Literal["exact", "reached"]
"""What feeds a block: the unmodified model (``exact``), or the model with all that has been placed so far (``reached``)."""

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
"""Bits of a whole number; 16 stands for the model's own floats."""

GroupSize = Annotated[int, AtLeast(8)] | Literal[-1]
"""Inputs that share a step; -1 = all of a row."""


SLAB = 1 << 22
"""Weights that are unpacked at a time, at most, where no kernel takes them as they are."""


class Steps(Protocol):
    """A grid as `foveate.ops.grid.Grid` is one: ``integers`` ``[out, in]`` stand for ``(integer - zero) * scale``."""

    @property
    def bits(self) -> int:
        """Of an integer, 2 to 8."""

    @property
    def scale(self) -> Tensor:
        """``[out, groups]`` what a step is worth."""

    @property
    def zero(self) -> Tensor | None:
        """``[out, groups]`` the integer that stands for 0; None = symmetric, integers lie around 0."""

    def values(self, integers: Tensor) -> Tensor:
        """What ``integers`` ``[out, in]`` stand for, in the dtype of `scale`."""

    def rounded(self, weight: Tensor) -> Tensor:
        """``weight`` ``[out, in]`` moved to the nearest points of the grid; anything ``[..., in]``, if there is one step."""


@dataclass(frozen=True, eq=False)
class Sparse:
    """A few entries that are added to a weight ``[out, in]``, row after row.

    Attributes:
        counts: ``[out]`` integers: how many a row has.
        index: ``[n]`` integers: which input each is of, within a row in order.
        integers: ``[n]`` int8.
        scale: ``[out, 1]`` what a step is worth.
        bits: of an integer.
    """

    counts: Tensor
    index: Tensor
    integers: Tensor
    scale: Tensor
    bits: int = 8

    @classmethod
    def of(cls, integers: Tensor, scale: Tensor, bits: int = 8) -> Self | None:
        """The entries of ``integers`` ``[out, in]`` that are not 0; None = there are none."""
        there = integers != 0
        if not bool(there.any()):
            return None
        # Numbers of inputs, and how many of them there are, take two bytes where that is enough.
        kind = torch.int16 if integers.shape[1] < 2**15 else torch.int32
        index = there.nonzero()[:, 1].to(kind)
        return cls(there.sum(1).to(kind), index, integers[there].to(torch.int8), scale, bits)

    def added(self, weight: Tensor) -> Tensor:
        """``weight`` ``[out, in]``, changed in place to what it is with the entries."""
        counts, (out, inputs) = self.counts.int(), weight.shape

        def each(of_rows: Tensor) -> Tensor:
            return of_rows.repeat_interleave(counts, output_size=len(self.index))

        at = each(torch.arange(0, out * inputs, inputs, device=weight.device)) + self.index
        weight.view(-1).index_add_(0, at, (self.integers * each(self.scale[:, 0])).to(weight.dtype))
        return weight


@dataclass(frozen=True, eq=False)
class Side:
    """A product of low rank beside ``W'``: ``x' down^T up`` is added, of the divided input ``x'`` as it was before rounding.

    Attributes:
        down: ``[E, r, in]``.
        up: ``[E, r, out]``.
        router: ``[E, in]`` of the E products each row gets the one whose ``router |x'|`` is least, the first of equals;
            None = there is one, for all.
    """

    down: Tensor
    up: Tensor
    router: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ForRoles:
    """What rows of some roles get otherwise than all others.

    Attributes:
        roles: which rows (`foveate.core.roles.Role`).
        divide: ``[in]`` their input is divided by it, instead of by `Replaced.divide`.
        sides: what is added for them, besides.
    """

    roles: tuple[int, ...]
    divide: Tensor
    sides: tuple[Side, ...] = ()


@dataclass(frozen=True, eq=False)
class Replaced:
    """What stands for a linear: ``y = round(x / divide) W'^T + bias``, ``W'`` on a grid, ``round`` to ``activations`` bits.

    The bias is the linear's own, and sides are added, if there are any.

    Attributes:
        grid: what integers stand for; its steps are in the dtype of the model's weights already, or exact in it.
        integers: ``[out, in]`` int8 (symmetric) or uint8.
        divide: ``[in]`` the input is divided by it first; None = it is not. ``W'`` stands for ``W * divide`` then.
        activations: bits that each row of the (divided) input is rounded to, on a symmetric grid of its own
            range; 16 = none.
        sparse: entries that are added to ``W'``.
        sides: products of low rank that are added, for all rows.
        by_role: what rows of some roles get otherwise. A step of decoding is text.
        inputs: the grid of so many bits, with one step ``[1, 1]`` and one zero for all, that rows are rounded to instead.
    """

    grid: Steps
    integers: Tensor
    divide: Tensor | None = None
    activations: int = 16
    sparse: Sparse | None = None
    sides: tuple[Side, ...] = ()
    by_role: tuple[ForRoles, ...] = ()
    inputs: Steps | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one batch that reach a linear, padding left out.

    Attributes:
        x: ``[n, in]``.
        role: ``[n]`` what each row is (`foveate.core.roles.Role`); rows of an answer have the role ANSWER.
        sample: ``[n]`` which of the batch's samples it is of.
    """

    x: Tensor
    role: Tensor
    sample: Tensor


Stand = Callable[[Tensor], Tensor]
"""What may stand for a linear's product with its weight: inputs ``[..., in]`` to outputs ``[..., out]``."""


class Inspected(Protocol):
    """A part of a block on one batch: the block, its attention, its MLP, or a linear alone.

    Attributes:
        x: ``[B, T, D]`` what enters it.
        role: ``[B, T]`` of each row; PAD where there is none.
        linears: names of all that are in it.
    """

    @property
    def x(self) -> Tensor:
        """``[B, T, D]`` what enters it."""

    @property
    def role(self) -> Tensor:
        """``[B, T]`` of each row; PAD (0) where there is none."""

    @property
    def linears(self) -> Sequence[str]:
        """Names of all linears that are in it."""

    def run(self, x: Tensor, stands: Mapping[str, Stand] | None = None) -> Tensor:
        """``[B, T, D']`` what it makes of ``x`` ``[B, T, D]``, with other linears for those named; differentiable in both.

        Biases are the model's own, and so are linears that are not named, whatever has been placed.
        """


class Block(Protocol):
    """A decoder layer, or encoder block, with all that the calibration samples make of it.

    Linears are named as within the block: ``self_attn.q_proj``.
    """

    @property
    def number(self) -> int:
        """Of the block."""

    @property
    def groups(self) -> Sequence[tuple[str, ...]]:
        """Linears that share one input, in the order of the forward."""

    @property
    def dtype(self) -> Any:
        """The dtype of the model's weights, in which steps are stored."""

    def weight(self, name: str) -> Tensor:
        """``[out, in]`` of a linear, float32."""

    def feeder(self, name: str) -> str | None:
        """The linear whose output channels are, one for one and times something, the inputs of this one: v_proj of o_proj
        (not where heads share values), up_proj of down_proj. None: there is none in the block.
        """

    def exact(self, name: str) -> Iterator[Rows]:
        """Of each batch what the unmodified model feeds a linear (and all others of its group)."""

    def reached(self, name: str) -> Iterator[Rows]:
        """The same of the model with all that has been placed so far, in this block and before it."""

    def inspect(self, names: Sequence[str], stream: Stream = "exact") -> Iterator[Inspected]:
        """Of each batch the smallest part of the block that is fed by what these linears of one group share: its attention
        or MLP for several, the linear itself for one; the whole block for none. The part's input is theirs.
        """

    def slopes(self, name: str) -> Sequence[Sequence[Rows]]:
        """For each block and batch the mean size ``[n, 1]`` of the gradient at the output of a linear of this name: that of
        the model's loss on the answers (on the last row's likeliest word, where there is none). The whole model runs
        forward and backward for it, once.
        """

    def pull(self, batch: int, made: Tensor, temperature: float = 1.0) -> Tensor:
        """The gradient at ``made``, were it what the block puts out for a batch, of how far the model's answers move.

        That is the divergence of what it then says from what it says unquantized, logits divided by ``temperature``; all
        other blocks are as they were. The whole model runs forward and backward for it.
        """

    def place(self, name: str, replaced: Replaced) -> None:
        """From here on ``replaced`` stands for a linear."""

    def say(self, text: str) -> None:
        """Tell whoever follows something that went otherwise than usual, in a line."""


@dataclass(frozen=True)
class Weights(Method):
    """Replaces the weights of linears by whole numbers, made once and kept in an artifact."""

    part: ClassVar[Literal["decoder", "encoder"]] = "decoder"
    """Whose blocks it replaces linears of."""
    streams: ClassVar[tuple[Stream, ...]] = ("exact",)
    """What it looks at; none: it needs no samples."""
    ordinary: ClassVar[bool] = True
    """Whether a linear is no more than its integers and what its input is divided by, which others load, too."""

    bits: Bits = 4
    """Bits of a weight; 16 leaves the model as it is."""
    group_size: GroupSize = -1
    """Neighbouring inputs of a row that share a step (it must divide the inputs of each linear); -1 = the whole row."""
    symmetric: bool = True
    """Whether grids are symmetric; if not, each step has a zero point, too."""
    activations: Bits = 16
    """Bits that each row of a linear's input is rounded to on the way; 16 = none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.activations == 16 or self.bits < 16, "activations", "needs weights of 8 bits or less (bits)")

    @abstractmethod
    def quantize(self, block: Block) -> None:
        """Place what stands for the linears of ``block``; those for which nothing is placed stay as they are."""

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Nothing is to be varied: an artifact is of one setting."""
        return {field.name: (field.default,) for field in fields(self)}

    @property
    def plain(self) -> bool:
        """Whether it leaves the model as it is."""
        return self.bits == 16

    def workspace(self, shape: Shape) -> int:
        """Some rows of a weight, unpacked; what stands for the weights themselves is not counted."""
        largest = max(shape.width * max(shape.inner, shape.heads * shape.head_width), 4 * shape.image_width**2)
        return shape.edits + 4 * FLOAT * min(largest, SLAB)

    def bound(self) -> dict[str, Any]:
        """The parameters that an artifact depends on: all."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def artifact(
        self, fingerprint: Fingerprint, numbers: Mapping[str, Any], files: Mapping[str, Path] | None = None
    ) -> Artifact:
        """``numbers`` and ``files`` that were made with these parameters on the model with ``fingerprint``."""
        return Artifact(self.name, fingerprint, numbers, self.bound(), files or {})

    def check(self, traits: Traits) -> str | None:
        """Refused without an artifact; artifacts of other weights or parameters are, too."""
        return self.refuse_experts(traits) or self._refuse_encoder(traits) or self._refuse_missing(traits)

    def refuse_experts(self, traits: Traits) -> str | None:
        """Why weights of a model with experts cannot be replaced; None where there are none."""
        if not traits.sparse or self.part != "decoder" or self.plain:
            return None
        first = traits.sparse[0]
        return f"decoder layer {first} has experts, which lie in one tensor and are not quantized; use a dense model"

    def _refuse_encoder(self, traits: Traits) -> str | None:
        if self.part == "decoder" or self.plain or traits.encoder_layers is not None:
            return None
        return f"replaces weights of the encoder, in which nothing can be read ({traits.family}); use gptq, for the decoder"

    def _refuse_missing(self, traits: Traits) -> str | None:
        if self.plain or traits.numbers(self.name, self.bound()) is not None:
            return None
        return f'has no quantized weights of this model; run `foveate quantize "{self}"` on this model'
