"""A quantized model as a checkpoint of compressed-tensors, which transformers and others load without Foveate.

What inputs are divided by is folded into what makes them: a norm's weight, or the rows of the linear in front. Steps are
ours; the library packs. Whatever needs code of ours to be right never looks like a checkpoint: it is refused here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.files import write_json
from foveate.core.recipe import build
from foveate.core.weights import Replaced, Weights
from foveate.engine.linears import blocks_of, values
from foveate.engine.packed import refuse_other_weights
from foveate.engine.shelf import block_of
from foveate.models import Anatomy, anatomy
from foveate.ops.grid import Grid

OLDEST = [0, 20]
"""Version of compressed-tensors that checkpoints are written with."""
_RATHER = "use the artifact with attach(artifacts=...) instead"


def export(model: nn.Module, artifact: Artifact, out: str | Path) -> None:
    """Write ``model``, with the weights of ``artifact``, as a checkpoint of compressed-tensors; the model stays as it is.

    Args:
        model: of which the artifact was made.
        artifact: as `foveate.quantize` gives it.
        out: the checkpoint's folder; its tokenizer and processor are the model's own, and not written.

    Raises:
        FoveateError: if the library is missing, or other loaders would answer something else than Foveate does.
    """
    method = build(artifact.method, {name: _plain(value) for name, value in artifact.parameters.items()})
    if not isinstance(method, Weights):
        raise FoveateError(f"{method.name}: replaces no weights, so there is nothing to export")
    refuse_export(method)
    parts = anatomy(model)
    artifact.check(parts.traits().fingerprint, {})
    refuse_other_weights(artifact, parts)
    blocks = [block_of(artifact, number) for number in range(artifact.numbers["blocks"])]
    if any(one.inputs is not None for block in blocks for one in block.values()):
        raise FoveateError(f"{method.name}: rounds inputs to grids of its own, which are not written; use activations=16")
    there = anatomy(copy.deepcopy(parts.model))
    sources: Mapping[str, Mapping[str, str]] = artifact.numbers["sources"]
    with torch.no_grad():
        for number, block in enumerate(blocks):
            _fold(blocks_of(there, method.part)[number], block, sources.get(str(number), {}), f"block {number}")
        _write(there, method, blocks, Path(out))


def refuse_export(method: Weights) -> None:
    """Refuse a method whose weights other loaders would read wrongly, or not at all.

    Raises:
        FoveateError: with the remedy.
    """
    if not method.ordinary:
        raise FoveateError(
            f"{method.name}: adds to the products with its integers what compressed-tensors knows nothing of, without which "
            f"they are wrong; {_RATHER}"
        )
    if not method.symmetric:
        raise FoveateError(
            f"{method.name}: symmetric=False: transformers does not load packed checkpoints with zero points; use "
            "symmetric=True, or the artifact as it is"
        )
    try:
        found = version("compressed-tensors")
    except PackageNotFoundError as error:
        raise FoveateError("export: needs compressed-tensors; pip install 'foveate[quantize]'") from error
    if [int(number) for number in found.split(".")[:2]] < OLDEST:
        raise FoveateError(
            f"export: compressed-tensors {found} names the linears that stay as they are so that other loaders round them, "
            f"too; pip install 'compressed-tensors>={'.'.join(map(str, OLDEST))}'"
        )


def _fold(block: nn.Module, found: dict[str, Replaced], sources: Mapping[str, str], where: str) -> None:
    """Let what makes the inputs of linears divide them; ``found`` then needs no division."""
    done: dict[str, Tensor] = {}
    for name in [name for name, one in found.items() if one.divide is not None]:
        divide, source = found[name].divide, sources.get(name)
        assert divide is not None
        if source is None:
            raise FoveateError(f"{name} of {where}: nothing in front of it can divide its input; {_RATHER}")
        # Linears that share an input share what it is divided by, or one of them is wrong.
        readers = [other for other, made_by in sources.items() if made_by == source]
        for other in readers:
            theirs = found[other].divide if other in found else None
            if theirs is None or not torch.equal(theirs, divide):
                raise FoveateError(f"{name} and {other} of {where}: share an input and divide it differently; {_RATHER}")
        if source not in done:
            _divide(block.get_submodule(source), source, divide, found, where)
            done[source] = divide
    found.update({name: replace(one, divide=None) for name, one in found.items()})


def _divide(module: Any, name: str, divide: Tensor, found: dict[str, Replaced], where: str) -> None:
    if isinstance(module, nn.Linear):
        if name in found:
            grid = found[name].grid
            found[name] = replace(found[name], grid=Grid(grid.bits, grid.scale / divide[:, None], grid.zero))
        module.weight.div_(divide[:, None])
        if module.bias is not None:
            module.bias.div_(divide)
        return
    weight = module.weight
    x = torch.randn(4, len(divide), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    wanted, before = module(x) / divide.to(weight.dtype), weight.clone()
    # Some families multiply by the weight, others by one more than it.
    for shift in (0, 1):
        weight.copy_((before.float() + shift) / divide - shift)
        if getattr(module, "bias", None) is None and torch.allclose(module(x), wanted, rtol=0.02, atol=1e-3):
            return
    raise FoveateError(f"{name} of {where}: is no norm whose output could be divided by its weight; {_RATHER}")


def _write(there: Anatomy, method: Weights, blocks: list[dict[str, Replaced]], out: Path) -> None:
    import compressed_tensors.quantization as tensors
    from compressed_tensors import ModelCompressor

    model: Any = there.model
    names = {module: name for name, module in model.named_modules()}
    placed: dict[str, Replaced] = {}
    for module, block in zip(blocks_of(there, method.part), blocks, strict=True):
        placed |= {f"{names[module]}.{name}": one for name, one in block.items()}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in placed]
    grouped = method.group_size != -1
    weights = tensors.QuantizationArgs(
        num_bits=method.bits,
        type="int",
        strategy="group" if grouped else "channel",
        group_size=method.group_size if grouped else None,
        symmetric=True,
    )
    inputs = None
    if method.activations < 16:
        inputs = tensors.QuantizationArgs(num_bits=method.activations, type="int", strategy="token", dynamic=True)
    scheme = tensors.QuantizationScheme(
        targets=_targets(placed, method.part),
        weights=weights,
        input_activations=inputs,
        # Left to itself the library takes eight bits for each weight wherever inputs are rounded, too.
        format="pack-quantized" if inputs is not None and method.bits < 8 else None,
    )
    tensors.apply_quantization_config(model, tensors.QuantizationConfig(config_groups={"weights": scheme}, ignore=others))
    for name, one in placed.items():
        linear = model.get_submodule(name)
        # In the dtype of the model first, or what is packed and what is kept would be rounded by different steps.
        scale = one.grid.scale.to(linear.weight.dtype)
        linear.weight.copy_(values(replace(one, grid=Grid(one.grid.bits, scale.float())), linear.weight.dtype))
        linear.weight_scale.copy_(scale)
        linear.quantization_status = tensors.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    written = json.loads((out / "config.json").read_text())
    written["quantization_config"]["ignore"] += _elsewhere(placed, others)
    write_json(out / "config.json", written)


def _elsewhere(placed: Mapping[str, Replaced], others: Sequence[str]) -> list[str]:
    """Patterns for the parts of the model in which nothing was replaced, whatever stands before and behind their names.

    The library writes the names of a checkpoint's file. Loaders that know its modules by others would round linears of an
    encoder whose names end like those of the decoder, and find no weights for them.
    """
    known, found = {step for name in placed for step in name.split(".")}, dict[str, None]()
    for name in others:
        step = next((step for step in name.split(".")[:-1] if step not in known), "0")
        if not step.isdigit():
            found[f"re:(.*[.])?{re.escape(step)}[.].*"] = None
    return list(found)


def _targets(placed: Mapping[str, Replaced], part: str) -> list[str]:
    """Patterns that say which linears: names of whole families of layers, as other loaders spell the way there otherwise."""
    return sorted({f"re:.*{re.sub(r'[.]([0-9]+)[.]', '[.][0-9]+[.]', _tail(name, part))}$" for name in placed})


def _tail(name: str, part: str) -> str:
    """From the layers on; of an encoder with one name more, as its layers may be named like the decoder's."""
    front, layers, rest = name.rpartition("layers")
    above = front.rstrip(".").rpartition(".")[2]
    return f"{above}.{layers}{rest}" if layers and part == "encoder" else layers + rest


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
