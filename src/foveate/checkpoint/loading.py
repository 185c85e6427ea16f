"""A model and its processor by name: embedded, in a package, a checkpoint folder, or on the Hugging Face Hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError

from foveate import reference
from foveate.checkpoint import reference_smol, smol
from foveate.checkpoint.arguments import check_model_args, of_processor
from foveate.checkpoint.conversation import Checkpoint
from foveate.checkpoint.devices import DTYPES
from foveate.core.artifact import Artifact
from foveate.core.companion import Companion
from foveate.core.errors import FoveateError
from foveate.core.text import first_line, one_line
from foveate.engine import ClipCompanion
from foveate.models import anatomy
from foveate.models.processors import holds_text, read_processor, reads_text

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_SECONDS = 10
_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
REFERENCES = (*reference.MODELS, reference_smol.NAME)
"""Models that were trained here: they know the tasks of `foveate.tasks`, by their own words."""
_EXTRAS = {"num2words": "smolvlm", "torchvision": "video"}
"""Packages that a family's processor may want, and the extras that bring them."""


def load(
    name: str,
    device: str,
    dtype: str,
    companion: str | None = None,
    artifacts: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> Checkpoint:
    """Load a model and its processor by name.

    Args:
        name: ``reference`` or another of those that were trained here, ``smol``, a checkpoint folder, or a Hub id; of a
            vision-language model or a text model.
        device: as `resolve_device` gives it; where ``model_args`` have a ``device_map``, that places the model instead.
        dtype: as `resolve_dtype` gives it.
        companion: a CLIP checkpoint; without one, the text tower that lies in the model's folder is taken, if any.
        artifacts: a folder of calibrated numbers.
        model_args: more keywords of ``from_pretrained``, such as ``attn_implementation`` or ``quantization_config``.
        system: what every conversation begins with, as the chat template's role ``system``.

    Raises:
        FoveateError: in one line, if the model cannot be loaded or is of no supported family, if it has no chat template, or
            one without a place for ``system``.
    """
    arguments = check_model_args(model_args or {})
    brought = tuple(Artifact.all_in(artifacts)) if artifacts is not None else ()
    found, cached_only = _place(name)
    source, options = found or name, {"local_files_only": cached_only}
    try:
        processor = read_processor(source, **of_processor(arguments), **options)
        model = _model(source, DTYPES[dtype], arguments, options)
    except FoveateError:
        raise
    except _UNLOADABLE as error:
        raise _unloadable(name, error) from error
    if not getattr(processor, "chat_template", None):
        raise FoveateError(f"model={name!r}: its processor has no chat template; add chat_template.jinja to the checkpoint")
    # A family that is not supported is one mistake, not one in every cell.
    anatomy(model)
    # Decoding continues at the right end of every row.
    processor.tokenizer.padding_side = "left"
    if "device_map" not in arguments:
        model = model.to(device)
    model = model.eval()
    if companion is not None:
        beside: Companion | None = _clip(companion, processor.tokenizer, str(model.device), dtype)
    else:
        beside = reference.companion(model, found) if found else None
    _LOG.info("%s: %s in %s on %s", name, type(model).__name__, model.dtype, model.device)
    loaded = Checkpoint(name, model, processor, beside, brought, system)
    loaded.check_system()
    return loaded


def load_processor(name: str, model_args: Mapping[str, Any] | None = None) -> Any:
    """The processor of a model, by the model's name; it reads pictures where torchvision is missing, too.

    What ``AutoProcessor.from_pretrained`` gives, but that refuses to load families that read videos without torchvision.

    >>> from foveate.checkpoint import load_processor
    >>> processor = load_processor("Qwen/Qwen2.5-VL-3B-Instruct")  # doctest: +SKIP
    """
    return _read(read_processor, name, model_args)


def is_text(name: str, model_args: Mapping[str, Any] | None = None) -> bool:
    """Whether a model, by its name, reads text alone; its configuration says so, and nothing else of it is read."""
    return name not in REFERENCES and _read(holds_text, name, model_args)


def local_folder(name: str) -> Path | None:
    """The folder that a model's name means, or None where it can only be a Hub id; that of a ``smol`` is made first."""
    for made in (smol, reference_smol):
        if name == made.NAME:
            return made.path()
    if name not in reference.MODELS:
        return Path(name) if Path(name).is_dir() else None
    return reference.path(name)


def evaluation(name: str) -> dict[str, dict[str, Any]]:
    """What was measured of a model that was trained here, by task; nothing of any other."""
    if name == reference_smol.NAME:
        return reference.evaluation(reference_smol.home())
    return reference.evaluation(reference.path(name)) if name in reference.MODELS else {}


def _model(source: str | Path, dtype: Any, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.quantizers.auto import AutoQuantizationConfig

    given = dict(arguments)
    if "quantization_config" in given:
        given["quantization_config"] = AutoQuantizationConfig.from_dict(given["quantization_config"])
    config = AutoConfig.from_pretrained(source, **of_processor(arguments), **options)
    kind = AutoModelForCausalLM if reads_text(type(config)) else AutoModelForImageTextToText
    return kind.from_pretrained(source, dtype=dtype, **given, **options)


def _read(read: Callable[..., _T], name: str, model_args: Mapping[str, Any] | None) -> _T:
    """What ``read`` finds in a model's folder, or on the Hub."""
    found, cached_only = _place(name)
    options = of_processor(check_model_args(model_args or {}))
    try:
        return read(found or name, **options, local_files_only=cached_only)
    except FoveateError:
        raise
    except _UNLOADABLE as error:
        raise _unloadable(name, error) from error


def _place(name: str) -> tuple[Path | None, bool]:
    """The folder of a model, if it has one; else whether it can only be had from the cache."""
    found = local_folder(name)
    if found is None and not _HUB_ID.fullmatch(name):
        known = ", ".join((*REFERENCES, smol.NAME))
        raise FoveateError(f"model={name!r}: must be {known}, a checkpoint folder, or a Hub id such as owner/name")
    return found, found is None and not _on_hub("model", name)


def _unloadable(name: str, error: Exception) -> FoveateError:
    """What transformers says, whole where a package is missing: the remedy comes last."""
    said = one_line(error)
    remedies = [f"; pip install 'foveate[{extra}]'" for package, extra in _EXTRAS.items() if package in said.lower()]
    if not remedies and not isinstance(error, ImportError):
        return FoveateError(f"model={name!r}: cannot be loaded as a language model ({first_line(error)})")
    return FoveateError(f"model={name!r}: cannot be loaded ({said}){''.join(remedies)}")


def _clip(name: str, tokenizer: Any, device: str, dtype: str) -> ClipCompanion:
    is_folder = Path(name).is_dir()
    if not is_folder and not _HUB_ID.fullmatch(name):
        raise FoveateError(f"companion={name!r}: must be the folder of a CLIP checkpoint, or a Hub id such as owner/name")
    cached_only = not is_folder and not _on_hub("companion", name)
    return ClipCompanion.load(name, tokenizer, device, DTYPES[dtype], local_files_only=cached_only)


def _on_hub(parameter: str, name: str) -> bool:
    """Whether the Hub answers for this id; asked once, where loading would ask for every file and try each again."""
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise FoveateError(f"{parameter}={name!r}: is no folder here, and no model on the Hub that you may read") from error
    # Whatever else is in the way of the Hub, the model may be in the cache.
    except Exception:
        return False
    return True
