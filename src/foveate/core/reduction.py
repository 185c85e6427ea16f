"""What becomes of the tokens, as a sparse linear map that can be applied, composed and read."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """A batched sparse linear map from ``inputs`` rows to ``k`` rows: ``out[b, j] = sum_i w[b, j, i] x[b, i]``.

    Pruning gathers (one entry of weight 1 for each output row), merging sums with weights, expansion repeats. The order of
    the output rows is kept as given. Counts may be ragged: an output row whose anchor is -1 is padding and comes out zero.

    Attributes:
        inputs: number of input rows of each sample.
        anchor: ``[B, k]`` the input row whose identity (origin, role, position) an output row takes over; -1 = padding.
        entries: ``None`` for a pure gather by ``anchor``; otherwise ``(target, source, weight)``, each ``[E]``: ``target``
            indexes the flattened ``B * k`` output rows (``B * k`` itself means dropped), ``source`` the flattened
            ``B * inputs`` input rows.
    """

    inputs: int
    anchor: Tensor
    entries: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def gather(cls, index: Tensor, inputs: int) -> Reduction:
        """Keep the rows ``index`` ``[B, k]`` (-1 = padding), in that order."""
        return cls(inputs, index)

    @classmethod
    def keeping(cls, keep: Tensor, counts: tuple[int, ...] | None = None) -> Reduction:
        """Keep the rows where the mask ``keep`` ``[B, N]`` is true, in their order, ragged samples padded on the left.

        ``counts`` are the kept rows of each sample where the caller knows them; without them they are read from the
        device, which is a host sync.
        """
        batch, rows = keep.shape
        width = max(counts if counts is not None else keep.sum(1).tolist(), default=0)
        # A stable sort of the mask puts dropped rows first and leaves kept rows, in order, at the end.
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, rows - width :]
        if batch == 1 or (counts is not None and len(set(counts)) == 1):
            return cls(rows, order)
        return cls(rows, order.masked_fill(~keep.gather(1, order), -1))

    @classmethod
    def merging(cls, assignment: Tensor, weight: Tensor, anchor: Tensor) -> Reduction:
        """Sum input rows into output rows.

        Args:
            assignment: ``[B, N]`` output row that each input row goes to; -1 drops the row.
            weight: ``[B, N]`` weight of each input row in its sum.
            anchor: ``[B, k]`` input row whose identity each output row takes; -1 = padding.
        """
        batch, inputs = assignment.shape
        sample = torch.arange(batch, device=assignment.device)[:, None]
        # Dropped rows stay as entries that go nowhere: filtering them out would need a host sync.
        target = (assignment + sample * anchor.shape[1]).masked_fill(assignment < 0, anchor.numel())
        source = torch.arange(batch * inputs, device=assignment.device)
        return cls(inputs, anchor, (target.flatten(), source, weight.flatten()))

    @classmethod
    def dense(cls, matrix: Tensor, anchor: Tensor) -> Reduction:
        """From explicit weights ``matrix`` ``[B, k, N]``; zero weights make no entry."""
        sample, row, column = matrix.nonzero(as_tuple=True)
        rows, inputs = matrix.shape[1:]
        return cls(inputs, anchor, (sample * rows + row, sample * inputs + column, matrix[sample, row, column]))

    def to(self, device: torch.device) -> Reduction:
        """The same on ``device``."""
        if self.entries is None:
            return replace(self, anchor=self.anchor.to(device))
        target, source, weight = self.entries
        return replace(
            self, anchor=self.anchor.to(device), entries=(target.to(device), source.to(device), weight.to(device))
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, k, N)``."""
        return self.anchor.shape[0], self.anchor.shape[1], self.inputs

    @property
    def valid(self) -> Tensor:
        """``[B, k]`` output rows that are not padding."""
        return self.anchor >= 0

    def apply(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[B, N, ...]`` (floats, where rows are summed) to ``[B, k, ...]``; padding rows are zero."""
        batch, rows, inputs = self.shape
        tail = x.shape[2:]
        ones = [1] * len(tail)
        if self.entries is None:
            return self.take(x).masked_fill(~self.valid.reshape(batch, rows, *ones), 0)
        flat = x.reshape(batch * inputs, tail.numel())
        # Added up in half precision, many small terms would vanish.
        wide = flat.to(torch.float32) if flat.dtype in (torch.float16, torch.bfloat16) else flat
        # One weighted sum for each output row: in the order of the targets, no copy of a row is made for those it joins.
        target, order = self.entries[0].sort(stable=True)
        source, weight = (part[order] for part in self.entries[1:])
        starts = torch.searchsorted(target, torch.arange(batch * rows + 1, device=target.device))
        # The last sum is of what is dropped.
        out = torch.nn.functional.embedding_bag(source, wide, starts, mode="sum", per_sample_weights=weight.to(wide.dtype))
        return out[:-1].to(flat.dtype).reshape(batch, rows, *tail)

    def take(self, x: Tensor) -> Tensor:
        """The anchors' own rows of ``x`` ``[B, N, ...]`` (ids, tables), unsummed; padding rows repeat row 0."""
        batch, rows, inputs = self.shape
        offset = torch.arange(0, batch * inputs, inputs, device=self.anchor.device)[:, None] if batch > 1 else 0
        index = (self.anchor.clamp(min=0) + offset).flatten()
        return x.reshape(batch * inputs, *x.shape[2:]).index_select(0, index).reshape(batch, rows, *x.shape[2:])

    def mass(self, size: Tensor) -> Tensor:
        """How many originals each output row stands for, given ``size`` ``[B, N]`` of the input rows.

        An input row that feeds several output rows is shared among them in proportion to its weights, so what is not
        dropped is conserved.
        """
        batch, rows, inputs = self.shape
        if self.entries is None:
            uses = torch.zeros_like(size).scatter_add_(1, self.anchor.clamp(min=0), self.valid.to(size.dtype))
            return self.apply(size / uses.clamp(min=1))
        target, source, weight = self.entries
        share = (weight.abs() * (target < batch * rows)).to(size.dtype)
        total = size.new_zeros(batch * inputs).index_add_(0, source, share)
        share = share / total[source].clamp(min=torch.finfo(size.dtype).tiny)
        out = size.new_zeros(batch * rows + 1).index_add_(0, target, share * size.flatten()[source])
        return out[:-1].reshape(batch, rows)

    def matrix(self) -> Tensor:
        """The weights as a dense ``[B, k, N]`` tensor (for reading and tests, not for the hot path)."""
        batch, rows, inputs = self.shape
        target, source, weight = self._entries()
        out = weight.new_zeros(batch * rows, batch * inputs)
        out.index_put_((target, source), weight, accumulate=True)
        blocks = out.reshape(batch, rows, batch, inputs)
        sample = torch.arange(batch, device=out.device)
        return blocks[sample, :, sample]

    def members(self) -> Tensor:
        """``[B, k, N]`` bool: which input rows feed which output row."""
        return self.matrix() != 0

    def goes(self) -> Tensor:
        """``[B, N]`` the output row that most of each input row goes to (anchors: their first), -1 = none. For reading."""
        weight = self.matrix().abs()
        to = torch.where(weight.amax(1) > 0, weight.argmax(1), -1)
        spare = torch.cat([to, to[:, :1]], dim=1)
        row = torch.arange(self.anchor.shape[1], device=to.device).expand_as(self.anchor)
        own = self.anchor.masked_fill(~self.valid, self.inputs)
        return spare.scatter_reduce(1, own, row, "amin", include_self=False)[:, : self.inputs]

    def __matmul__(self, first: Reduction) -> Reduction:
        """``self @ first``: apply ``first``, then ``self``. Anchors follow the anchors."""
        if first.shape[1] != self.inputs or first.shape[0] != self.shape[0]:
            raise ValueError(f"cannot compose: first gives {first.shape[:2]} rows, second takes {self.inputs}")
        anchor = first.anchor.gather(1, self.anchor.clamp(min=0)).masked_fill(~self.valid, -1)
        if self.entries is None and first.entries is None:
            return Reduction(first.inputs, anchor)
        dtype = torch.promote_types(self._entries()[2].dtype, first._entries()[2].dtype)
        with warnings.catch_warnings():  # torch calls the format that it uses inside a beta
            warnings.simplefilter("ignore", UserWarning)
            product = torch.sparse.mm(self._sparse(dtype), first._sparse(dtype)).coalesce()
        target, source = product.indices()
        return Reduction(first.inputs, anchor, (target, source, product.values()))

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, rows, inputs = self.shape
        if self.entries is not None:
            target, source, weight = self.entries
            used = target < batch * rows
            return target[used], source[used], weight[used]
        sample = torch.arange(batch, device=self.anchor.device)[:, None]
        used = self.valid.flatten()
        source = (self.anchor + sample * inputs).flatten()[used]
        target = torch.arange(batch * rows, device=self.anchor.device)[used]
        return target, source, torch.ones_like(source, dtype=torch.float32)

    def _sparse(self, dtype: torch.dtype) -> Tensor:
        batch, rows, inputs = self.shape
        target, source, weight = self._entries()
        return torch.sparse_coo_tensor(
            torch.stack([target, source]), weight.to(dtype), (batch * rows, batch * inputs), check_invariants=False
        )
