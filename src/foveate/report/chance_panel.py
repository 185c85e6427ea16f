"""Says loudly that a model does no better than chance, and why that may be."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import HEAVY
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text

from foveate.bench.chance import REASONS, Chance
from foveate.report.numbers import percent


def chance_panel(found: Sequence[Chance]) -> list[RenderableType]:
    """A box to print before all else; nothing where there is nothing to say."""
    if not found:
        return []
    text = Text()
    for each in found:
        text.append(f"{each.task}: {percent(each.score)} % of {each.n} questions", style="bold")
        text.append(f"; always {each.constant!r} scores {percent(each.constant_score)} %\n")
    text.append("What is measured there says nothing about the methods.", style="bold")
    told = next((each for each in found if each.prompt is not None), None)
    if told is not None:
        text.append(f"\nAsked {told.prompt!r} it said {told.prediction!r}; right is {told.answer!r}.")
    text.append("\nLook at")
    for reason in REASONS:
        text.append(f"\n- {reason}")
    return [
        Panel(text, title="The unmodified model does no better than always saying the same", box=HEAVY, border_style="red")
    ]
