"""``foveate batch``: a file of questions in, a file of answers out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.progress import TextColumn

from foveate import checkpoint
from foveate.checkpoint.arguments import as_text
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.progress import progress_bar
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.recipe import NONE, Recipe
from foveate.serving import on_server
from foveate.serving.answered import Answered, Answerer
from foveate.serving.asked import survey
from foveate.serving.batch import Crewed, Work, answer_all
from foveate.serving.ledger import Ledger
from foveate.serving.on_model import OnModel
from foveate.serving.settings import FULL, Keep, checked

ROWS_FAILED = 1
_AT_A_TIME = {"model": 8, "server": 16}
_SERVER_WORKERS = 2
"""While one waits for the last answers of its block, the other keeps the server at work."""
_LINE_SECONDS = 30.0
_NAMED = 20
"""So many failures of a run are said at once; all are in the file."""


@dataclass(frozen=True)
class BatchRequest:
    """The options of the command, as they were given."""

    data: Path
    out: Path
    recipe: str | None
    model: str | None
    server: str | None
    keep: str | None
    max_new_tokens: int
    seed: int
    device: str
    dtype: str
    batch_size: int | None
    address: str
    workers: int | None
    retry_failed: bool
    companion: str | None = None
    artifacts: str | None = None
    model_args: str | None = None
    system: str | None = None


@quiet()
def batch(request: BatchRequest) -> None:
    """Answer what has no line yet."""
    if request.out.resolve() == request.data.resolve():
        raise FoveateError(f"out={str(request.out)!r}: is the file of the questions; name another file")
    contents = survey(request.data, request.max_new_tokens)
    load, about = _on_server(request) if request.server is not None else _on_model(request)
    size = request.batch_size or _AT_A_TIME["model" if request.server is None else "server"]
    workers = request.workers or (None if request.server is None else _SERVER_WORKERS)
    crewed = Crewed(request.address, about.pop("device", "cpu"), workers, size)
    work = Work(request.data, contents.rows, request.max_new_tokens, load)
    rows = f"{request.data.name} ({contents.digest[:16]})"
    asked = {"data": rows, "max_new_tokens": request.max_new_tokens}
    console = diagnostics()
    with Ledger(request.out, {**about, **asked}, request.retry_failed) as ledger:
        progress = BatchProgress(console)
        try:
            with progress:
                answer_all(work, crewed, ledger, progress)
        except KeyboardInterrupt:
            console.print(
                f"foveate: interrupted; {len(ledger.done)} of {contents.rows} lines are in {request.out}, the same command "
                "goes on",
                markup=False,
            )
            raise typer.Exit(INTERRUPTED) from None
        answers = len(ledger.done) - ledger.failures
        failed = f", and {ledger.failures} that say what failed" if ledger.failures else ""
        output().print(f"{request.out}: {answers} answers{failed}", markup=False, soft_wrap=True)
        if ledger.failures:
            raise typer.Exit(ROWS_FAILED)


def _on_model(request: BatchRequest) -> tuple[Callable[[], Answerer], dict[str, Any]]:
    """What answers, and what all lines have in common."""
    if request.keep is not None:
        raise FoveateError(f"keep={request.keep!r}: is for --server; with --model the recipe says it")
    recipe = str(Recipe.of(request.recipe or NONE))
    arguments = checkpoint.parse_model_args(request.model_args)
    # The workers of a cluster may have a device that this machine lacks; they say so if they do not.
    elsewhere = request.address != "local" and request.device != "auto"
    device = request.device if elsewhere else checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    common = (request.model or "reference", recipe, request.seed, device, dtype)
    asked = OnModel(*common, request.companion, request.artifacts, as_text(arguments), request.system)
    return asked.load, asdict(asked)


def _on_server(request: BatchRequest) -> tuple[Callable[[], Answerer], dict[str, Any]]:
    assert request.server is not None
    of_models = {
        "recipe": request.recipe,
        "companion": request.companion,
        "artifacts": request.artifacts,
        "model_args": request.model_args,
    }
    for name, given in of_models.items():
        if given is not None:
            raise FoveateError(f"{name}={given!r}: is the server's own affair; leave it out, or leave out --server")
    key = on_server.key_of_environment()
    model = on_server.served(request.server, request.model, key)
    keep = _keep(request.keep)
    together = request.batch_size or _AT_A_TIME["server"]
    asked = on_server.OnServer(request.server, model, keep, request.system, together, key)
    return asked.load, {"server": asked.url, "model": model, "keep": keep, "system": request.system}


def _keep(text: str | None) -> Keep | None:
    if text is None:
        return None
    if text == FULL:
        return FULL
    try:
        number = float(text) if "." in text else int(text)
    except ValueError:
        raise FoveateError(f"keep={text!r}: must be a count, a share in (0, 1] or {FULL!r}") from None
    return checked("keep", number)


class BatchProgress:
    """Shows lines as they are written: a bar on a terminal, elsewhere now and then a line; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = progress_bar(console, TextColumn("{task.completed}/{task.total}, {task.fields[failed]} failed"))
        self._task = self._bar.add_task("starting", total=None, failed=0)
        self._done = self._rows = self._failed = 0
        self._shown = time.monotonic()

    def __enter__(self) -> BatchProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def began(self, workers: int, done: int, rows: int) -> None:
        """Show how much there is."""
        self._done, self._rows, self._shown = done, rows, time.monotonic()
        self._bar.reset(self._task, description="", total=rows, completed=done, failed=0)
        there = f", {done} of {rows} lines are there" if done else f", {rows} rows"
        self._console.print(f"{workers} worker{'s' * (workers > 1)} on Ray{there}")

    def answered(self, answered: Answered) -> None:
        """Move the bar; say what failed."""
        self._done += 1
        if answered.error is not None:
            self._failed += 1
            if self._failed <= _NAMED:
                more = "; more are in the file" if self._failed == _NAMED else ""
                self._console.print(f"failed: {answered.id}: {answered.error}{more}", style="red", markup=False)
        self._bar.update(self._task, completed=self._done, failed=self._failed)
        if not self._console.is_terminal and time.monotonic() - self._shown > _LINE_SECONDS:
            self._shown = time.monotonic()
            self._console.print(f"{self._done}/{self._rows} lines, {self._failed} failed meanwhile")
