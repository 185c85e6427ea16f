"""Packages of other people, as if they were installed: ``foveate_stripes`` lies here, others are made by tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.core import registry

HERE = Path(__file__).parent


@contextmanager
def installed(folder: Path = HERE) -> Iterator[None]:
    """The packages in ``folder`` (with their ``.dist-info``) are installed, and bring their methods; gone afterwards."""
    known, loaded = dict(registry.methods()), set(sys.modules)
    sys.path.insert(0, str(folder))
    registry._load.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        registry._METHODS.clear()
        registry._METHODS.update(known)
        for name in set(sys.modules) - loaded:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]


def package(folder: Path, name: str, source: str) -> None:
    """A package that declares a method as an entry point."""
    (folder / f"{name}.py").write_text(source)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\nmine = {name}:Mine\n")
