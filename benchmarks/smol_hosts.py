"""Who compresses the cache of a text model in ``benchmarks.smol``: a session of this package, or kvpress' own hooks.

Both are shown the same prompts of the same weights. What the linear layers make of a prompt is the same under all of them,
as the cache is cut behind attention; so they make it once and remember it (`Remembered`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from foveate.checkpoint import Checkpoint
from foveate.core.recipe import NONE
from foveate.engine.presses import library

Done = Callable[[Tensor], Tensor]
"""Of the ids generated so far ``[B, t]``: whether nothing that comes can change each answer's score, ``[B]``."""


class Remembered:
    """Linear layers of a decoder that remember the prompt that they read last, and compare what they are given with it.

    ``reading()`` is around the forward that is remembered. What differs from it by a bit is computed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._reading = False
        self.hits = self.misses = 0
        for name, module in model.named_modules():
            if name.endswith((".q_proj", ".k_proj", ".v_proj", ".o_proj", ".mlp")):
                module.forward = partial(self._run, name, module.forward)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Forget the last prompt and remember the one that is read inside."""
        self._kept.clear()
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def _run(self, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._reading:
            out = forward(x)
            self._kept[name] = x, out
            return out
        kept = self._kept.get(name)
        if kept is None or kept[0].shape != x.shape:
            return forward(x)
        if torch.equal(kept[0], x):
            self.hits += 1
            return kept[1].clone()
        self.misses += 1
        return forward(x)


@dataclass
class Reading:
    """What was read: its cache, the logits behind it ``[B, V]``, and its length."""

    cache: Any
    logits: Tensor
    length: int


class Host(Protocol):
    """Reads prompts under one system at one budget."""

    def answer(self, ids: Tensor, longest: int, done: Done) -> Tensor:
        """New ids ``[B, t]`` by greedy decoding."""

    def converse(self, prompts: Sequence[str], longest: int) -> list[str]:
        """The answers of a conversation."""

    def loss(self, ids: Tensor, following: Tensor) -> tuple[float, int]:
        """Mean nats that ``following`` ``[1, m]`` takes behind ``ids`` ``[1, n]``, and the bytes of their cache."""

    def step_seconds(self, ids: Tensor, steps: int) -> list[float]:
        """Seconds of this thread's computing that each step of decoding takes behind ``ids``."""


class _Watch(StoppingCriteria):
    """Notes when a token came; ends samples whose score is settled."""

    def __init__(self, prompt: int, done: Done | None) -> None:
        self.prompt, self.done, self.at = prompt, done, list[float]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.at.append(time.thread_time())
        if self.done is None:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        return self.done(input_ids[:, self.prompt :])


@dataclass(frozen=True)
class Housed:
    """A recipe of this package, attached; ``seed`` is the session's."""

    checkpoint: Checkpoint
    recipe: str = NONE
    seed: int = 0

    def answer(self, ids: Tensor, longest: int, done: Done) -> Tensor:
        """As `Host`."""
        return self._generate(ids, longest, done)[0]

    def converse(self, prompts: Sequence[str], longest: int) -> list[str]:
        """As `Host`."""
        with self._attached() as session:
            return self.checkpoint.converse((), prompts, longest, session)

    @torch.inference_mode()
    def loss(self, ids: Tensor, following: Tensor) -> tuple[float, int]:
        """As `Host`."""
        model = self.checkpoint.model
        with self._attached() as session:
            read = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            taken = sum(session.report.kv_bytes)
            then = model(input_ids=following, past_key_values=read.past_key_values)
        return _loss(read.logits[:, -1], then.logits, following), taken

    def step_seconds(self, ids: Tensor, steps: int) -> list[float]:
        """As `Host`."""
        at = self._generate(ids, steps + 1, None)[1].at
        return [later - earlier for earlier, later in pairwise(at)]

    @torch.inference_mode()
    def _generate(self, ids: Tensor, longest: int, done: Done | None) -> tuple[Tensor, _Watch]:
        least = {"min_new_tokens": longest} if done is None else {}
        watch = _Watch(ids.shape[1], done)
        with self._attached():
            whole = self.checkpoint.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=longest,
                stopping_criteria=StoppingCriteriaList([watch]), **least,
            )  # fmt: skip
        return whole[:, ids.shape[1] :], watch

    def _attached(self) -> AbstractContextManager[Any]:
        return self.checkpoint.attach(self.recipe, self.seed)


