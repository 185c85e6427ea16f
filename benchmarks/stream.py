"""A stream of ten thousand frames: memory, time to the first token, and what is still known of early and late events.

    python -m benchmarks.stream

The long stream is a film of a few things on one ground, read under ``hermes`` by a reference model; what it holds is noted
every hundred frames, and a question is timed early and late. Short streams are asked about things that were to be seen for a
moment at their beginning and at their end, under several recipes. Writes docs/streams.json, the table in docs/streams.md and
docs/streams.png. What docs/streams.json has of the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import foveate
from foveate import checkpoint
from foveate.bench.probes import Chart, Series
from foveate.bench.statistics import interval
from foveate.checkpoint import Checkpoint
from foveate.report.probe_picture import draw_probe
from foveate.tasks.board import pairs
from foveate.tasks.series import SMALL, film

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- stream:begin -->", "<!-- stream:end -->"
TEXTS = ("what is there?", "what appears for a moment?")
"""Guiding texts in words that the reference models know."""
KEEP, CHUNK, EVERY, EARLY = 400, 10, 100, 100
"""Entries of each layer, frames of a chunk, frames between two notes, and the frame at which a question is timed early."""
RECIPES = (
    "none",
    f"hermes(keep={KEEP}, reindex='eager', texts={TEXTS!r})",
    f"hermes(keep={KEEP}, texts={TEXTS!r})",
    f"snapkv(keep={KEEP}, window=4)",
    f"streamingllm(keep={KEEP})",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference-qwen")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=24, help="short ones, asked about events")
    parser.add_argument("--length", type=int, default=60, help="frames of each of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = checkpoint.load(arguments.model, "cpu", "float32")
    settings = {"model": arguments.model, "keep": KEEP, "chunk": CHUNK, "frames": arguments.frames}
    settings |= {"streams": arguments.streams, "length": arguments.length}
    file = DOCS / "streams.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "events": {}}

    def keep() -> None:
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    for recipe in RECIPES:
        if recipe not in found["events"]:
            found["events"][recipe] = known(loaded, recipe, arguments.streams, arguments.length)
            keep()
    if "long" not in found:
        found["long"] = long(loaded, RECIPES[1], arguments.frames)
        keep()
    draw_probe(charts(found["long"]["notes"]), DOCS / "streams.png", f"A stream of {arguments.frames:,} frames")
    page = DOCS / "streams.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text("\n".join([before + BEGIN, *lines(found), END + rest.split(END)[1]]))


def long(loaded: Checkpoint, recipe: str, frames: int) -> dict[str, Any]:
    """One long stream, a note every hundred frames, and how long an answer's first token takes at its end.

    Right behind it, so that the machine is the same, another one is asked early.
    """
    rng = np.random.default_rng(0)
    still, *coming = pairs(rng, 4)
    spans = {still: (0, frames), **{name: (at * frames // 4, (at + 1) * frames // 4) for at, name in enumerate(coming, 1)}}
    notes, first, begun = list[dict[str, float]](), dict[str, list[float]](), time.perf_counter()
    for length in (frames, EARLY):
        with foveate.stream(loaded, recipe, chunk=CHUNK) as stream:
            for number, board in enumerate(film(rng, length, SMALL, spans), 1):
                stream.push(board.image)
                if length == frames and number % EVERY == 0:
                    held = {"entries": stream.entries, "cache_mib": stream.nbytes / 2**20, "process_mib": resident() / 2**20}
                    notes.append({"frame": number, "seconds": time.perf_counter() - begun, **held})
            first[str(length)] = [seconds_to_first_token(stream) for _ in range(25)]
    return {"recipe": recipe, "notes": notes, "first_token": first}


def resident() -> int:
    """Bytes that the process has in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def seconds_to_first_token(stream: Any) -> float:
    stream.ask("what is there?", max_new_tokens=1)
    return stream.session.report.first_token_seconds  # type: ignore[no-any-return]


def known(loaded: Checkpoint, recipe: str, streams: int, length: int) -> dict[str, list[bool]]:
    """Which questions about things that were there for a moment are answered rightly, by when they were there."""
    right: dict[str, list[bool]] = {"early": [], "late": [], "never": []}
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        still, early, late, never = pairs(rng, 4)
        spans = {still: (0, length), early: (2, 7), late: (length - 7, length - 2)}
        with foveate.stream(loaded, recipe, chunk=CHUNK) as stream:
            for board in film(rng, length, SMALL, spans):
                stream.push(board.image)
            for when, (shape, colour) in {"early": early, "late": late, "never": never}.items():
                answer = stream.ask(f"is there a {colour} {shape}?", max_new_tokens=2)
                right[when].append(answer == ("no" if when == "never" else "yes"))
    return right


def charts(notes: list[dict[str, float]]) -> list[Chart]:
    frames = tuple(note["frame"] for note in notes)
    drawn = {
        "cache_mib": "MiB of the cache",
        "process_mib": "MiB of the process",
        "seconds": "seconds so far",
    }
    return [
        Chart(title, "", "frames", title, (Series(title, frames, tuple(note[name] for note in notes)),))
        for name, title in drawn.items()
    ]


def lines(found: dict[str, Any]) -> list[str]:
    long, early, settings = found["long"], str(EARLY), found["settings"]
    last = str(long["notes"][-1]["frame"])
    middle = {when: statistics.median(times) for when, times in long["first_token"].items()}
    at = {note["frame"]: note for note in long["notes"]}
    half = at[int(last) // 2]
    table = [
        f"`{settings['model']}` in float32 on one CPU thread, `{long['recipe']}`, {settings['chunk']} frames a chunk:",
        "",
        "| | frame " + " | frame ".join((early, str(half["frame"]), last)) + " |",
        "|---|--:|--:|--:|",
    ]
    for name, title in (
        ("entries", "entries of a layer"),
        ("cache_mib", "cache, MiB"),
        ("process_mib", "whole process, MiB"),
    ):
        cells = [at[int(when)][name] for when in (early, half["frame"], last)]
        table.append(
            f"| {title} | " + " | ".join(f"{cell:.0f}" if name == "entries" else f"{cell:.1f}" for cell in cells) + " |"
        )
    table += [
        f"| first token of an answer, ms | {1e3 * middle[early]:.0f} | | {1e3 * middle[last]:.0f} |",
        "",
        "![What the stream holds, frame by frame](streams.png)",
        "",
        f"{settings['streams']} streams of {settings['length']} frames each: how often the answer to",
        "*is there a red circle?* is right, about a thing that was to be seen in five of the first or of the last frames,",
        "or never, with 95 % intervals:",
        "",
        "| recipe | seen early | seen late | never seen |",
        "|---|--:|--:|--:|",
    ]
    for recipe, right in found["events"].items():
        table.append(f"| `{recipe}` | {' | '.join(map(_share, right.values()))} |")
    return table


def _share(right: list[bool]) -> str:
    low, high = interval([float(one) for one in right])
    return f"{100 * sum(right) / len(right):.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    main()
