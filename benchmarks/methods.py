"""Writes the list of methods into the README, from what they say of themselves: ``python benchmarks/methods.py``."""

from __future__ import annotations

from pathlib import Path

from foveate.core import registry
from foveate.report.method_page import methods_table

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    README.write_text(current(README.read_text()))


def current(text: str) -> str:
    """The README's ``text`` with the list as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + methods_table(registry.methods().values()) + END + rest.split(END)[1]


if __name__ == "__main__":
    main()
