"""Rows to answer, and files of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Rows = Sequence[dict[str, Any]]
Write = Callable[[Rows], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows into a file, each about the same picture unless it says another."""
    Image.linear_gradient("L").save(tmp_path / "grey.png")

    def written(rows: Rows) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(f"{json.dumps({'image': 'grey.png', 'question': 'what?', **row})}\n" for row in rows))
        return path

    return written


def lines(path: Path) -> list[dict[str, Any]]:
    """What stands in a file of answers."""
    return [json.loads(line) for line in path.read_text().splitlines()]
