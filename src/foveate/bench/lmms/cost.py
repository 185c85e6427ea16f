"""What all requests of a run cost together."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from foveate.core.report import Report


@dataclass(frozen=True)
class Batch:
    """What the session reports of one batch, the tokens that it generated, and the seconds that this took."""

    report: Report
    requests: int
    tokens: int
    seconds: float


@dataclass
class Cost:
    """Adds up batches."""

    batches: list[Batch] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many were answered."""
        return sum(batch.requests for batch in self.batches)

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def seconds(self) -> float:
        """How long generating took."""
        return sum(batch.seconds for batch in self.batches)

    def figures(self) -> dict[str, float]:
        """Means over requests; ``visual_tokens`` also over layers, ``decode_seconds`` over the steps of batches."""
        requests, reports = self.requests, [batch.report for batch in self.batches]
        # Token counts are means over a batch already.
        weighted = [(batch.report, batch.requests / requests) for batch in self.batches]
        steps = sum(report.decode_steps for report in reports)
        return {
            "visual_tokens_unmodified": sum(share * report.original_visual_tokens for report, share in weighted),
            "visual_tokens": sum(share * fmean(report.visual_tokens) for report, share in weighted),
            "visual_tokens_last_layer": sum(share * report.visual_tokens[-1] for report, share in weighted),
            "kv_mib": sum(sum(report.kv_bytes) for report in reports) / requests / 2**20,
            "prefill_flops_share": sum(report.flops for report in reports) / sum(r.flops_unmodified for r in reports),
            "encode_seconds": sum(report.encode_seconds for report in reports) / requests,
            "prefill_seconds": sum(report.prefill_seconds for report in reports) / requests,
            "decode_seconds": sum(report.decode_seconds for report in reports) / max(1, steps),
        }
