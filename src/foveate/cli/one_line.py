"""Errors of the command line: one line on stderr and exit code 2, whoever raised them."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from foveate.core.errors import FoveateError, NeedsTraining

# Typer exports the leaf of its usage errors only; what they have in common is the base with `format_message`.
_UsageError: Any = typer.BadParameter.__bases__[0]

USER_ERROR = 2
INTERRUPTED = 130


class OneLineErrors(TyperGroup):
    """A command group that says what a user got wrong in one plain line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command and exit with its code."""
        extra["standalone_mode"] = False
        if not standalone_mode:
            return super().main(*args, **extra)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = functools.partial(_show, warnings.showwarning)
                code = super().main(*args, **extra)
        except (_UsageError, FoveateError) as error:
            message = error.format_message() if isinstance(error, _UsageError) else str(error)
            typer.echo(f"foveate: {' '.join(message.split())}", err=True)
            code = USER_ERROR
        except typer.Abort:
            code = INTERRUPTED
        sys.exit(code)


def _show(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning of ours in one line; others as they would be shown."""
    if issubclass(category, NeedsTraining):
        typer.echo(f"foveate: {message}", err=True)
    else:
        otherwise(message, category, *where, **more)
