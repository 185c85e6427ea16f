"""A file of rows answered by workers on Ray, with exactly one line for each id at the end, whatever is killed meanwhile.

Workers answer blocks of rows and may be lost at any time; then the block is asked again, row by row, and a row over which
several workers are lost one after the other gets a line that says so. The driver alone writes (`foveate.serving.ledger`):
work is done at least once, lines are written exactly once. A killed driver is started again, reads the ids that are there,
and asks for the rest. Rows are read as workers become free: in memory are all ids, and of the rows the blocks that somebody
is at.

This is the bench's crew (`foveate.bench.crew`) and not Ray Data, which was tried (2.60): a row that ends its worker there
takes its block with it, and the driver is not told which rows those were (``max_errored_blocks`` drops them and writes to a
log). So it can be isolated only where every block is one row, which gives up batches, or by a second pass over the input;
and columns have one type each, which rows of the data format (a text or a list of texts) need not have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Protocol

from foveate.core.errors import FoveateError
from foveate.serving.answered import Answered, Answerer
from foveate.serving.asked import Asked, read
from foveate.serving.ledger import Ledger

Block = tuple[Asked, ...]

LOCAL = "local"
"""What Ray itself calls a Ray of one's own."""


@dataclass(frozen=True)
class Crewed:
    """Where the workers are.

    Attributes:
        address: of the Ray; `LOCAL` starts one here.
        device: what a worker needs: ``cpu``, or ``cuda`` for a part of a GPU.
        workers: how many; None for as many as there are cores or GPUs.
        block: rows that a worker is given at once.
    """

    address: str
    device: str
    workers: int | None
    block: int


@dataclass(frozen=True)
class Work:
    """What is to be answered, and by what.

    Attributes:
        data: file of the rows.
        rows: how many there are (`foveate.serving.asked.survey`).
        max_new_tokens: longest answer of rows that do not say.
        load: makes what answers, in every worker.
    """

    data: Path
    rows: int
    max_new_tokens: int
    load: Callable[[], Answerer]


class Watcher(Protocol):
    """Follows a run, to show it."""

    def began(self, workers: int, done: int, rows: int) -> None:
        """So many workers are at work; ``done`` of the rows had a line before."""

    def answered(self, answered: Answered) -> None:
        """A row has its line."""


def answer_all(work: Work, crewed: Crewed, ledger: Ledger, watcher: Watcher) -> None:
    """Answer what has no line yet, on a Ray that is started or found for it.

    Args:
        work: what is to be answered, and by what.
        crewed: the workers.
        ledger: the file of lines, entered.
        watcher: is told of each line.

    Raises:
        FoveateError: if there is no such Ray, if ``load`` raises it, or once a whole block found no server any more; the
            lines so far are there.
    """
    if len(ledger.done) >= work.rows:
        return
    # Ray comes with an extra.
    from foveate.bench.crew import connected

    remedy = "leave out --address to start one here", "see whether another Ray can be started on this machine"
    with connected(crewed.address, "address", *remedy) as nodes:
        answer_on(nodes, work, crewed, ledger, watcher)


def answer_on(nodes: Sequence[Mapping[str, float]], work: Work, crewed: Crewed, ledger: Ledger, watcher: Watcher) -> None:
    """As `answer_all`, on the Ray that is connected, with these nodes."""
    from foveate.bench.crew import LIVES, Crew, Foreman

    missing = work.rows - len(ledger.done)
    crew = Crew.fitting(nodes, crewed.device, ceil(missing / crewed.block), crewed.workers)
    # Whoever was in a block over which a worker was lost is asked again alone.
    foreman: Foreman[Block, list[Answered]] = Foreman(work.load, crew, "row", lambda block: LIVES if len(block) == 1 else 1)
    foreman.hire()
    watcher.began(crew.workers, len(ledger.done), work.rows)
    blocks = Blocks(read(work.data, work.max_new_tokens), ledger.done, crewed.block)
    for block, found in foreman.outcomes(blocks.take):
        if isinstance(found, Exception):
            if len(block) > 1:
                blocks.put_back_alone(block)
                continue
            found = [Answered.failed(block[0], found)]
        for answered in found:
            if ledger.append(answered.to_json()):
                watcher.answered(answered)
        if all(answered.gone for answered in found):
            raise FoveateError(
                f"{found[0].error}; {len(ledger.done)} of {work.rows} lines are in {ledger.path}, and the same command goes "
                "on once the server is back, with --retry-failed also for the rows that met none"
            )


class Blocks:
    """The rows that have no line yet, so many at a time; no more are read than are taken."""

    def __init__(self, rows: Iterator[Asked], done: set[str], size: int) -> None:
        """``done``: ids that are left out, as it is when the row is read."""
        self._rows = (row for row in rows if row.key not in done)
        self._size = size
        self._alone: deque[Block] = deque()

    def take(self) -> Block | None:
        """The next block; None if there is none."""
        if self._alone:
            return self._alone.popleft()
        return tuple(islice(self._rows, self._size)) or None

    def put_back_alone(self, block: Block) -> None:
        """Each row of a block once more, as a block of its own, ahead of all others."""
        self._alone.extend((row,) for row in block)
