"""Workers on Ray that each hold something that took long to load, and jobs that are handed to whoever is free.

A worker that is lost is replaced, and its job goes to the next that is free; one over which too many are lost is given up.
Jobs are asked for only when somebody is free, so no more of them exist than there are workers, and those that were put back.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from typing import Any, Generic, TypeVar

from foveate.bench.interrupts import Interrupts
from foveate.core.errors import FoveateError

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise FoveateError("ray: is not installed; pip install 'foveate[ray]'") from error

LIVES = 3
"""Workers that may be lost over one job, or one after the other as they load, before it is given up."""

ANSWER_SECONDS = 10
"""How long a cluster may take to answer at all."""

LISTENING_SECONDS = 0.2
"""How long Ctrl-C may wait while all workers are busy."""

J = TypeVar("J")
R = TypeVar("R")

Load = Callable[[], Callable[[J], R]]
"""Makes what does the jobs; called once in every worker, so it can be pickled."""


@dataclass(frozen=True)
class Crew:
    """How many workers there are, and what each has to itself: cores (0 where they have to share them), part of a GPU."""

    workers: int
    cores: int
    gpu: float

    @classmethod
    def fitting(cls, nodes: Sequence[Mapping[str, float]], device: str, jobs: int, wanted: int | None = None) -> Crew:
        """As many workers as were wanted, or as there are cores or (for a model on GPUs) GPUs; none without a job.

        Args:
            nodes: the resources of each node, as Ray names them.
            device: where the model runs.
            jobs: how many there are.
            wanted: how many workers; if they are more than cores or GPUs, they share them.
        """
        kind = "GPU" if device.startswith("cuda") else "CPU"
        usable = [node for node in nodes if node.get(kind, 0) >= 1]
        if not usable:
            raise FoveateError(f"device={device!r}: no node of this Ray has a {kind}; name another device or cluster")
        places = sum(int(node[kind]) for node in usable)
        workers = min(wanted or places, jobs)
        sharing = ceil(workers / places)

        def hosted(cores: int) -> int:
            """Workers that find a place if each takes so many cores."""
            return sum(min(int(node.get("CPU", 0)) // cores, int(node[kind]) * sharing) for node in usable)

        share = int(sum(node.get("CPU", 0) for node in usable)) // workers
        cores = next((cores for cores in range(share, 0, -1) if hosted(cores) >= workers), 0)
        return cls(workers, cores, 1 / sharing if kind == "GPU" else 0)


@contextmanager
def connected(
    address: str,
    option: str = "ray",
    elsewhere: str = "--ray without an address starts one here",
    here: str = "leave out --ray",
) -> Iterator[list[Mapping[str, float]]]:
    """Ray, and the resources of its nodes.

    Args:
        address: ``local`` starts one on this machine, ``auto`` finds the one that runs here, others are those of a cluster.
        option: what the address is called where it was given.
        elsewhere, here: what to do if that cluster, or one on this machine, cannot be had.
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
        remedy = here if address == "local" else elsewhere
        raise FoveateError(f"{option}={address!r}: cannot be had ({reason}); {remedy}") from error
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


@dataclass
class _Task(Generic[J]):
    """A job, and how many workers were lost over it."""

    job: J
    losses: int = 0


