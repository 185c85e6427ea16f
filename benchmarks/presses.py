"""Writes which presses of kvpress run, and why not, into ``docs/kvpress.md``: ``python -m benchmarks.presses``.

Each press that kvpress exports is tried on a few rows of a small model of every family, as `foveate.attach` does it.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.engine.check import check
from foveate.engine.presses import presses
from foveate.methods import Press
from foveate.methods.kv_cache.press import CHUNKS
from foveate.models import anatomy
from foveate.models.anatomy import Anatomy
from foveate.models.specimens import SHAPES, specimen

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- presses:begin -->", "<!-- presses:end -->"
WRITTEN = {
    "AdaKVPress": "AdaKVPress(KeyDiffPress())",
    "BlockPress": "BlockPress(KeyDiffPress())",
    "ChunkKVPress": "ChunkKVPress(KeyDiffPress())",
    "ChunkPress": "ChunkPress(KeyDiffPress())",
    "CriticalAdaKVPress": "CriticalAdaKVPress(KeyDiffPress())",
    "CriticalKVPress": "CriticalKVPress(KeyDiffPress())",
    "EntropyGatedChunkKVPress": "EntropyGatedChunkKVPress(KeyDiffPress())",
}
"""Presses around another one."""


def main() -> None:
    page = ROOT / "docs" / "kvpress.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table() + END + rest.split(END)[1])


def table() -> str:
    """Markdown: presses that run, then those that are refused."""
    models = {family: anatomy(specimen(family)) for family in SHAPES}
    runs, refused = [], []
    for name in presses():
        text = WRITTEN.get(name, name)
        reasons = {family: refusal(text, model) for family, model in models.items()}
        not_on = [family for family, reason in reasons.items() if reason]
        if len(not_on) < len(models):
            why = f"all but {', '.join(not_on)}: {said(reasons[not_on[0]], text, not_on[0])}" if not_on else "all"
            runs.append(f"| `{text}` | {why} | {'`all`' if name in CHUNKS else '`visual`, `all`'} |")
        else:
            refused.append(f"| `{text}` | {said(reasons[not_on[0]], text, not_on[0])} |")
    return "\n".join(
        [
            "",
            f"{len(runs)} of {len(runs) + len(refused)} presses of kvpress {version('kvpress')} with transformers "
            f"{version('transformers')}:",
            "",
            "| press | families | `tokens` |",
            "|---|---|---|",
            *runs,
            "",
            "These are refused when they are attached:",
            "",
            "| press | why, and what to do |",
            "|---|---|",
            *refused,
            "",
            "",
        ]
    )


def refusal(text: str, parts: Anatomy) -> str | None:
    """Why a press does not run on a model; None if it does, as a trial on a few rows of its layers shows."""
    try:
        check(Recipe((Press(text, tokens="all"),)), parts, parts.traits())
    except FoveateError as error:
        return str(error)
    return None


def said(line: str | None, text: str, family: str) -> str:
    """A refusal, shortened to what is not said by the table."""
    short = str(line).removeprefix("press: ").removeprefix(f"press={text!r}: ").replace(family, "the family")
    return (
        short.removeprefix(f"{text} ").split(" (")[0] if "there are no numbers" in short else short.removeprefix(f"{text} ")
    )


if __name__ == "__main__":
    main()
