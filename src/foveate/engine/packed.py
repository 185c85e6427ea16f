"""What stands in a model for the linears that a method replaced: packed whole numbers, on torch's kernels where they fit.

Two kernels of torch for processors multiply bfloat16 rows by packed weights: one of 4 bits in groups (fewer bits go into 4),
one of 8 bits a row. They check little themselves (the second is silently wrong, or ends the process, on widths that its
vectors do not divide), so shapes are checked here, and what each kernel gives is compared once with the plain product.
Everything else (other dtypes and devices, other groups) is unpacked some rows at a time as it is multiplied: that saves
memory, not time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.signal import Scorer
from foveate.core.weights import SLAB, Replaced, Sparse, Weights
from foveate.engine.linears import blocks_of, digest, moved, numbered, parts_of, refuse_absent, values
from foveate.engine.program import Program
from foveate.engine.shelf import block_of
from foveate.engine.sides import TEXT, Present, product, refusal, said, tensors_of_sides
from foveate.engine.stand_in import stand_in
from foveate.models import Anatomy
from foveate.models.sketch import sketch
from foveate.ops.grid import Grid

Kernel = Literal["int4", "int8", "rows"]
"""What multiplies: a kernel of torch, or ``rows``, unpacked some at a time."""

WIDTHS = (256, 128, 64, 32)
"""Groups that the 4-bit kernel knows."""
VECTOR = 32
"""Inputs that the 8-bit kernel reads at a time, at most: 16 bfloat16 numbers with AVX2, 32 with AVX-512. It reads beyond the
end of rows that this does not divide."""
CLOSE = 0.02
"""By how much a kernel may be off the plain product, of the product's size: ten times what bfloat16 rounds by."""

_LOG = logging.getLogger(__name__)


