"""Makes the artifact of a method that replaces weights: block by block, one of them at work at a time, kept one by one.

The artifact is ``<method>.json`` with a folder ``<method>`` beside it that holds a file for each block, written whole or not
at all. A run that was cut short goes on behind the last of them, and ends with the same bits: finished blocks are read back,
and what they make of the samples is made again. The model itself is never changed.

At most the model, the inputs of one block for every sample (once more for methods that look at what quantized blocks make),
what blocks are called with, two copies of a block and what the method needs for one group of linears are in memory at once,
however many blocks there are (`bound`); and what enters each block of one batch, for methods that ask for slopes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.artifact import SIZE, Artifact
from foveate.core.companion import Companion
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe, RecipeLike
from foveate.core.shape import FLOAT
from foveate.core.weights import Replaced, Stream, Weights
from foveate.engine.before import in_front, parted
from foveate.engine.calibrate import Batches, Watcher
from foveate.engine.check import check
from foveate.engine.idle import check_idle
from foveate.engine.linears import blocks_of, digest, linears_of, numbered, tensors_of
from foveate.engine.replay import Replay
from foveate.engine.session import attach
from foveate.engine.shelf import Shelf
from foveate.engine.slopes import Slopes
from foveate.engine.trial import Trial
from foveate.models import Anatomy, anatomy
from foveate.models.sketch import sketch

SIZES = ("weights", "integers", "steps", "sides")
KINDS = {"words": "integers", "scale": "steps", "zero": "steps", "form": "steps", "inputs": "steps"}
"""What a tensor of a linear counts as."""


def quantize(
    model: nn.Module,
    method: RecipeLike,
    batches: Batches = (),
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    watcher: Watcher | None = None,
    companion: Companion | None = None,
    artifacts: Iterable[Artifact] = (),
) -> Artifact:
    """The artifact of ``method``, such as ``"rtn(bits=4, group_size=64)"``, for ``model``, which stays as it is.

    In a recipe such as ``"vlm_ptq(bits=3) + hiprune(keep=64)"`` what acts before the language model is at work while samples
    are read, so that weights are fitted to the rows that will come. The artifact runs in any recipe all the same.

    Args:
        model: a vision-language model loaded through transformers, its weights plain floats.
        method: one method that replaces weights, or a recipe with one.
        batches: keyword arguments of its forward, for methods that look at samples; with ``labels`` where answers stand
            behind the prompts.
        out: folder for the artifact, as `attach` takes it; what a run that was cut short left there is gone on with. None:
            the artifact is in memory alone.
        seed: of methods that draw.
        device: where one block at a time is to run; None: where it is.
        watcher: follows it.
        companion, artifacts: what the recipe's other methods need, as `attach` takes it.

    Raises:
        FoveateError: if no method replaces weights, or several do, if it cannot do so on this model, or gets no samples but
            needs some.
    """
    method, others = to_quantize(method)
    parts = anatomy(model)
    refuse(method, parts)
    before, said = in_front(method, others, parts.traits())
    if method.streams and not len(batches):
        raise FoveateError(f"{method.name}: looks at what samples feed the model; give batches, such as prompts of yours")
    brought = tuple(artifacts)
    check(before, parts, parts.traits(companion is not None, brought))
    shelf = Shelf(None if out is None else Path(out), method.name)
    shelf.start(_started(method, before, parts, batches, seed))
    torch.manual_seed(seed)
    _watched(watcher, "reading", len(batches) if method.streams else 0)
    advance = (lambda: None) if watcher is None else watcher.advance
    where = None if device is None else torch.device(device)
    attaching = None
    if before.methods:
        attaching = partial(attach, parts.model, before, seed=seed, companion=companion, artifacts=brought)
    replay = Replay(parts, batches if method.streams else (), method.part, where, advance, attaching)
    slopes = Slopes(replay, batches)
    sources: dict[str, dict[str, str]] = {}
    size = dict.fromkeys(SIZES, 0)
    states: dict[Stream, Sequence[Tensor]] = {stream: [w.x for w in replay.batches] for stream in ("exact", *method.streams)}
    _watched(watcher, "quantizing blocks", len(replay.blocks))
    for number in range(len(replay.blocks)):
        trial = Trial(replay, number, states, slopes, said.append)
        found = shelf.read(number)
        if found is None:
            # Each block draws by itself, so that one that is gone on with draws as it would have.
            torch.manual_seed(seed + number)
            method.quantize(trial)
            shelf.write(number, _tensors(trial))
            found = shelf.read(number)
        assert found is not None
        if any(one.divide is not None for one in found.values()):
            sources[str(number)] = {name: made for name in trial.linears if (made := trial.source(name)) is not None}
        size = {kind: size[kind] + count for kind, count in size_of(found, trial.dtype).items()}
        for name, replaced in found.items():  # as it was written, so that a later run meets the same
            trial.place(name, replaced)
        states = {stream: trial.forward(stream) for stream in states} if replay.batches else states
        advance()
    content = {
        "part": method.part,
        "blocks": len(replay.blocks),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "digests": [digest(block) for block in replay.blocks],
        "sketch": sketch(numbered(replay.blocks)) if method.part == "encoder" else {},
        "samples": sum(len(batch["input_ids"]) for batch in batches) if method.streams else 0,
        "before": str(before) if method.streams and before.methods else "",
        SIZE: size,
        "sources": sources,
        "said": said,
    }
    return shelf.finish(method, parts, content)


def to_quantize(method: RecipeLike) -> tuple[Weights, Recipe]:
    """The one method that replaces weights, and what stands beside it.

    Raises:
        FoveateError: if there is none or several.
    """
    return parted(Recipe.of(method))


def refuse(method: Weights, parts: Anatomy) -> None:
    """Refuse a model whose weights the method cannot replace.

    Raises:
        FoveateError: with the remedy.
    """
    check_idle(method, parts.traits())
    config = parts.model.config
    if getattr(config, "quantization_config", None) is not None or getattr(parts.model, "is_quantized", False):
        raise FoveateError("model: is quantized already; load the checkpoint of which it was made")
    experts = method.refuse_experts(parts.traits())
    if experts is not None:
        raise FoveateError(f"{method.name}: {experts}")
    widths: dict[int, str] = {}
    for number, block in enumerate(blocks_of(parts, method.part)):
        for name, linear in linears_of(block, f"{method.part} block {number}").items():
            widths.setdefault(linear.in_features, f"{name} in {method.part} block {number}")
    for width, where in widths.items():
        if method.group_size != -1 and width % method.group_size:
            fitting = [size for size in (256, 128, 64, 32, 16, 8) if not any(each % size for each in widths)]
            right = ", ".join(map(str, [*fitting, -1]))
            raise FoveateError(
                f"{method.name}: group_size={method.group_size}: does not divide the {width} inputs of {where}; must be one "
                f"of {right}"
            )


def _watched(watcher: Watcher | None, what: str, steps: int) -> None:
    if watcher is not None and steps:
        watcher.begin(what, steps)


def bound(model: nn.Module, method: Weights, batches: Batches) -> int:
    """Most bytes that `quantize` holds beside the model and the batches, where results go to a folder.

    What each stream brings to a block and to the next, masks and tables of every batch; one batch at work in the encoder or
    in a block; two copies of a block; of one linear its weight while steps are searched, and second moments of its inputs;
    of all linears of a block what they are while they learn. Whatever the depth, but for what passes of the whole model
    forward and backward keep, for methods that ask for slopes: of one batch at a time what enters each block.
    """
    parts = anatomy(model)
    blocks = blocks_of(parts, method.part)
    linears = [linear for block in blocks for linear in linears_of(block, "block").values()]
    inner = max(max(linear.in_features, linear.out_features) for linear in linears)
    largest, item = max(linear.weight.numel() for linear in linears), parts.dtype.itemsize
    copies = 2 * max(sum(one.nbytes for one in block.parameters()) for block in blocks)
    learning = 16 * FLOAT * max(sum(one.weight.numel() for one in linears_of(block, "block").values()) for block in blocks)
    work = 16 * FLOAT * largest + 8 * inner**2 * torch.float64.itemsize + copies + learning
    if not method.streams:
        return work
    width, heads = parts.config.hidden_size, parts.config.num_attention_heads
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    if method.part == "encoder" and parts.encoder is not None:
        width, heads = parts.encoder.width, parts.encoder.heads
        shapes = [_patches(batch, parts) for batch in batches]
    pixels = [max((t.nbytes for t in batch.values() if t.is_floating_point()), default=0) for batch in batches]
    states = 2 * (1 + len(method.streams)) * sum(b * t for b, t in shapes) * width * item
    masks = sum(FLOAT * b * t * (t + 4 * width // heads + 16) for b, t in shapes)
    rows, pairs = max(b * t for b, t in shapes), max(b * t * t for b, t in shapes)
    passes = len(blocks) * rows * width * item
    return work + states + masks + passes + FLOAT * (rows * (4 * inner + 16 * width) + 2 * heads * pairs) + 16 * max(pixels)


def _patches(batch: Mapping[str, Tensor], parts: Anatomy) -> tuple[int, int]:
    """Pictures (1 where they come as one) and at most so many rows in the encoder of each."""
    pixels = max((value for value in batch.values() if value.is_floating_point()), key=Tensor.numel)
    pictures = pixels.shape[:-3].numel() if pixels.ndim > 3 else 1
    rows = pixels.numel() // (3 * parts.vision.config.patch_size**2)  # type: ignore[union-attr, operator]
    assert parts.encoder is not None
    return pictures, rows // pictures + parts.encoder.prefix


def size_of(replaced: Mapping[str, Replaced], dtype: torch.dtype) -> dict[str, int]:
    """How many weights were replaced, and the bytes on disk of their integers, of steps, and of what stands beside."""
    found = dict.fromkeys(SIZES, 0)
    for one in replaced.values():
        found["weights"] += one.integers.numel()
        for name, tensor in tensors_of(one, dtype).items():
            found[KINDS.get(name, "sides")] += tensor.nbytes
    return found


def _tensors(trial: Trial) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": tensor
        for name, replaced in trial.placed.items()
        for kind, tensor in tensors_of(replaced, trial.dtype).items()
    }


def _started(method: Weights, before: Recipe, parts: Anatomy, batches: Batches, seed: int) -> dict[str, Any]:
    """What a run's results depend on; a run that was started with anything else is not gone on with."""
    data = hashlib.sha256()
    for batch in batches if method.streams else ():
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                data.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                data.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "method": method.name,
        "parameters": method.bound(),
        "model": str(parts.traits().fingerprint),
        "digests": [digest(block) for block in blocks_of(parts, method.part)],
        "dtype": str(parts.dtype),
        "data": data.hexdigest(),
        "before": str(before) if method.streams else "",
        "seed": seed,
        "versions": {name: version(name) for name in ("foveate", "torch", "transformers")},
    }