@dataclass
class Hooked:
    """A press of kvpress by its own hooks on the plain model, and the greedy loop of its own pipeline.

    The one thing that is ours: newer versions of transformers do not tell attention ``cache_position``, by which the hooks
    know a prompt, so it is told them. A later question is read behind the compressed cache, which is left as it is.
    """

    checkpoint: Checkpoint
    press: str
    options: Mapping[str, Any]
    keep: float
    seed: int = 0
    made: Any = field(init=False)

    def __post_init__(self) -> None:
        # A little less than what goes, or 1 - 0.8 costs one of 300 entries.
        self.made = getattr(library(), self.press)(compression_ratio=1 - self.keep - 1e-9, **self.options)

    def answer(self, ids: Tensor, longest: int, done: Done) -> Tensor:
        """As `Host`."""
        return self._decode(self._read(ids), longest, done)[0]

    def converse(self, prompts: Sequence[str], longest: int) -> list[str]:
        """As `Host`."""
        ids = self.checkpoint.inputs([()], prompts[:1])["input_ids"]
        read = self._read(ids)
        said = list[str]()
        for number, prompt in enumerate(prompts):
            if number:
                whole = self.checkpoint.continued(ids[0], prompts[number - 1], prompt)
                # The last token of an answer is read with what follows it, as generate does.
                read = self._more(read, whole[:, read.length :])
                ids = whole
            new, read = self._decode(read, longest, self._ends)
            ids = torch.cat([ids, new], dim=1)
            said.append(self.checkpoint.processor.decode(new[0], skip_special_tokens=True).strip())
        return said

    @torch.inference_mode()
    def loss(self, ids: Tensor, following: Tensor) -> tuple[float, int]:
        """As `Host`."""
        read = self._read(ids)
        taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in read.cache.layers)
        return _loss(read.logits, self._forward(read, following, whole=True).logits, following), taken

    def step_seconds(self, ids: Tensor, steps: int) -> list[float]:
        """As `Host`."""
        at, read = list[float](), self._read(ids)

        def note(new: Tensor) -> Tensor:
            at.append(time.thread_time())
            return torch.zeros(len(new), dtype=torch.bool)

        self._decode(read, steps + 1, note)
        return [later - earlier for earlier, later in pairwise(at)]

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Reading:
        count = ids.shape[1]
        decoder = self.checkpoint.model.get_decoder()
        torch.manual_seed(self.seed)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            return self.made.forward_hook(module, args, kwargs | {"cache_position": torch.arange(count)}, output)

        self.made.post_init_from_model(self.checkpoint.model)
        with ExitStack() as hooks:
            for layer in decoder.layers:
                layer.self_attn.rotary_emb = decoder.rotary_emb
                hooks.callback(layer.self_attn.register_forward_hook(hook, with_kwargs=True).remove)
                hooks.callback(delattr, layer.self_attn, "rotary_emb")
            out = self.checkpoint.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return Reading(out.past_key_values, out.logits[:, -1], count)

    def _forward(self, read: Reading, ids: Tensor, whole: bool = False) -> Any:
        positions = torch.arange(read.length, read.length + ids.shape[1])[None]
        keep = {} if whole else {"logits_to_keep": 1}
        return self.checkpoint.model(input_ids=ids, past_key_values=read.cache, position_ids=positions, **keep)

    def _more(self, read: Reading, ids: Tensor) -> Reading:
        out = self._forward(read, ids)
        return Reading(out.past_key_values, out.logits[:, -1], read.length + ids.shape[1])

    @torch.inference_mode()
    def _decode(self, read: Reading, longest: int, done: Done) -> tuple[Tensor, Reading]:
        """New ids, padded where a sample has ended, as generate does; and what was read: all of them but the last."""
        new = read.logits.argmax(-1)[:, None]
        ended = self._ends(new) | done(new)
        while new.shape[1] < longest and not bool(ended.all()):
            read = self._more(read, new[:, -1:])
            best = read.logits.argmax(-1).masked_fill(ended, self.checkpoint.processor.tokenizer.pad_token_id)
            new = torch.cat([new, best[:, None]], dim=1)
            ended |= self._ends(new) | done(new)
        return new, read

    def _ends(self, new: Tensor) -> Tensor:
        """Whether the last of the new ids ends each sample."""
        end = self.checkpoint.model.generation_config.eos_token_id
        return new[:, -1] == (-1 if end is None else end)


def _loss(first: Tensor, logits: Tensor, following: Tensor) -> float:
    """Of logits behind the prompt ``[1, V]`` and of what follows ``[1, m, V]``."""
    told = torch.cat([first[:, None], logits[:, :-1]], dim=1)[0].float()
    return float(nn.functional.cross_entropy(told, following[0]))
