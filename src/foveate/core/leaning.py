"""The protocol of attention that leans: some pairs of row and key get more of it, or less, than the model gives them."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.method import Method
from foveate.core.signal import Seen
from foveate.core.state import State
from foveate.core.traits import Traits


class Leaning(Method):
    """Adds a bias to the attention logits of pairs of row and key in some decoder layers, while a prompt is read.

    Nothing is removed, and a pair that the mask forbids stays forbidden. The engine asks for some queries at a time and
    hands their bias to fused attention, so no map of the whole prompt is held. Layers that ask for none run as they are.
    What other methods read of such a layer's attention is what it would be without the bias.
    """

    textual = False

    @abstractmethod
    def leaned(self, traits: Traits) -> tuple[int, ...]:
        """Decoder layers in which it acts."""

    @abstractmethod
    def bias(self, layer: int, logits: Tensor, rows: slice, layout: Layout, seen: Seen, state: State) -> Tensor | None:
        """What is added to the logits of some rows, ``[B or 1, H or 1, q, K]``; None = nothing to any row of the prompt.

        Args:
            layer: decoder layer.
            logits: ``[B, H, q, K]`` float32, scaled; -inf where the mask forbids. The last keys are the rows of ``layout``,
                those before them entries of earlier turns.
            rows: which rows of ``layout`` ask.
            layout: of the rows.
            seen: what was recorded.
            state: what the method remembers.
        """
