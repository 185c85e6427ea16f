"""How a session shows itself."""

from __future__ import annotations

from typing import Any

from foveate.core.recipe import Recipe
from foveate.core.report import Report
from foveate.core.shown import html_table
from foveate.engine.seat import Seat
from foveate.models import Anatomy


class Shown:
    """A session as text, in a notebook, and as data."""

    recipe: Recipe
    anatomy: Anatomy
    attached: bool
    report: Report
    _seat: Seat

    def __repr__(self) -> str:
        return f"<Session on {self.anatomy.family}: {self.recipe}, {self._state}>"

    def _repr_html_(self) -> str:
        model = f"{self.anatomy.family} ({type(self.anatomy.model).__name__})"
        session = html_table([("model", model), ("session", self._state)])
        return session + self.report._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """What runs where, and what the last request cost, as JSON can say it.

        Returns:
            ``model`` (its family), ``recipe`` (its text), ``attached``, and ``report`` (`Report.to_dict`).
        """
        return {
            "model": self.anatomy.family,
            "recipe": str(self.recipe),
            "attached": self.attached,
            "report": self.report.to_dict(),
        }

    @property
    def under_way(self) -> Report | None:
        """What this thread's request has cost so far, asked while it generates (by a stopping criterion); else None."""
        call = self._seat.call
        return None if call is None else call.recording.report()

    @property
    def _state(self) -> str:
        return "attached" if self.attached else "detached"
