"""``--ray`` with or without an address, which Typer's options cannot be."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

THIS_MACHINE = "local"
"""What Ray itself calls a Ray of one's own."""


class RayMayStandAlone(TyperGroup):
    """A command group whose option ``--ray`` means this machine unless an address follows."""

    # Typer's own Context is a subclass of the one that its groups are declared with.
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the address in where it was left out."""
        followers = [*args, "--"][1:]
        return super().parse_args(
            ctx,
            [
                f"--ray={THIS_MACHINE}" if argument == "--ray" and follower.startswith("-") else argument
                for argument, follower in zip(args, followers, strict=True)
            ],
        )
