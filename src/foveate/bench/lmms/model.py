"""The model ``foveate`` of lmms-eval: any checkpoint that Foveate supports, under a recipe.

Every batch has a session of its own, as in the bench, so that methods that draw do not stake all on one draw.
"""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NoReturn, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from rich.console import Console
from rich.progress import Progress

import foveate
from foveate import checkpoint
from foveate.bench.lmms.asked import conversation, generate_arguments, model_arguments
from foveate.bench.lmms.cost import Batch, Cost
from foveate.bench.lmms.ending import Ended, cut, endings
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

Messages = Sequence[Mapping[str, Any]]
"""A conversation in lmms-eval's words."""
_Answer = TypeVar("_Answer")


class Foveate(lmms):  # type: ignore[misc]  # lmms-eval is not typed, and lies in an environment of its own
    """Answers the questions of tasks; a chat model in lmms-eval's terms, which places pictures where a task wants them."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "reference",
        recipe: str = "none",
        device: str = "auto",
        dtype: str = "auto",
        companion: str | None = None,
        artifacts: str | None = None,
        seed: int | str = 0,
        batch_size: int | str = 1,
        model_args: str | None = None,
        system: str | None = None,
    ) -> None:
        """Load the model, and refuse a recipe that it cannot host before any data set is fetched.

        Args:
            pretrained: ``reference``, a checkpoint folder, or a Hub id.
            recipe: as text, as a ``.yaml`` file, or as a name on the Hub.
            device: ``auto``, ``cpu``, ``cuda``; with several processes each takes the GPU of its local rank.
            dtype: ``auto``, ``float32``, ``bfloat16``, ``float16``.
            companion: a CLIP checkpoint for methods that compare the question with the picture.
            artifacts: a folder that ``foveate calibrate`` wrote.
            seed: seed of methods that draw.
            batch_size: requests answered together.
            model_args: more of ``from_pretrained``, in brackets: ``{device_map: auto, attn_implementation: eager}``.
            system: what conversations begin with that bring no system prompt.
        """
        super().__init__()
        self._recipe = Recipe.of(recipe)
        self._size, self._seed = _whole("batch_size", batch_size), _whole("seed", seed, least=0)
        arguments = checkpoint.parse_model_args(model_args)
        # Where a device_map places the model, no device is asked for.
        device = checkpoint.resolve_device(device if "device_map" in arguments else _of_this_process(device), arguments)
        dtype = checkpoint.resolve_dtype(dtype, device)
        self._checkpoint = checkpoint.load(pretrained, device, dtype, companion, artifacts, arguments, system)
        self._cost = Cost()
        self._attach().detach()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Foveate:
        """From ``--model_args`` and what the command line says besides (batch size, device)."""
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        besides = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "max_batch_size" in besides:
            raise FoveateError(f"max_batch_size={besides['max_batch_size']}: is not searched for; give --batch_size")
        return cls(**{**besides, **model_arguments(arg_string, known)})

    @property
    def device(self) -> torch.device:
        """Where lmms-eval may put tensors."""
        return self._checkpoint.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer to each request, in their order."""

        def answer(batch: list[Instance]) -> list[GenerationResult]:
            return self._answer([self._ask(request)() for request in batch], _generation(batch[0]))

        return self._in_batches(requests, answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request."""

        def answer(batch: list[Instance]) -> list[list[str]]:
            all_rounds = [_Rounds(self._ask(request)) for request in batch]
            while going := [(rounds, asked) for rounds in all_rounds if (asked := rounds.messages) is not None]:
                answers = self._answer([asked for _, asked in going], _generation(batch[0]))
                for (rounds, _), said in zip(going, answers, strict=True):
                    rounds.hear(said.text)
            return [rounds.said for rounds in all_rounds]

        return self._in_batches(requests, answer)

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Not offered."""
        raise FoveateError("output_type='loglikelihood': answers are generated here; take the task's generate_until variant")

    def clean(self) -> None:
        """Called after the last answer: hand what it cost to lmms-eval, which keeps it beside the scores; free the model."""
        cost = self._cost
        # All answers may have come from lmms-eval's cache.
        if cost.batches:
            figures = {"total_requests": cost.requests, **cost.figures()}
            log_metrics(cost.seconds, cost.tokens, cost.tokens / cost.seconds, figures)
        del self._checkpoint
        super().clean()

    def _in_batches(self, requests: list[Instance], answer: Callable[[list[Instance]], list[_Answer]]) -> list[_Answer]:
        """Answers in the order of the requests; those of a batch are generated under the same settings."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(_generation(request))].append(number)
        answers: dict[int, _Answer] = {}
        with Progress(console=Console(stderr=True), disable=self.rank != 0) as progress:
            task = progress.add_task("Answering", total=len(requests))
            for numbers in alike.values():
                for start in range(0, len(numbers), self._size):
                    batch = numbers[start : start + self._size]
                    answers.update(zip(batch, answer([requests[number] for number in batch]), strict=True))
                    progress.advance(task, len(batch))
        return [answers[number] for number in range(len(requests))]

    def _ask(self, request: Instance) -> Callable[..., Any]:
        """The task's function that writes the messages of a request."""
        _, doc_to_messages, _, number, task, split = request.args
        return partial(doc_to_messages, self.task_dict[task][split][number])

    @torch.inference_mode()
    def _answer(self, messages: Sequence[Messages], generation: Mapping[str, Any]) -> list[GenerationResult]:
        model, tokenizer = self._checkpoint.model, self._checkpoint.processor.tokenizer
        with self._attach() as session:
            inputs = self._checkpoint.chat([conversation(each) for each in messages], session)
            start, ends = inputs["input_ids"].shape[1], endings(generation)
            criteria = [Ended(tokenizer, ends, start)] if ends else []
            begin = perf_counter()
            output = model.generate(**inputs, **generate_arguments(generation), stopping_criteria=criteria)
            seconds = perf_counter() - begin
        special = set(tokenizer.all_special_ids)
        said = [[token for token in row if token not in special] for row in output[:, start:].tolist()]
        self._cost.batches.append(Batch(session.report, len(messages), sum(map(len, said)), seconds))
        read = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(cut(tokenizer.decode(row), ends).strip(), TokenCounts(number, len(row)))
            for number, row in zip(read, said, strict=True)
        ]

    def _attach(self) -> foveate.Session:
        seed = self._seed + len(self._cost.batches)
        return self._checkpoint.attach(self._recipe, seed)


class _Rounds:
    """A request of several rounds: the task writes each round's ``messages`` from the answers so far; None at the end."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self.said: list[str] = []
        self.messages: Messages | None = ask()
        self._ask = ask
        self._memory: Any = None

    def hear(self, answer: str) -> None:
        self.said.append(answer)
        reply = self._ask(round_idx=len(self.said), previous_output=list(self.said), previous_round_info=self._memory)
        # Messages without more about them are the first round's: the task has only that.
        messages, ended, _, self._memory = reply if isinstance(reply, tuple) else (None, True, None, None)
        self.messages = None if ended else messages


def _generation(request: Instance) -> Mapping[str, Any]:
    return request.args[2] or {}


def _of_this_process(device: str) -> str:
    """The GPU of this process, where several were launched."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank and device in ("auto", "cuda") and torch.cuda.is_available() else device


def _whole(name: str, value: int | str, least: int = 1) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise FoveateError(f"{name}={value!r}: must be a whole number, at least {least}")
    return number
