"""The cells of a bench side by side on Ray: every worker holds the model and measures one cell at a time.

What a cell comes to depends on the cell alone, because its seeds are those of its batches; so it does not matter which
worker measures it, nor when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from foveate.bench.admission import Admit
from foveate.bench.cells import Cell
from foveate.bench.crew import LIVES, Crew, Foreman, connected
from foveate.bench.folder import ResultFolder
from foveate.bench.records import Failure, Measurement
from foveate.bench.run import Ask, Examiner, Host, Watcher, settle
from foveate.core.recipe import Recipe

__all__ = ["LIVES", "Crew", "connected", "run_on_ray"]

Load = Callable[[], Host]
"""Loads the model; called once in every worker, so it can be pickled."""


def run_on_ray(
    cells: Sequence[Cell], ask: Ask, load: Load, folder: ResultFolder, watcher: Watcher, crew: Crew, admit: Admit
) -> None:
    """What `foveate.bench.run.run` does, with the cells side by side on the Ray that is connected.

    ``admit`` says which of them, once a worker has loaded the model.
    """
    foreman: Foreman[Cell, Measurement | Failure] = Foreman(partial(_Measurer.of, ask, load), crew, "cell")
    # A model that cannot be loaded, or that refuses what was asked for, leaves no folder behind.
    foreman.hire()
    cells = admit(cells, partial(foreman.ask, "refusals"))
    folder.begin(cells)
    missing = deque(cell for cell in cells if not folder.finished(cell))

    def take() -> Cell | None:
        if not missing:
            return None
        watcher.started(missing[0])
        return missing.popleft()

    for cell, found in foreman.outcomes(take):
        outcome = Failure.of(cell, found) if isinstance(found, Exception) else found
        if isinstance(outcome, Measurement):
            watcher.advanced(len(outcome.answers))
        settle(cell, outcome, folder, watcher)


@dataclass(frozen=True)
class _Measurer:
    """What a worker has loaded."""

    host: Host
    examine: Examiner

    @classmethod
    def of(cls, ask: Ask, load: Load) -> _Measurer:
        host = load()
        return cls(host, Examiner(ask, host))

    def refusals(self, recipes: Sequence[Recipe]) -> Sequence[str | None]:
        """Why the model refuses each of the recipes."""
        return self.host.refusals(recipes)

    def __call__(self, cell: Cell) -> Measurement | Failure:
        """The measurement of a cell, or what it died of."""
        return self.examine(cell, lambda questions: None)