class Foreman(Generic[J, R]):
    """Hands out jobs to workers, and hires others for those that are lost."""

    def __init__(self, load: Load[J, R], crew: Crew, kind: str, lives: Callable[[J], int] = lambda job: LIVES) -> None:
        """``kind``: what a job is, in a word; ``lives``: workers that may be lost over it."""
        self._load = load
        self._crew = crew
        self._kind = kind
        self._lives = lives
        self._worker: Any = ray.remote(Worker).options(num_cpus=crew.cores, num_gpus=crew.gpu)
        self._again: deque[_Task[J]] = deque()
        self._idle: list[Any] = []
        # What a worker is at: a job, or None while it loads.
        self._busy: dict[ray.ObjectRef[Any], tuple[Any, _Task[J] | None]] = {}
        self._unloaded = 0
        self._interrupts = Interrupts()

    def hire(self) -> None:
        """Start all workers, and wait for the first that has loaded; raises what loading raised."""
        with self._interrupts:
            for _ in range(self._crew.workers):
                self._start_worker()
            while not self._idle:
                self._wait()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of what a worker has loaded."""
        return ray.get(self._idle[0].ask.remote(method, *arguments))

    def outcomes(self, take: Callable[[], J | None]) -> Iterator[tuple[J, R | Exception]]:
        """What becomes of each job, in the order in which they are finished; an exception, if it failed or was given up.

        ``take`` gives the next job, or None if there is none; it is asked again after each outcome, which may bring others.
        Ctrl-C is raised here, between two outcomes.
        """
        with self._interrupts:
            yield from self._outcomes(take)

    def _outcomes(self, take: Callable[[], J | None]) -> Iterator[tuple[J, R | Exception]]:
        while True:
            while self._idle and (task := self._next(take)):
                worker = self._idle.pop()
                self._busy[worker.do.remote(task.job)] = worker, task
            if not any(task for _, task in self._busy.values()):
                # Nobody is at work: there is no job, or all workers still load.
                if not (ahead := self._next(take)):
                    return
                self._again.appendleft(ahead)
            if outcome := self._wait():
                yield outcome

    def _next(self, take: Callable[[], J | None]) -> _Task[J] | None:
        if self._again:
            return self._again.popleft()
        job = take()
        return None if job is None else _Task(job)

    def _start_worker(self) -> None:
        worker = self._worker.remote(os.getcwd(), self._crew.cores)
        self._busy[worker.load.remote(self._load)] = worker, None

    def _wait(self) -> tuple[J, R | Exception] | None:
        """Wait until a worker has done what it is at: the outcome, if that was a job."""
        finished: list[ray.ObjectRef[Any]] = []
        while not finished:
            self._interrupts.deliver()
            finished, _ = ray.wait(list(self._busy), timeout=LISTENING_SECONDS)
        (done,) = finished
        worker, task = self._busy.pop(done)
        result: R | Exception
        try:
            result = ray.get(done)
        except RayTaskError as error:
            # The worker lives, but it cannot load, or it does not understand the job.
            if task is None:
                raise error.cause from None
            result = error.cause
        except RayError as error:
            self._start_worker()
            failed = self._lost(task, error)
            return (task.job, failed) if task and failed else None
        self._idle.append(worker)
        if task is None:
            self._unloaded = 0
            return None
        return task.job, result

    def _lost(self, task: _Task[J] | None, error: RayError) -> FoveateError | None:
        """Put back the job of a worker that was lost; give it up, if it is what they are lost over."""
        reason = str(error).strip().partition("\n")[0]
        if task is None:
            self._unloaded += 1
            if self._unloaded < LIVES:
                return None
            raise FoveateError(
                f"ray: {LIVES} workers were lost loading the model ({reason}); use fewer --workers"
            ) from error
        task.losses += 1
        if task.losses < self._lives(task.job):
            self._again.appendleft(task)
            return None
        return FoveateError(f"ray: {task.losses} workers were lost over this {self._kind} ({reason})")


class Worker:
    """The process that does the jobs."""

    def __init__(self, folder: str, cores: int) -> None:
        # Paths that the user gave mean here what they meant there, where the same files can be seen at all.
        with suppress(OSError):
            os.chdir(folder)
        self._cores = cores

    def load(self, load: Load[Any, Any]) -> None:
        """Get ready."""
        self._loaded = load()
        # Who computes nothing here is spared the import.
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(min(torch.get_num_threads(), max(1, self._cores)))

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of what was loaded says."""
        return getattr(self._loaded, method)(*arguments)

    def do(self, job: Any) -> Any:
        """What comes of a job."""
        return self._loaded(job)
