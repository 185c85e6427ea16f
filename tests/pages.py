"""The pages that people read, and what stands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"(^|\s)# .*$")


@dataclass(frozen=True)
class Block:
    """What stands between fences: its language, its text, and at which line of the page it begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 2) for found in _FENCED.finditer(text)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCED.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    """What the prose sets as code."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[str]:
    """The command lines of a page's blocks, comments and line breaks taken out."""
    lines = []
    for block in blocks(page):
        if block.language in ("", "bash"):
            joined = block.text.replace("\\\n", " ")
            lines += [_COMMENT.sub("", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]
