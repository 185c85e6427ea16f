"""What a request cost, and which tokens lived through it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.method import Plan
from foveate.core.shown import html_table
from foveate.core.step import Held, Step


@dataclass(frozen=True)
class Report:
    """The cost of the last request: a prompt, whatever was in the cache before it, and its answer.

    Token counts are means over the samples of the batch, one entry for each decoder layer; ``kv_bytes`` and FLOPs are totals
    over the batch. ``kv_kept`` is the share of all tokens so far that a layer's cache holds. ``workspace`` is the most bytes
    that the methods say they need beside the unmodified model's peak (`foveate.core.method.Method.workspace`). ``active``
    rows are those not frozen. ``experts`` is the share of those that routers chose for the prompt's active rows that ran.
    ``layers`` is the share of the decoder layers that the rows which predict a token ran through, the answer's, too.
    ``weights`` of linears were replaced, by what takes ``weight_bytes``; for a share ``unpacked`` of these linears there is
    no kernel: they save memory and no time. FLOPs count the matrix products of the language model's layers in the prefill.
    Every forward after the prefill counts as
    a decode step. ``encode_seconds`` include the ``signal_seconds`` spent on what methods read in the encoder;
    ``prefill_seconds`` include the methods' own arithmetic and the engine's overhead. ``first_token_seconds`` are those from
    entering the model (``generate`` or its forward) to the logits of the first token: encoder, scoring, prefill and head.
    ``total_seconds`` are those of the whole ``generate``, or of all calls of a loop of the caller's own, without what lies
    between them. ``idle`` are the methods that changed nothing, as where ``keep`` is no smaller than what is there;
    ``largest_grid`` has the most visual tokens of all grids (a picture, or one tile or view of it).
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
    first_token_seconds: float
    total_seconds: float
    experts: float = 1.0
    layers: float = 1.0
    weights: int = 0
    weight_bytes: int = 0
    unpacked: float = 0.0

    def __str__(self) -> str:
        step = self.decode_seconds / self.decode_steps if self.decode_steps else 0.0
        rate = self.samples / step if step else 0.0
        last = self.visual_tokens[-1] if self.visual_tokens else 0.0
        saved = 1 - self.flops / self.flops_unmodified if self.flops_unmodified else 0.0
        return "\n".join(
            [
                f"recipe         {self.recipe}",
                f"visual tokens  {self.original_visual_tokens:g} -> {run_lengths(self.visual_tokens)}",
                f"rows           {run_lengths(self.rows)} ({last:g} visual in the last layer)",
                f"KV cache       {sum(self.kv_bytes) / 2**20:.2f} MiB ({_shares(self.kv_kept)} of the tokens so far)",
                f"workspace      {self.workspace / 2**20:.2f} MiB at most",
                f"prefill FLOPs  {self.flops:.3g} ({saved:.1%} saved)",
                *([f"experts        {self.experts:.1%} of those chosen ran"] if self.experts < 1 else []),
                *([f"layers         {self.layers:.1%} ran for what predicts a token"] if self.layers < 1 else []),
                *(f"weights        {line}" for line in self.weight_lines()),
                f"seconds        encode {self.encode_seconds:.4f}, prefill {self.prefill_seconds:.4f} "
                f"(methods {self.method_seconds:.4f}, engine {self.engine_seconds:.4f}), per token {step:.4f}",
                f"from entry     first token {self.first_token_seconds:.4f} s, whole answer {self.total_seconds:.4f} s "
                f"({self.samples} at once, {rate:.1f} tokens/s)",
                *(f"idle           {line}" for line in self.idle_lines()),
            ]
        )

    def weight_lines(self) -> list[str]:
        """A line where weights were replaced: what they take, and how many of the linears are no faster for it."""
        if not self.weights:
            return []
        taken = f"{self.weights / 1e6:.3g} M replaced, {8 * self.weight_bytes / self.weights:.3g} bits each in memory"
        slow = f"; no kernel for {self.unpacked:.0%} of the linears, which save memory and no time" if self.unpacked else ""
        return [taken + slow]

    def idle_lines(self) -> list[str]:
        """A line for each method that changed nothing, with what there was."""
        if not self.original_visual_tokens:
            longest = f"{self.rows[0]:g} tokens" if self.rows else "nothing"
            return [f"{method} changed nothing of the prompt ({longest})" for method in self.idle]
        there = f"{self.original_visual_tokens:g} visual tokens, no more than {self.largest_grid} in one grid"
        return [f"{method} changed nothing of the prompt ({there})" for method in self.idle]

    def __repr__(self) -> str:
        if self.kv_kept and not self.original_visual_tokens:
            return f"<Report of {self.recipe}: caches hold {sum(self.kv_kept) / len(self.kv_kept):.1%} of all tokens>"
        last = self.visual_tokens[-1] if self.visual_tokens else 0.0
        saved = 1 - self.flops / self.flops_unmodified if self.flops_unmodified else 0.0
        return (
            f"<Report of {self.recipe}: visual tokens {self.original_visual_tokens:g} -> {last:g}, "
            f"{saved:.1%} of prefill FLOPs saved>"
        )

    def _repr_html_(self) -> str:
        # As many columns as the longest name and the gap behind it take.
        return html_table((line[:15].strip(), line[15:]) for line in str(self).splitlines())

    def to_dict(self) -> dict[str, Any]:
        """All that it says by name, as JSON can say it: counts of tokens and rows, bytes, seconds, FLOPs, shares up to 1."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


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

    def __repr__(self) -> str:
        if not self.log:
            return "<Trace of nothing>"
        alive = [sum(len(item) for sample in self.alive(layer) for item in sample) for layer in range(len(self.log[-1]))]
        return f"<Trace of {len(self.log[-1]) - 1} layers: visual tokens {run_lengths(tuple(map(float, alive)))}>"

    def to_dict(self) -> dict[str, Any]:
        """Who is alive where, as JSON can say it.

        Returns:
            ``grids``: ``[rows, columns]`` of each image of each sample. ``alive``: for each decoder layer, and last for what
            leaves the last one, raster indices of the visual tokens by sample and image.
        """
        layers = range(len(self.log[-1])) if self.log else ()
        return {
            "grids": [[list(grid) for grid in grids] for grids in self.grids],
            "alive": [[[item.tolist() for item in items] for items in self.alive(layer)] for layer in layers],
        }


def _shares(values: tuple[float, ...]) -> str:
    """``(0.5, 0.25)`` as ``25-50 %``."""
    low, high = round(100 * min(values, default=1)), round(100 * max(values, default=1))
    return f"{low} %" if low == high else f"{low}-{high} %"


def run_lengths(values: tuple[float, ...]) -> str:
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
