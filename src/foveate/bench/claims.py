"""What papers claim, as data: one file for each system in ``foveate/claims``, with the figures of its paper.

A file holds ``source`` (where the figures are from) and ``claims``, a list of rows (`Claim`); where nothing can be
claimed, ``nothing`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from foveate.core.errors import FoveateError

FOLDER = Path(__file__).parent.parent / "claims"
SPEEDS = ("prefill", "total", "first_token", "decode")
"""What a speed-up may be of: the language model's prefill, a whole answer, its first token, a step of decoding."""


@dataclass(frozen=True)
class Claim:
    """A row of a paper's table.

    Attributes:
        model: its id on the Hub.
        recipe: as text.
        benchmarks: names in lmms-eval, of which it is the mean; none where the source does not name them.
        tokens: visual tokens kept, on average over layers where these differ; of: as many there were.
        kept: the score kept, in percent of the unmodified model's.
        full, score: of a single benchmark: what the unmodified model scores and what is left, in its own unit.
        speedup: by what of `SPEEDS` it is.
        hardware, table: what it was measured on, which table of the paper it stands in; None where the source says nothing.
        note: what else there is to know.
    """

    model: str
    recipe: str
    benchmarks: tuple[str, ...] = ()
    tokens: float | None = None
    of: float | None = None
    kept: float | None = None
    full: float | None = None
    score: float | None = None
    speedup: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None
    table: str | None = None
    note: str | None = None

    @property
    def kept_percent(self) -> float | None:
        """The score kept, in percent of the unmodified model's, as it is said or as both scores give it."""
        if self.kept is None and self.full and self.score is not None:
            return 100 * self.score / self.full
        return self.kept


@dataclass(frozen=True)
class Claims:
    """All that is known of a system's claims."""

    system: str
    source: str
    rows: tuple[Claim, ...]
    nothing: str = ""

    def row(self, number: int) -> Claim:
        """A row by its number, from 1."""
        if not self.rows:
            raise FoveateError(f"{self.system}: claims nothing that can be reproduced: {self.nothing}")
        if not 1 <= number <= len(self.rows):
            raise FoveateError(f"row={number}: {self.system} has rows 1..{len(self.rows)}; foveate claims {self.system}")
        return self.rows[number - 1]


def names() -> list[str]:
    """Systems with a file of claims."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Claims:
    """The claims of a system by its name, or those in a file of one's own.

    Raises:
        FoveateError: if there are none of that name, or the file is not right.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise FoveateError(f"claims {name!r}: there are none; known: {', '.join(names())}, or a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FoveateError(f"claims {name!r}: cannot be read ({' '.join(str(error).split())})") from error
    return parse(path.stem, content)


def parse(system: str, content: Any) -> Claims:
    """Claims from what a file holds."""
    known = {"source", "claims", "nothing"}
    if not isinstance(content, Mapping) or not content.keys() <= known:
        raise FoveateError(f"claims of {system}: must be {', '.join(sorted(known))}")
    rows = content.get("claims", [])
    if not isinstance(rows, list) or bool(rows) == bool(content.get("nothing")):
        raise FoveateError(f"claims of {system}: must have either rows under claims, or under nothing why there are none")
    parsed = tuple(_claim(f"claims of {system}, row {number}", row) for number, row in enumerate(rows, start=1))
    return Claims(system, _text(f"claims of {system}", "source", content.get("source")), parsed, content.get("nothing", ""))


def _claim(where: str, row: Any) -> Claim:
    known = {each.name: each for each in fields(Claim)}
    if not isinstance(row, Mapping) or not row.keys() <= known.keys():
        raise FoveateError(f"{where}: must be {', '.join(known)}")
    missing = [name for name, each in known.items() if name not in row and _required(each)]
    if missing:
        raise FoveateError(f"{where}: {missing[0]} is missing")
    for name in ("model", "recipe", "hardware", "table", "note"):
        if name in row:
            _text(where, name, row[name])
    for name in ("tokens", "of", "kept", "full", "score"):
        if name in row:
            _positive(where, name, row[name])
    benchmarks, speedup = row.get("benchmarks", []), row.get("speedup", {})
    if (
        not isinstance(benchmarks, Sequence)
        or isinstance(benchmarks, str)
        or not all(isinstance(b, str) for b in benchmarks)
    ):
        raise FoveateError(f"{where}: benchmarks={benchmarks!r}: must be a list of names in lmms-eval")
    if not isinstance(speedup, Mapping) or not speedup.keys() <= set(SPEEDS):
        raise FoveateError(f"{where}: speedup={speedup!r}: must be of {', '.join(SPEEDS)}")
    for name, value in speedup.items():
        _positive(where, f"speedup of {name}", value)
    claim = Claim(**{**row, "benchmarks": tuple(benchmarks), "speedup": dict(speedup)})
    if claim.full is not None and len(claim.benchmarks) != 1:
        raise FoveateError(f"{where}: full={claim.full!r}: is of a single benchmark")
    if claim.kept_percent is None and not claim.speedup:
        raise FoveateError(f"{where}: claims nothing; must have kept, full and score, or a speedup")
    return claim


def _required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FoveateError(f"{where}: {name}={value!r}: must be a text")
    return value


def _positive(where: str, name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise FoveateError(f"{where}: {name}={value!r}: must be a positive number")
