"""What a user's own script gives ``from_pretrained``, as text: ``--model-args`` of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from foveate.core.errors import FoveateError
from foveate.core.text import split_outside_brackets

_KINDS: dict[str, tuple[type, ...]] = {
    "attn_implementation": (str, dict),
    "cache_dir": (str,),
    "code_revision": (str,),
    "device_map": (str, int, dict),
    "experts_implementation": (str,),
    "max_memory": (dict,),
    "offload_buffers": (bool,),
    "offload_folder": (str,),
    "quantization_config": (dict,),
    "revision": (str,),
    "subfolder": (str,),
    "trust_remote_code": (bool,),
    "use_kernels": (bool,),
    "use_safetensors": (bool,),
    "variant": (str,),
}
"""Keywords of ``from_pretrained`` that may be given, and what they may be in YAML."""
_OF_PROCESSOR = ("cache_dir", "code_revision", "revision", "subfolder", "trust_remote_code")
_ELSEWHERE = {
    "dtype": "give --dtype",
    "torch_dtype": "give --dtype",
    "token": "log in with hf auth login, so that it is written nowhere",
    "load_in_4bit": "give quantization_config={load_in_4bit: true}",
    "load_in_8bit": "give quantization_config={load_in_8bit: true}",
}
"""What belongs elsewhere, and where."""
_FORM = "give name=value,name=value, {name: value}, or a .yaml file"


def parse_model_args(text: str | None) -> dict[str, Any]:
    """Keywords of ``from_pretrained``, from ``name=value,name=value``, ``{name: value}``, or the name of a YAML file.

    Values are YAML: ``true``, ``auto``, ``{load_in_4bit: true}``.

    Raises:
        FoveateError: if a keyword is unknown, or its value none of those that it may have.
    """
    if text is None:
        return {}
    if text.endswith((".yaml", ".yml")):
        found = _read(Path(text))
    elif text.lstrip().startswith("{"):
        found = _yaml(text, text)
    else:
        found = {}
        for part in filter(None, map(str.strip, split_outside_brackets(text, ","))):
            name, equals, value = part.partition("=")
            if not equals:
                raise FoveateError(f"model_args={part!r}: has no value; {_FORM}")
            found[name.strip()] = _yaml(value, part)
    if not isinstance(found, dict):
        raise FoveateError(f"model_args={text!r}: names no arguments; {_FORM}")
    return check_model_args(found)


def check_model_args(given: Mapping[Any, Any]) -> dict[str, Any]:
    """The same keywords, if all of them are known and have values that they may have."""
    for name, value in given.items():
        if name in _ELSEWHERE:
            raise FoveateError(f"model_args={name!r}: {_ELSEWHERE[name]}")
        if name not in _KINDS:
            close = get_close_matches(str(name), _KINDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"must be some of {', '.join(_KINDS)}"
            raise FoveateError(f"model_args={name!r}: {hint}")
        # A bool is an int, too.
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            kinds = " or ".join(_NAMES[kind] for kind in _KINDS[name])
            raise FoveateError(f"model_args={name}={value!r}: must be {kinds}")
    return dict(given)


_NAMES: dict[type, str] = {bool: "true or false", dict: "a mapping {name: value}", int: "a number", str: "text"}


def of_processor(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the processor is loaded with, too."""
    return {name: model_args[name] for name in _OF_PROCESSOR if name in model_args}


def as_text(model_args: Mapping[str, Any]) -> str | None:
    """One text for all ways to say the same, which `parse_model_args` reads; None for nothing."""
    if not model_args:
        return None
    return yaml.safe_dump(dict(model_args), default_flow_style=True, sort_keys=True, width=2**20).strip()


def _read(path: Path) -> Any:
    try:
        return _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FoveateError(f"model_args={str(path)!r}: cannot be read ({reason})") from error


def _yaml(text: str, named: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise FoveateError(f"model_args={named!r}: is not YAML ({reason}); {_FORM}") from error
