"""The server without vLLM: the parts of ``transformers serve``, a recipe attached, behind the same door.

Requests run one after the other, as transformers' server does outside of continuous batching, which no session hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from inspect import isawaitable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from foveate.checkpoint import Checkpoint
from foveate.core.errors import FoveateError
from foveate.engine import Session
from foveate.serving import ticket
from foveate.serving.door.door import Door
from foveate.serving.door.recipes import Recipes
from foveate.serving.door.rules import Rules
from foveate.serving.door.visit import VISIT, Visit

_HUNG_UP = 499
"""Status, as web servers log it, of answers that nobody waits for."""


class _Watch(StoppingCriteria):
    """After each token: is anybody there to read it? After the first one: how many tokens did the pictures have?"""

    def __init__(self, visit: Visit, session: Session) -> None:
        self.visit, self.session = visit, session
        self.noted = visit.ticket is None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not self.noted and self.visit.ticket is not None:
            self.noted = True
            report = self.session.under_way
            if report is not None and report.visual_tokens:
                ticket.note(self.visit.ticket, round(report.original_visual_tokens), round(report.visual_tokens[-1]))
        return input_ids.new_full((input_ids.shape[0],), self.visit.gone, dtype=bool)


class _Asked:
    """A model as one request sees it: ``generate`` runs under the request's recipe, on the thread that generates."""

    def __init__(self, model: Any, recipes: Recipes, visit: Visit) -> None:
        self._model, self._recipes, self._visit = model, recipes, visit

    def generate(self, **inputs: Any) -> Any:
        """As the model's own."""
        if self._visit.gone:
            raise HTTPException(_HUNG_UP)
        try:
            session = self._recipes.session(self._visit.keep)
            watch = StoppingCriteriaList([_Watch(self._visit, session)])
            return self._model.generate(**inputs, stopping_criteria=watch)
        except (TypeError, KeyError, AttributeError) as error:
            # Of a request that was read, these are no client's fault.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


class _Manager(GenerateManager):
    """transformers' queue of requests, one after the other on a thread of its own."""

    def __init__(self, recipes: Recipes, longest: int) -> None:
        super().__init__()
        self._recipes, self._longest = recipes, longest

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        """Start; transformers reads the answer from a queue."""
        asked = self._asked(model, inputs, gen_config)
        return super().generate_streaming(asked, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """The whole answer."""
        asked: Any = self._asked(model, inputs, gen_config)
        return await super().generate_non_streaming(asked, processor, inputs, gen_config, request_id)

    def _asked(self, model: Any, inputs: Mapping[str, Any], gen_config: Any) -> Any:
        visit = VISIT.get()
        self._recipes.check(visit.keep, inputs)
        longest, room = gen_config.max_new_tokens, self._longest - inputs["input_ids"].shape[-1]
        if room < 1:
            raise FoveateError(f"messages: {self._longest - room} tokens; this model reads fewer than {self._longest}")
        # transformers would go on past what the model was made for, for as long as was asked.
        gen_config.max_new_tokens = room if longest is None else min(longest, room)
        return _Asked(model, self._recipes, visit)


class _Chat(ChatCompletionHandler):
    """transformers' reader of requests, on a thread of its own: the server goes on while pictures and prompts are read."""

    def __init__(self, models: ModelManager, state: GenerationState) -> None:
        super().__init__(models, state)
        # One, as tokenizers are not made for two.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="foveate-reader")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Read on that thread, then answer."""
        visit, plain = VISIT.get(), super().handle_request

        def read() -> Any:
            if visit.gone:
                raise HTTPException(_HUNG_UP)
            return asyncio.run(plain(body, request_id))  # waits for nothing: what does is put off below

        answer = await asyncio.get_running_loop().run_in_executor(self._reader, copy_context().run, read)
        made = answer()
        return await made if isawaitable(made) else made

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        """As transformers reads them, which leaves out without a word what a text model does not take."""
        parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
        other = next((part["type"] for part in parts if part["type"] != "text"), None)
        if modality is Modality.LLM and other is not None:
            raise FoveateError(f"messages: {other!r}: this model reads text alone; leave it out")
        return ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        return partial(super()._streaming, *args, **kwargs)

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        return partial(super()._non_streaming, *args, **kwargs)


class _State(GenerationState):
    """Where transformers' handlers get their queue from."""

    def __init__(self, manager: _Manager) -> None:
        super().__init__()
        self._one = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The only one."""
        return self._one


class _Models(ModelManager):
    """The one model that is there; none is loaded by request."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.force_model = checkpoint.name
        key = self.process_model_name(checkpoint.name)
        self.loaded_models[key] = TimedModel(checkpoint.model, -1, checkpoint.processor)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """What ``/v1/models`` lists."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "foveate"}]


def app(checkpoint: Checkpoint, rules: Rules) -> Door:
    """The server, behind its door.

    Raises:
        FoveateError: if the model cannot host the recipe.
    """
    recipes = Recipes(checkpoint, rules.settings)
    text = checkpoint.model.config.get_text_config()
    state = _State(_Manager(recipes, getattr(text, "max_position_embeddings", None) or 2**17))
    models = _Models(checkpoint)
    server = build_server(
        models,
        _Chat(models, state),
        CompletionHandler(models, state),
        ResponseHandler(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        state,
    )
    server.add_api_route("/metrics", _metrics)
    # What processors, templates and transformers' own readers of requests raise over them is the client's.
    for kind in (ValueError, TypeError, KeyError, AttributeError):
        server.add_exception_handler(kind, _refused)
    return Door(server, rules)


def _metrics() -> Response:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return JSONResponse({"error": {"message": said, "type": "invalid_request_error", "code": 400}}, 400)
