"""GPTAQ: GPTQ that also makes up for what quantized blocks before have done to the inputs.

Paper: "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692. Each linear is fitted to
what it makes in the unquantized model. The share of that term (0.25) is the published code's, not the paper's. A baseline of
VLM-PTQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from foveate.core.parameters import In
from foveate.core.registry import register
from foveate.core.weights import Stream
from foveate.methods.weights.gptq import GPTQ
from foveate.ops.solve import Factored, Moments


@register
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Columns in turn, towards the outputs of the unquantized model."""

    name = "gptaq"
    title = "GPTAQ"
    paper = "arXiv 2504.02692"
    helps = "Instead of GPTQ at 3 bits and less, where errors of early blocks add up; twice the passes over the samples."
    streams: ClassVar[tuple[Stream, ...]] = ("exact", "reached")

    alpha: Annotated[float, In(0, 1)] = 0.25
    """Share of the term that makes up for changed inputs; 0 is GPTQ."""

    def factored(self, moments: Moments) -> Factored:
        """What the linears with these moments are rounded by."""
        return Factored.of(moments.own, moments.ahead, alpha=self.alpha, damping=self.damping, ordered=self.ordered)
