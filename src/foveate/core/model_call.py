"""What a method that is calibrated is handed: a model with samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.signal import Seen, Signal
from foveate.core.traits import Traits


class ModelCall(Protocol):
    """A model with calibration samples, as an `Offline` method sees it.

    Attributes:
        traits: what methods may know of the model.
        batches: how many batches of samples there are.
        labels: for each batch what kind of prompt each of its samples is, for methods that compare kinds (`Offline.labels`).
        special: ids of the tokenizer's special tokens, as far as they are known, ascending.
    """

    traits: Traits
    batches: int
    labels: Sequence[Sequence[str]]
    special: tuple[int, ...]

    def begin(self, what: str, steps: int) -> None:
        """Say what is done from now on, in how many steps; a batch that is read is one. Unsaid, each batch is read once."""

    def advance(self) -> None:
        """Say that a step is done in which no batch was read."""

    def logits(self, recipe: Any, without_head: int | None = None) -> Tensor:
        """Last prompt token's logits ``[S, V]`` of every sample, the model running under ``recipe``.

        What head ``without_head`` of each decoder layer makes is zero.
        """

    def answers(self, recipe: Any) -> Iterator[Tensor]:
        """Logits ``[T, V]`` of the T rows of each batch that predict its answers, the model running under ``recipe``.

        Rows of a sample are one behind the other, and samples, too. Of samples without an answer it is the last row, which
        predicts the first token of one. To be read to the end before anything else is asked of the model.
        """

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        """Layout and signals of each batch of samples; nothing is dropped."""

    def weight(self, layer: int, name: Literal["query", "key"]) -> Tensor:
        """Weight ``[out, D]`` of a projection of decoder ``layer``."""

    def cells(self) -> Iterator[tuple[Tensor, Tensor, Layout]]:
        """Of each batch's pictures the cells ``[I, N, P]`` that the encoder gets, which of them show what is marked in the
        picture (bool ``[I, N]``), and their layout, one picture a sample.
        """
