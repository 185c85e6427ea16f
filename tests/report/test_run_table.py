"""What one request costs with and without a recipe, as far as the clock can tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tests.core.test_report import REPORT

from foveate.report.run_table import Answered, run_table


def shown(plain: list[float], other: list[float]) -> dict[str, str]:
    """The rows of a table about two recipes whose first tokens take so long, by name."""
    runs = [
        Answered("red", [replace(REPORT, recipe=recipe, first_token_seconds=value) for value in seconds])
        for recipe, seconds in (("none", plain), ("fastv(keep=0.5)", other))
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(run_table(runs, "a machine", torch.bfloat16))
    lines = [line.strip().split("  ", 1) for line in console.export_text().splitlines() if "  " in line.strip()]
    return {name.strip(): " ".join(rest.split()) for name, rest in lines}


def test_a_recipe_that_does_nothing_is_not_called_faster() -> None:
    rows = shown([1.0, 1.3, 0.9, 1.1, 1.0], [1.1, 1.02, 1.0, 1.0, 0.98])

    assert rows["first token"].endswith("(no difference beyond noise: [0.90, 1.27])")


def test_one_that_saves_says_how_much_and_how_surely() -> None:
    assert shown([2.0, 2.2, 2.0], [1.0, 1.0, 1.0])["first token"] == "2.00 s 1.00 s (2.00x less [2.00, 2.20])"
    assert shown([1.0, 1.0, 1.0], [2.0, 2.2, 2.0])["first token"] == "1.00 s 2.00 s (2.00x more [2.00, 2.20])"


def test_one_time_has_no_interval_and_says_so() -> None:
    assert shown([2.0], [1.0])["first token"] == "2.00 s 1.00 s (2.00x less)"


@pytest.mark.parametrize(("row", "text"), [("per token after it", "125 ms, 8.0 tokens/s"), ("KV cache", "2.50 MiB")])
def test_decoding_is_a_rate_and_what_is_counted_has_no_noise(row: str, text: str) -> None:
    assert shown([1.0, 1.1], [1.0, 1.2])[row].startswith(f"{text} {text} (")
