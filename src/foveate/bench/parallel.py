"""The cells of a bench side by side on Ray: every worker holds the model and measures one cell at a time.

What a cell comes to depends on the cell alone, because its seeds are those of its batches; so it does not matter which
worker measures it, nor when. A worker that is lost is replaced, and its cell goes to whoever is free next.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from foveate.bench.admission import Admit
from foveate.bench.cells import Cell, Key
from foveate.bench.folder import ResultFolder
from foveate.bench.records import Failure, Measurement
from foveate.bench.run import Ask, Examiner, Host, Watcher, settle
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise FoveateError("ray: is not installed; pip install 'foveate[ray]'") from error

LIVES = 3
"""Workers that may be lost over one cell, or one after the other as they load the model, before it is given up."""

ANSWER_SECONDS = 10
"""How long a cluster may take to answer at all."""

Load = Callable[[], Host]
"""Loads the model; called once in every worker, so it can be pickled."""


@dataclass(frozen=True)
class Crew:
    """How many workers there are, and what each has to itself: cores (0 where they have to share them), part of a GPU."""

    workers: int
    cores: int
    gpu: float

    @classmethod
    def fitting(cls, nodes: Sequence[Mapping[str, float]], device: str, cells: int, wanted: int | None = None) -> Crew:
        """As many workers as were wanted, or as there are cores or (for a model on GPUs) GPUs; none without a cell.

        Args:
            nodes: the resources of each node, as Ray names them.
            device: where the model runs.
            cells: how many there are to measure.
            wanted: how many workers; if they are more than cores or GPUs, they share them.
        """
        kind = "GPU" if device.startswith("cuda") else "CPU"
        usable = [node for node in nodes if node.get(kind, 0) >= 1]
        if not usable:
            raise FoveateError(f"device={device!r}: no node of this Ray has a {kind}; name another device or cluster")
        places = sum(int(node[kind]) for node in usable)
        workers = min(wanted or places, cells)
        sharing = ceil(workers / places)

        def hosted(cores: int) -> int:
            """Workers that find a place if each takes so many cores."""
            return sum(min(int(node.get("CPU", 0)) // cores, int(node[kind]) * sharing) for node in usable)

        share = int(sum(node.get("CPU", 0) for node in usable)) // workers
        cores = next((cores for cores in range(share, 0, -1) if hosted(cores) >= workers), 0)
        return cls(workers, cores, 1 / sharing if kind == "GPU" else 0)


@contextmanager
def connected(address: str) -> Iterator[list[Mapping[str, float]]]:
    """Ray, and the resources of its nodes.

    Args:
        address: ``local`` starts one on this machine, ``auto`` finds the one that runs here, others are those of a cluster.
    """
    # No word to its makers, and none about the errors of workers that nobody waits for any more.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_IGNORE_UNHANDLED_ERRORS="1")
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    # Ray has many kinds of errors for this, plain Exception among them.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "leave out --ray" if address == "local" else "--ray without an address starts one here"
        raise FoveateError(f"ray={address!r}: cannot be had ({reason}); {remedy}") from error
    try:
        # Ray takes the signal for itself and would exit at once.
        signal.signal(signal.SIGTERM, terminate)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise where nobody answers at a cluster's address; Ray itself would try for a quarter of an hour."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()


def run_on_ray(
    cells: Sequence[Cell], ask: Ask, load: Load, folder: ResultFolder, watcher: Watcher, crew: Crew, admit: Admit
) -> None:
    """What `foveate.bench.run.run` does, with the cells side by side on the Ray that is connected.

    ``admit`` says which of them, once a worker has loaded the model.
    """
    foreman = _Foreman(ask, load, crew)
    # A model that cannot be loaded, or that refuses what was asked for, leaves no folder behind.
    foreman.hire()
    cells = admit(cells, foreman.refusals)
    folder.begin(cells)
    missing = [cell for cell in cells if not folder.finished(cell)]
    for cell, outcome in foreman.outcomes(missing, watcher.started):
        if isinstance(outcome, Measurement):
            watcher.advanced(len(outcome.answers))
        settle(cell, outcome, folder, watcher)


Outcome = tuple[Cell, Measurement | Failure]


class _Foreman:
    """Hands out cells to workers, and hires others for those that are lost."""

    def __init__(self, ask: Ask, load: Load, crew: Crew) -> None:
        self._ask = ask
        self._load = load
        self._crew = crew
        self._worker: Any = ray.remote(Worker).options(num_cpus=crew.cores, num_gpus=crew.gpu)
        self._waiting: deque[Cell] = deque()
        self._idle: list[Any] = []
        # What a worker is at: a cell, or None while it loads the model.
        self._busy: dict[ray.ObjectRef[Any], tuple[Any, Cell | None]] = {}
        self._losses: Counter[Key | None] = Counter()

    def hire(self) -> None:
        """Start all workers, and wait for the first that has loaded the model."""
        for _ in range(self._crew.workers):
            self._start_worker()
        while not self._idle:
            self._wait()

    def refusals(self, recipes: Sequence[Recipe]) -> Sequence[str | None]:
        """Why the model refuses each of the recipes, as a worker says that has loaded it."""
        found: Sequence[str | None] = ray.get(self._idle[0].refusals.remote(recipes))
        return found

    def outcomes(self, cells: Sequence[Cell], started: Callable[[Cell], None]) -> Iterator[Outcome]:
        """What becomes of each cell, in the order in which they are finished."""
        self._waiting.extend(cells)
        while self._waiting or any(cell for _, cell in self._busy.values()):
            while self._waiting and self._idle:
                worker, cell = self._idle.pop(), self._waiting.popleft()
                started(cell)
                self._busy[worker.examine.remote(cell)] = worker, cell
            if outcome := self._wait():
                yield outcome

    def _start_worker(self) -> None:
        worker = self._worker.remote(os.getcwd(), self._crew.cores)
        self._busy[worker.load.remote(self._ask, self._load)] = worker, None

    def _wait(self) -> Outcome | None:
        """Wait until a worker has done what it is at: the outcome, if that was a cell."""
        (done,), _ = ray.wait(list(self._busy))
        worker, cell = self._busy.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError as error:
            # The worker lives, but it cannot load the model, or it does not understand the cell.
            if cell is None:
                raise error.cause from None
            result = Failure.of(cell, error.cause)
        except RayError as error:
            self._start_worker()
            result, worker = self._lost(cell, error), None
        else:
            self._losses[_key(cell)] = 0
        if worker:
            self._idle.append(worker)
        return (cell, result) if cell and result else None

    def _lost(self, cell: Cell | None, error: RayError) -> Failure | None:
        """Put back the cell of a worker that was lost; fail, if it is what they are lost over."""
        self._losses[_key(cell)] += 1
        if self._losses[_key(cell)] < LIVES:
            if cell:
                self._waiting.appendleft(cell)
            return None
        reason = str(error).strip().partition("\n")[0]
        if cell is None:
            raise FoveateError(
                f"ray: {LIVES} workers were lost loading the model ({reason}); use fewer --workers"
            ) from error
        return Failure.of(cell, FoveateError(f"ray: {LIVES} workers were lost over this cell ({reason})"))


def _key(cell: Cell | None) -> Key | None:
    return cell.key if cell else None


class Worker:
    """The process that holds a model."""

    def __init__(self, folder: str, cores: int) -> None:
        # Paths that the user gave mean here what they meant there, where the same files can be seen at all.
        with suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores)))

    def load(self, ask: Ask, load: Load) -> None:
        """Get ready."""
        self._host = load()
        self._examine = Examiner(ask, self._host)

    def refusals(self, recipes: Sequence[Recipe]) -> Sequence[str | None]:
        """Why the model refuses each of the recipes."""
        return self._host.refusals(recipes)

    def examine(self, cell: Cell) -> Measurement | Failure:
        """The measurement of a cell, or what it died of."""
        return self._examine(cell, lambda questions: None)