class PackedLinear:
    """Stands for one linear.

    Args:
        linear: for which it stands; its bias is used, its weight is not.
        replaced: what a method made of it.
        present: asked what the rows are that run, where anything depends on it.

    Attributes:
        kernel: what multiplies.
        linear: as above.
    """

    def __init__(
        self, linear: nn.Linear, replaced: Replaced, present: Callable[[Tensor], Present | None] = lambda x: said()
    ) -> None:
        self.linear, self._present = linear, present
        self._replaced = moved(replaced, linear.weight.device, linear.weight.dtype)
        self._inputs = replaced.integers.shape[1]
        self.kernel = kernel_for(linear, replaced)
        self._step = max(1, SLAB // self._inputs)
        self._entries = _cut(self._replaced.sparse, self._step)
        self._state = self._pack(self.kernel)
        if self.kernel != "rows" and not self._fits():
            _LOG.warning(f"kernel {self.kernel}: off the plain product for a weight of shape {tuple(linear.weight.shape)}")
            self.kernel = "rows"
            self._state = self._pack("rows")
        # From here on the packed form is all there is.
        grid = self._replaced.grid
        self._replaced = replace(self._replaced, integers=torch.empty(0, dtype=torch.int8), grid=grid)

    def __call__(self, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What the linear makes of ``x`` ``[..., in]``."""
        return product(self._replaced, x, self._product, lambda: self._present(x))

    @property
    def nbytes(self) -> int:
        """Of all that it holds beside the linear."""
        grid, sparse = self._replaced.grid, self._replaced.sparse
        steps = (grid.scale, grid.zero) if self.kernel == "rows" else ()
        beside = parts_of(sparse) if sparse is not None else ()
        sides = tensors_of_sides(self._replaced).values()
        every = (*self._state, *steps, *beside, *sides, self._replaced.divide)
        return sum(one.nbytes for one in every if one is not None)

    def _product(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.linear.bias
        rows = x.reshape(-1, self._inputs)
        if self.kernel == "int4":
            words, steps = self._state
            made = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, self._inputs // steps.shape[0], steps)
        elif self.kernel == "int8":
            made = torch.ops.aten._weight_int8pack_mm(rows, *self._state)
        else:
            return self._by_rows(x)
        made = made.reshape(*x.shape[:-1], -1)
        return made if bias is None else made + bias

    def _by_rows(self, x: Tensor) -> Tensor:
        """Unpacked some rows at a time; all at once it is what the plain product is, to the last bit."""
        (kept,), bias, made = self._state, self.linear.bias, []
        for number, start in enumerate(range(0, len(kept), self._step)):
            rows = slice(start, start + self._step)
            entries = self._entries[number] if self._entries else None
            weight = values(_rows(self._replaced, _unfolded(kept[rows], self._inputs), rows, entries), x.dtype)
            made.append(functional.linear(x, weight, None if bias is None else bias[rows]))
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def _pack(self, kernel: Kernel) -> tuple[Tensor, ...]:
        grid, integers, dtype = self._replaced.grid, self._replaced.integers, self.linear.weight.dtype
        if kernel == "int8":
            return integers, grid.scale[:, 0].to(dtype)
        if kernel == "int4":
            # The kernel knows (level - 8) * scale + offset; an offset, rounded to bfloat16, is better not needed.
            width, groups = width_for(self._inputs, grid.scale.shape[1]), grid.scale.shape[1]
            zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
            taken = 8 - zero if grid.zero is None or grid.bits < 4 else torch.zeros_like(zero)
            shift = taken.to(torch.int32).repeat_interleave(self._inputs // groups, dim=1)
            steps = torch.stack([grid.scale, (8 - zero - taken) * grid.scale], dim=-1)
            steps = steps.repeat_interleave(self._inputs // width // groups, dim=1)
            words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32) + shift, 1)
            return words, steps.transpose(0, 1).to(dtype).contiguous()
        # A processor takes longer over two to a byte than over all else.
        return (integers if integers.device.type == "cpu" else _folded(integers, self._inputs, grid.bits),)

    def _fits(self) -> bool:
        """Whether the kernel gives what the plain product gives, on a few rows."""
        chance = torch.Generator().manual_seed(0)
        x = torch.randn(5, self._inputs, generator=chance).to(self.linear.weight.dtype)
        plain = functional.linear(x.float(), values(self._replaced, torch.float32))
        made = self._product(x).float()
        if self.linear.bias is not None:
            plain = plain + self.linear.bias.float()
        return bool((made - plain).norm() <= CLOSE * plain.norm())


def kernel_for(linear: nn.Linear, replaced: Replaced) -> Kernel:
    """What may multiply by the packed weight, going by its shape, its grid and where it is."""
    weight, grid = linear.weight, replaced.grid
    out, inputs, groups = *replaced.integers.shape, grid.scale.shape[1]
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or replaced.sparse is not None:
        return "rows"
    if grid.bits <= 4 and width_for(inputs, groups) and out % 16 == 0:
        return "int4"
    return "int8" if groups == 1 and grid.zero is None and inputs % VECTOR == 0 else "rows"


def width_for(inputs: int, groups: int) -> int:
    """The widest group of the 4-bit kernel that ``groups`` of ``inputs`` can be cut into; 0 = none."""
    return next((width for width in WIDTHS if (inputs // groups) % width == 0), 0)


def install(program: Program, current: Callable[[], object | None]) -> list[Callable[[], None]]:
    """Let what the recipe's methods made of linears stand for them; returns what undoes it.

    Args:
        program: of the recipe.
        current: the call that is going on in this thread; None = the model, or a part of it, runs without.

    Raises:
        FoveateError: if the artifact was made of other weights, or cannot be read, or another method of the recipe calls its
            linears on rows of which nobody knows what they are.
    """
    undo: list[Callable[[], None]] = []
    try:
        for method in program.recipe.methods:
            if isinstance(method, Weights) and not method.plain:
                undo += _install(method, program, current)
    except BaseException:
        for each in reversed(undo):
            each()
        raise
    return undo


def _install(method: Weights, program: Program, current: Callable[[], object | None]) -> list[Callable[[], None]]:
    artifact, undo = program.traits.artifacts[method.name], []
    blocks = blocks_of(program.anatomy, method.part)
    refuse_other_weights(artifact, program.anatomy)

    def present(x: Tensor) -> Present:
        """What the rows are: as the forward says, or one more of each sample, which is text."""
        found = said()
        if found is None and x.ndim > 1 and x.shape[-2] == 1 and current() is not None:
            return TEXT
        if found is None or not found.fits(x):
            raise refusal(method.name)
        return found

    for number, block in enumerate(blocks):
        found = block_of(artifact, number)
        linears = {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
        for name, replaced in found.items():
            if name not in linears or replaced.integers.shape != linears[name].weight.shape:
                raise FoveateError(
                    f"artifact of {method.name}: holds {name} of block {number}, which this model has not in that shape; "
                    "run foveate quantize again"
                )
            refuse_absent(linears[name], f"{method.part} block {number}: {name}")
        for name, replaced in found.items():
            if replaced.by_role and not program.by_role:
                _refuse_scorers(method, program)
                program.by_role = method.name
            program.packed.append(PackedLinear(linears[name], replaced, present))
            undo.append(stand_in(linears[name], "forward", program.packed[-1]))
    return undo


def _refuse_scorers(method: Weights, program: Program) -> None:
    """A press calls projections on rows of its own choice."""
    for other, signals in program.reads.items():
        if any(isinstance(signal, Scorer) for signal in signals):
            raise FoveateError(
                f"{method.name} + {other.name}: the press runs projections on rows of its choice, and what those of "
                f"{method.name} make depends on what each row is; use snapkv"
            )


def refuse_other_weights(artifact: Artifact, parts: Anatomy) -> None:
    """Refuse weights other than those of which an artifact was made, to the bit where the dtype is the same.

    Raises:
        FoveateError: that names the block.
    """
    numbers = artifact.numbers
    blocks = blocks_of(parts, numbers["part"])
    if numbers["dtype"] != str(parts.dtype).removeprefix("torch."):
        # The fingerprint's sketch, which knows of dtypes, has been compared, and has no encoder in it.
        made = replace(artifact.fingerprint, weights=numbers.get("sketch", {}))
        name = made.weights and made.unlike(replace(made, weights=sketch(numbered(blocks))))
        if name:
            raise FoveateError(
                f"artifact of {artifact.method}: made of other weights than this model's, as block {name} of the "
                f"{numbers['part']} shows; run foveate quantize again"
            )
        return
    for number, block in enumerate(blocks):
        found = digest(block)
        if found is not None and found != numbers["digests"][number]:
            raise FoveateError(
                f"artifact of {artifact.method}: made of other weights than this model's, as block {number} of the "
                f"{numbers['part']} shows; run foveate quantize again"
            )


def _rows(replaced: Replaced, integers: Tensor, rows: slice, entries: Sparse | None) -> Replaced:
    """``replaced`` of some output rows, with their ``integers`` and the ``entries`` that are added to them."""
    grid = replaced.grid
    zero = None if grid.zero is None else grid.zero[rows]
    return replace(replaced, grid=Grid(grid.bits, grid.scale[rows], zero), integers=integers, sparse=entries)


def _cut(sparse: Sparse | None, step: int) -> list[Sparse]:
    """The entries of so many rows each, in views; how many there are is asked once, so that no product waits for it."""
    if sparse is None:
        return []
    counts, scales = sparse.counts.split(step), sparse.scale.split(step)
    sizes = [int(some.sum()) for some in counts]
    parts = zip(counts, sparse.index.split(sizes), sparse.integers.split(sizes), scales, strict=True)
    return [Sparse(*part, sparse.bits) for part in parts]


def _folded(integers: Tensor, inputs: int, bits: int) -> Tensor:
    """Two to a byte, where they have four bits or less and there is an even number of them."""
    if bits > 4 or inputs % 2:
        return integers
    return (integers[:, 0::2] & 15) | (integers[:, 1::2] << 4)


def _unfolded(kept: Tensor, inputs: int) -> Tensor:
    if kept.shape[1] == inputs:
        return kept
    # Shifts of signed bytes bring the sign along.
    low, high = (kept << 4) >> 4, kept >> 4
    return torch.stack([low, high], dim=-1).flatten(1)
