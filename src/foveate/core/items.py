"""Methods that choose among the tokens of each image on its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import Keep
from foveate.core.positions import Positions
from foveate.core.ranking import about
from foveate.core.roles import Item, Role
from foveate.core.shape import Shape
from foveate.core.signal import ByItem, Function, Question, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits


@dataclass(frozen=True)
class ItemBatch:
    """Images or videos of one grid, batched: what `ItemTokens.select` sees.

    Attributes:
        rows, columns: the original grid.
        frames: frames of a video, which lie one below the other in its grid; one for an image.
        ordinal: ``[I, n]`` raster index of each token still alive; all of them, in order, unless something came before.
        number: place of each image within its sample.
        seen: the method's encoder signals, ``[I, n, ...]`` by token (attention rows: ``[I, H, Q, n]``), and functions.
        x: ``[I, n, D]`` the tokens as the language model would get them.
        question: the sample's question rows of each image: ``[I, q, D]`` embeddings, zero where there are fewer.
        companion: the companion's question embeddings of each image ``[M, d]``, if asked for.
        seed: the session's seed.
        device: where the answer is wanted.
    """

    rows: int
    columns: int
    ordinal: Tensor
    number: tuple[int, ...]
    seen: Mapping[Signal, Any]
    x: Tensor
    question: Tensor
    companion: tuple[Tensor, ...]
    seed: int
    device: torch.device
    frames: int = 1

    @property
    def count(self) -> int:
        """Tokens of each image that are still alive."""
        return self.ordinal.shape[1]


class ItemTokens(Tokens):
    """Chooses among the tokens of each image on its own, before the language model.

    Subclasses are dataclasses with the fields ``keep`` and ``positions`` and implement `select`. Budgets are shares of the
    original count; where they are no `Budget`, a subclass overrides `wanted` instead of having ``keep``. Positions are
    ``"auto"`` by default: contiguous where they are one row, original under M-RoPE, which is what published code does.
    """

    keep: Annotated[int | float, Keep()]
    """Visual tokens that stay of each grid (a picture, or one tile or view of it)."""
    positions: Positions
    """Rotary positions of what stays: as if the prompt had been short (``"contiguous"``), the original ones (``"anchor"``),
    as if the grid had been smaller (``"rank"``), or contiguous where positions are one row, else original (``"auto"``).
    """
    identity_at = {"keep": 1.0}  # noqa: RUF012
    asks: ClassVar[bool] = False
    """Whether it reads the question, so that a prompt must come in one forward."""

    def budget(self) -> Budget:
        """Tokens to keep of each image."""
        return Budget(self.keep)

    def wanted(self, item: Item) -> int:
        """Tokens to keep of an image or video, of all that it had."""
        return self.budget().of(item.count)

    def workspace(self, shape: Shape) -> int:
        """Beside the edit, each image's tokens and question."""
        return shape.edits + 2 * shape.hidden

    @abstractmethod
    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Indices ``[I, k]`` into the tokens alive that are to stay, ascending, without duplicates."""

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def check(self, traits: Traits) -> str | None:
        """Contiguous positions have no meaning under M-RoPE."""
        return traits.refuse_positions(self.positions)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Group the images by grid, select in each group, keep all other rows."""
        kept_of = self.budgets(layout)
        if kept_of is None:
            return None
        kept = torch.zeros_like(layout.valid)
        for sample, where, images, k in self.batches(x, layout, seen, state, kept_of):
            with about(sample, where, layout.shape):
                chosen = where.gather(1, self.select(images, k))
            kept[sample[:, None], chosen] = True
        return self.keeping(kept, layout, kept_of)

    def budgets(self, layout: Layout) -> dict[tuple[int, int], int] | None:
        """Tokens that stay of each image with any left, by sample and number; None if all of them do."""
        alive = layout.alive
        images = [(sample, number) for sample, items in enumerate(layout.items) for number in range(len(items))]
        kept_of = {(b, j): min(self.wanted(layout.items[b][j]), alive[b][j]) for b, j in images if alive[b][j]}
        return None if all(count == alive[b][j] for (b, j), count in kept_of.items()) else kept_of

    def keeping(self, kept: Tensor, layout: Layout, kept_of: Mapping[tuple[int, int], int]) -> Edit:
        """The edit that keeps the rows ``kept`` ``[B, N]`` (bool), as many of each image as ``kept_of`` says."""
        by_item = tuple(tuple(kept_of.get((b, j), 0) for j in range(len(items))) for b, items in enumerate(layout.items))
        return layout.keeping(kept, tuple(map(sum, by_item)), self.positions, by_item=by_item)

    def batches(
        self, x: Tensor, layout: Layout, seen: Seen, state: State, kept_of: Mapping[tuple[int, int], int]
    ) -> Iterator[tuple[Tensor, Tensor, ItemBatch, int]]:
        """The images of each grid: their samples ``[I]``, their rows ``[I, n]``, what there is to see, how many stay."""
        alive = layout.alive
        groups: dict[tuple[int, int, int, int], list[tuple[int, int]]] = {}
        for b, j in kept_of:
            item = layout.items[b][j]
            groups.setdefault((item.rows, item.columns, item.frames, alive[b][j]), []).append((b, j))
        asking = layout.question_rows
        asking = asking.masked_fill(layout.role.gather(1, asking.clamp(min=0)) != Role.TEXT, -1)[..., None]
        question = x.gather(1, asking.clamp(min=0).expand(-1, -1, x.shape[2])).masked_fill(asking < 0, 0)
        for (rows, columns, frames, _), entries in groups.items():
            sample = upload([b for b, _ in entries], x.device)
            where = layout.where(entries)
            batch = ItemBatch(
                rows=rows,
                columns=columns,
                frames=frames,
                ordinal=layout.ordinal[sample[:, None], where],
                number=tuple(j for _, j in entries),
                seen={
                    signal: value.of(entries) if isinstance(value, ByItem) else value
                    for signal, value in seen.items()
                    if isinstance(value, ByItem) or isinstance(signal, Function)
                },
                x=x[sample[:, None], where],
                question=question[sample],
                companion=tuple(v[b] for s, v in seen.items() if isinstance(s, Question) for b, _ in entries),
                seed=state.get("session", "seed", 0),
                device=x.device,
            )
            yield sample, where, batch, kept_of[entries[0]]
