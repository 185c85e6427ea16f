"""What a request cost, and which tokens lived through it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.method import Plan
from foveate.core.step import Held, Step


@dataclass(frozen=True)
class Report:
    """The cost of the last request: a prompt, whatever was in the cache before it, and its answer.

    Token counts are means over the samples of the batch, one entry for each decoder layer; ``kv_bytes`` and FLOPs are totals
    over the batch. ``kv_kept`` is the share of all tokens so far that a layer's cache holds. ``workspace`` is the most bytes
    that the methods say they need beside the unmodified model's peak (`foveate.core.method.Method.workspace`). ``active``
    rows are those not frozen. FLOPs count the matrix products of the language model's layers in the prefill. Every forward
    after the prefill counts as a decode step. ``encode_seconds`` include the ``signal_seconds`` spent on what methods read
    in the encoder; ``prefill_seconds`` include the methods' own arithmetic and the engine's overhead. ``idle`` are the
    methods that changed nothing, as where ``keep`` is no smaller than what is there; ``largest_grid`` has the most visual
    tokens of all grids (a picture, or one tile or view of it).
    """

    recipe: str
    idle: tuple[str, ...]
    largest_grid: int
    samples: int
    original_visual_tokens: float
    visual_tokens: tuple[float, ...]
    rows: tuple[float, ...]
    active: tuple[float, ...]
    kv_bytes: tuple[int, ...]
    kv_kept: tuple[float, ...]
    workspace: int
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    signal_seconds: float
    method_seconds: float
    engine_seconds: float
    flops: float
    flops_unmodified: float

    def __str__(self) -> str:
        step = self.decode_seconds / self.decode_steps if self.decode_steps else 0.0
        last = self.visual_tokens[-1] if self.visual_tokens else 0.0
        saved = 1 - self.flops / self.flops_unmodified if self.flops_unmodified else 0.0
        return "\n".join(
            [
                f"recipe         {self.recipe}",
                f"visual tokens  {self.original_visual_tokens:g} -> {_run_lengths(self.visual_tokens)}",
                f"rows           {_run_lengths(self.rows)} ({last:g} visual in the last layer)",
                f"KV cache       {sum(self.kv_bytes) / 2**20:.2f} MiB ({_shares(self.kv_kept)} of the tokens so far)",
                f"workspace      {self.workspace / 2**20:.2f} MiB at most",
                f"prefill FLOPs  {self.flops:.3g} ({saved:.1%} saved)",
                f"seconds        encode {self.encode_seconds:.4f}, prefill {self.prefill_seconds:.4f} "
                f"(methods {self.method_seconds:.4f}, engine {self.engine_seconds:.4f}), per token {step:.4f}",
                *(f"idle           {line}" for line in self.idle_lines()),
            ]
        )

    def idle_lines(self) -> list[str]:
        """A line for each method that changed nothing, with what there was."""
        there = f"{self.original_visual_tokens:g} visual tokens, no more than {self.largest_grid} in one grid"
        return [f"{method} changed nothing of the prompt ({there})" for method in self.idle]


@dataclass
class Trace:
    """Which original visual tokens are alive where, for the last request.

    Attributes:
        log: for each forward that read visual tokens (one, unless the prompt was read in parts), the `Layout` entering each
            decoder layer, and last the layout after the last layer.
        routes: for each such forward, what a routing method said in each layer.
        steps: what each method saw and did, in order; only where the session watches (as all that follows).
        held: what the cache of each decoder layer holds, None for layers without attention.
        pictures: number of the picture that each grid is a view of, by the grid's number among all that were encoded.
    """

    log: list[list[Layout]] = field(default_factory=list)
    routes: list[list[Plan | None]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    held: list[Held | None] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)

    def alive(self, layer: int) -> list[list[Tensor]]:
        """Raster indices of the visual tokens entering decoder ``layer``, by sample and image.

        ``layer`` equal to the number of layers means after the last one. Empty where no image was read.
        """
        return self.log[-1][layer].ordinals() if self.log else []

    @property
    def grids(self) -> list[list[tuple[int, int]]]:
        """``(rows, columns)`` of each image of each sample."""
        if not self.log:
            return []
        return [[(item.rows, item.columns) for item in items] for items in self.log[-1][0].items]


def _shares(values: tuple[float, ...]) -> str:
    """``(0.5, 0.25)`` as ``25-50 %``."""
    low, high = round(100 * min(values, default=1)), round(100 * max(values, default=1))
    return f"{low} %" if low == high else f"{low}-{high} %"


def _run_lengths(values: tuple[float, ...]) -> str:
    """``(64, 64, 32)`` as ``64 (layers 0-1), 32 (layer 2)``."""
    if len(set(values)) <= 1:
        return f"{values[0]:g}" if values else "-"
    parts, start = [], 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            where = f"layer {start}" if end - start == 1 else f"layers {start}-{end - 1}"
            parts.append(f"{values[start]:g} ({where})")
            start = end
    return ", ".join(parts)
