"""Same selections and values as the published code on the same tensors.

Every case ``<system>/*.npz`` of the folder in the environment variable ``FOVEATE_VECTORS`` (default: the project's own copy)
is checked if there is an adapter for its system in this folder.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.vectors import Case

HERE = Path(__file__).parent
OWN = HERE.parent / "data" / "vectors"
FOLDER = Path(os.environ.get("FOVEATE_VECTORS") or OWN)
ADAPTERS: dict[str, ModuleType] = {
    module.name: import_module(f"tests.vectors.{module.name}")
    for module in pkgutil.iter_modules([str(HERE)])
    if not module.name.startswith("test_")
}


def cases(system: str) -> list[Path]:
    """The system's files; a folder may be spelled with hyphens."""
    return sorted(path for path in FOLDER.glob("*/*.npz") if path.parent.name.replace("-", "_") == system)


def checks(adapter: ModuleType) -> list[Callable[[Case], None]]:
    return [function for name, function in vars(adapter).items() if name.startswith("check_")]


def read(path: Path) -> Case:
    def value(array: np.ndarray) -> Any:
        if array.ndim == 0:
            return array.item()
        return torch.from_numpy(array)

    with np.load(path, allow_pickle=False) as arrays:
        return {name: value(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize(
    ("path", "check"),
    [
        pytest.param(path, check, id=f"{system}-{path.stem}-{check.__name__.removeprefix('check_')}")
        for system, adapter in ADAPTERS.items()
        for path in cases(system)
        for check in checks(adapter)
    ],
)
def test_it_computes_what_the_authors_ran(path: Path, check: Callable[[Case], None]) -> None:
    check(read(path))


def test_the_folder_has_cases() -> None:
    assert any(map(cases, ADAPTERS)), f"FOVEATE_VECTORS={str(FOLDER)!r}: no <system>/*.npz for any adapter"


@pytest.mark.skipif(FOLDER != OWN, reason="a folder of one's own need not hold every system")
@pytest.mark.parametrize("system", ADAPTERS)
def test_every_adapter_has_cases(system: str) -> None:
    assert cases(system)
