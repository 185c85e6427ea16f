"""transformers' own tests, from its source archive on the package index; nothing of them enters the tree.

The archive of a release carries the mixin that every model's tests are made of (``test_modeling_common.py``), but neither
the models' own test files nor the mixin of generation: `tests.peers.models` gives the mixin our tiny models, and
`tests.peers.asks` stands in for the other.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

FOLDER = Path(__file__).parents[2] / ".peers" / transformers.__version__
"""Where the tests of the installed transformers lie once they were fetched; git ignores it."""
PACKAGE = "transformers_tests"


def fetch() -> None:
    """Put the archive's tests into `FOLDER`, unless they are there."""
    if FOLDER.exists():
        return
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as folder:
        wanted = f"transformers=={transformers.__version__}"
        download = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", folder, wanted]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (path,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(path) as archive:
            members = [member for member in archive.getmembers() if Path(member.name).parts[1:2] == ("tests",)]
            archive.extractall(folder, members, filter="data")
        (tests,) = Path(folder).glob("*/tests")
        tests.rename(FOLDER)


def model_tester_mixin(generation: type) -> Any:
    """transformers' ``ModelTesterMixin``; ``generation`` stands in for the mixin that it imports and the archive lacks."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER)]
    sys.modules[PACKAGE] = package
    _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("generation.test_utils", GenerationTesterMixin=generation)
    return importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin


def _stand_in(name: str, **contents: Any) -> None:
    module = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(contents)
    sys.modules[f"{PACKAGE}.{name.partition('.')[0]}"] = ModuleType(f"{PACKAGE}.{name.partition('.')[0]}")
    sys.modules[module.__name__] = module


if __name__ == "__main__":
    fetch()
