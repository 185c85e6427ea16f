"""One session for a stream: ``push`` a frame, ``ask`` a question, for as long as it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from foveate.checkpoint import Checkpoint, load_processor
from foveate.core.artifact import Artifact
from foveate.core.companion import Companion
from foveate.core.errors import FoveateError
from foveate.core.recipe import RecipeLike
from foveate.core.stream import Memory
from foveate.engine import Session, attach
from foveate.engine.streaming import StreamCache
from foveate.models import Anatomy, anatomy
from foveate.streams.words import Words


def stream(
    model: nn.Module | Checkpoint,
    recipe: RecipeLike = "none",
    *,
    processor: Any = None,
    chunk: int = 1,
    system: str | None = None,
    seed: int = 0,
    companion: Companion | None = None,
    artifacts: Iterable[Artifact] | str | Path = (),
) -> Stream:
    """Begin a stream of pictures under a recipe.

    >>> with foveate.stream(model, "hermes(keep=4000)", processor=processor) as stream:  # doctest: +SKIP
    ...     for frame in frames:
    ...         stream.push(frame)
    ...     print(stream.ask("What has just happened?"))

    Args:
        model: a vision-language model loaded through transformers, or what `foveate.checkpoint.load` gives.
        recipe: as `foveate.attach` takes it. Without an owner of the cache that bounds it (``hermes``,
            ``streamingllm``), it grows.
        processor: the model's; None = it is loaded by the model's name.
        chunk: frames that the model reads at once. They are encoded and read when the last of them has come, or a question.
        system: what the conversation begins with, as the chat template's role ``system``.
        seed: as `foveate.attach` takes it.
        companion: the same.
        artifacts: the same.

    Raises:
        FoveateError: if model and recipe cannot run a stream; nothing is left half-attached.
    """
    if chunk < 1:
        raise FoveateError(f"chunk={chunk}: must be 1 or more")
    module: Any = model
    if isinstance(model, Checkpoint):
        companion, artifacts = companion or model.companion, artifacts or model.artifacts
        module, processor, system = model.model, processor or model.processor, system or model.system
    if anatomy(module).vision is None:
        raise FoveateError("stream: is of pictures, and the model reads text alone; use a vision-language model")
    if processor is None:
        processor = load_processor(str(getattr(module, "name_or_path", "")))
    words = Words.of(processor, system)
    session = attach(module, recipe, seed=seed, companion=companion, artifacts=artifacts)
    try:
        return Stream(session, processor, words, chunk)
    except BaseException:
        session.detach()
        raise


class Stream:
    """Pictures that keep coming, read onto one cache. Made by `stream`.

    Attributes:
        session: what runs in the model.
        frames: pictures that have come so far.
    """

    def __init__(self, session: Session, processor: Any, words: Words, chunk: int) -> None:
        self.session, self.frames = session, 0
        self._processor, self._words, self._chunk = processor, words, chunk
        self._cache, self._memory = StreamCache(session), Memory()
        self._waiting: list[Any] = []
        self._said: tuple[str, str] | None = None
        with torch.inference_mode():
            self._read(self._cache, words.before, [])

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was, and let go of the cache. Closing twice is fine."""
        self.session.detach()
        self._waiting.clear()

    @property
    def entries(self) -> int:
        """Entries of the cache, in the layer that holds most."""
        return self._cache.entries

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self._cache.nbytes

    def push(self, frame: Any) -> None:
        """The next picture: a PIL image, or an array ``[H, W, 3]`` of bytes."""
        self._refuse_closed()
        waiting = [*self._waiting, _picture(frame)]
        if len(waiting) >= self._chunk:
            self._take(waiting)
            waiting = []
        self._waiting = waiting  # a frame on which the model fails has not come
        self.frames += 1

    def ask(self, question: str, *, max_new_tokens: int = 64, **options: Any) -> str:
        """The model's answer to a question about what has come so far, which the stream then forgets.

        Args:
            question: what to ask.
            max_new_tokens: as ``generate`` takes it.
            **options: the same; decoding is greedy unless they say otherwise.
        """
        self._refuse_closed()
        if not self.frames:
            raise FoveateError("ask: no frame has come yet; push one first")
        if self._waiting:
            self._take(self._waiting)
            self._waiting = []
        inputs = self._cache.asked(self._ids(self._words.asking(question)))
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
        with torch.inference_mode(), self._cache.answering():
            output = self._model.generate(**inputs, **settings)
        new = output[0, inputs["input_ids"].shape[1] :]
        answer = self._processor.decode(new, skip_special_tokens=True).strip()
        self._said = (question, answer)
        return answer  # type: ignore[no-any-return]

    # Inside.

    @property
    def _model(self) -> Any:
        return self.session.anatomy.model

    @torch.inference_mode()
    def _take(self, pictures: Sequence[Any]) -> None:
        """Read a chunk, and let the owner of the cache say what stays; all of it, or nothing."""
        cache, memory = copy.copy(self._cache), self._memory.draft()
        with self.session.streaming(memory):
            self._read(cache, self._words.picture * len(pictures), pictures)
        if cache.owner is not None and cache.overflows:
            cache.compress([self._ids(text) for text in cache.owner.guidance(self._said)])
        self._cache = cache
        self._memory.take(memory)

    def _read(self, cache: StreamCache, text: str, pictures: Sequence[Any]) -> None:
        given: dict[str, Any] = {"images": self.session.pictures(pictures, self._processor)} if pictures else {}
        inputs = self._processor(text=[text], return_tensors="pt", add_special_tokens=False, **given)
        inputs = inputs.to(self._model.device, dtype=self._model.dtype)
        parts = self.session.anatomy
        known = {name: value for name, value in inputs.items() if name != "attention_mask"}
        cache.read(known, _positions(parts, known))

    def _ids(self, text: str) -> Tensor:
        ids = self._processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self._model.device)  # type: ignore[no-any-return]

    def _refuse_closed(self) -> None:
        if not self.session.attached:
            raise FoveateError("stream: is closed; begin another with foveate.stream(...)")


def _positions(parts: Anatomy, inputs: dict[str, Any]) -> Tensor:
    """``[R, 1, n]`` rotary positions of a chunk, from 0 on."""
    ids = inputs["input_ids"]
    plain = torch.arange(ids.shape[1], device=ids.device)[None, None]
    index: Callable[..., Any] | None = getattr(parts.multimodal, "get_rope_index", None)
    if parts.rotary_rows == 1 or index is None:
        return plain
    if not any("grid" in name for name in inputs):
        return plain.expand(3, 1, -1)
    shown = {
        kind: torch.isin(ids, ids.new_tensor(known)) for kind, known in ((1, parts.image_tokens), (2, parts.video_tokens))
    }
    kinds = sum(where.int() * kind for kind, where in shown.items())
    grids = {name: value for name, value in inputs.items() if name.endswith("grid_thw")}
    return index(ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **grids)[0]  # type: ignore[no-any-return]


def _picture(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame.convert("RGB")
    pixels = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    if getattr(pixels, "ndim", 0) != 3 or pixels.shape[2] != 3 or str(pixels.dtype) != "uint8":
        found = f"{type(frame).__name__} of {getattr(pixels, 'dtype', '')} {list(getattr(pixels, 'shape', ()))}".replace(
            " []", ""
        )
        raise FoveateError(f"frame={found}: must be a PIL image, or an array [H, W, 3] of bytes (uint8)")
    return Image.fromarray(pixels)
