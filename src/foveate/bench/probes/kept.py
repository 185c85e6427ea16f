"""What a probe has measured so far, so that one that is interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError
from foveate.core.files import write_json


class Kept:
    """Measurements by name in one JSON file; they belong to ``settings``, which are kept beside them."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open the file, if there is one; refuse measurements under other settings."""
        self.path, self._settings = path, dict(settings)
        self._values: dict[str, Any] = {}
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, self._values = content["settings"], content["values"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FoveateError(f"out={str(path)!r}: cannot be read ({error}); remove it") from error
        for name, wanted in self._settings.items():
            if found.get(name) != wanted:
                raise FoveateError(
                    f"{name}={wanted!r}: {str(path)!r} was measured with {name}={found.get(name)!r}; "
                    "go on with that, remove the file, or name another folder"
                )

    def get(self, name: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """The measurement ``name``: ``measure(*arguments)``, written down, if it is not there yet. It must be plain JSON."""
        if name not in self._values:
            self._values[name] = measure(*arguments)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"settings": self._settings, "values": self._values})
        return self._values[name]
