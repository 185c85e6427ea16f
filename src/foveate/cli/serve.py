"""``foveate serve``: an OpenAI server with a recipe, on vLLM where it is installed, else on transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import typer

from foveate import checkpoint
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.serving.door.launch import Start, run
from foveate.serving.door.rules import TRANSFORMERS, VLLM, Rules
from foveate.serving.settings import Settings

ENGINES = ("auto", VLLM.name, TRANSFORMERS.name)
_PARTS = ("fastapi", "h11", "openai", "prometheus_client", "uvicorn")
_PATIENCE = 5
"""Seconds that running requests have left once the server is told to stop."""


@dataclass(frozen=True)
class ServeRequest:
    """The options of the command, as they were given."""

    model: str
    recipe: str | None
    min_keep: str | None
    max_keep: str | None
    engine: str
    host: str
    port: int
    replicas: int
    shadow: float
    max_images: int
    max_pixels: int
    max_body: int
    max_queue: int
    media_domains: Sequence[str]
    other_media: bool
    device: str
    dtype: str
    companion: str | None
    artifacts: str | None
    more: Sequence[str]


def serve(request: ServeRequest) -> int:
    """Serve until somebody ends it; the exit code."""
    if request.engine not in ENGINES:
        raise FoveateError(f"engine={request.engine!r}: must be one of {', '.join(ENGINES)}")
    if stray := next((each for each in request.more[:1] if not each.startswith("-")), None):
        raise FoveateError(f"{stray!r}: is one argument too many; there is one MODEL, and options of vLLM come behind a --")
    there = find_spec("vllm") is not None
    if request.engine == VLLM.name and not there:
        raise FoveateError("engine='vllm': vLLM is not installed; docs/serving.md says how, or give --engine transformers")
    if there and request.engine != TRANSFORMERS.name:
        return _on_vllm(request)
    return _on_transformers(request)


def _rules(request: ServeRequest, behind: object) -> Rules:
    settings = None
    if request.recipe is not None and Recipe.of(request.recipe).methods:
        # As text, whatever file it came from: other processes read it, too.
        recipe = str(Recipe.of(request.recipe))
        settings = Settings(recipe, _keep("min-keep", request.min_keep), _keep("max-keep", request.max_keep))
    elif request.min_keep is not None or request.max_keep is not None:
        raise FoveateError("min-keep, max-keep: bound what clients ask of a recipe, and there is none; give --recipe")
    return Rules(
        settings=settings,
        max_images=request.max_images,
        max_pixels=request.max_pixels,
        max_body=request.max_body,
        max_queue=request.max_queue,
        media_domains=tuple(request.media_domains),
        other_media=request.other_media,
        shadow=request.shadow,
        behind=VLLM if behind is VLLM else TRANSFORMERS,
    )


def _keep(name: str, text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise FoveateError(f"{name}={text!r}: must be a count such as 64 or a share such as 0.25") from None


def _on_vllm(request: ServeRequest) -> int:
    for option, value, usual in (
        ("device", request.device, "auto"),
        ("dtype", request.dtype, "auto"),
        ("companion", request.companion, None),
        ("artifacts", request.artifacts, None),
    ):
        if value != usual:
            raise FoveateError(f"{option}={value!r}: is of --engine transformers; options of vLLM come behind a --")
    folder = checkpoint.local_folder(request.model)
    where = (request.host, request.port, request.replicas, request.more)
    return run(Start(request.model if folder is None else str(folder), request.model, *where), _rules(request, VLLM))


@quiet()
def _on_transformers(request: ServeRequest) -> int:
    missing = [name for name in _PARTS if find_spec(name) is None]
    if missing:
        raise FoveateError(f"foveate serve needs {', '.join(missing)}; pip install 'foveate[serve]'")
    if request.more:
        raise FoveateError(f"{request.more[0]}: arguments behind a -- are of vLLM, which is not what runs here")
    if request.replicas != 1:
        raise FoveateError(f"replicas={request.replicas}: needs vLLM; on transformers start several servers, one a port")
    import uvicorn

    try:
        from foveate.serving.door.fallback import app
    except ImportError as error:
        raise FoveateError(
            f"transformers={version('transformers')}: foveate serve needs parts of its server that are not there ({error}); "
            "pip install 'transformers>=5.23,<6'"
        ) from None

    rules = _rules(request, TRANSFORMERS)
    device = checkpoint.resolve_device(request.device)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    loaded = checkpoint.load(request.model, device, dtype, request.companion, request.artifacts)
    server = app(loaded, rules)
    recipe = "no recipe" if rules.settings is None else rules.settings.recipe
    why = "vLLM is not installed" if find_spec("vllm") is None else "not vLLM"
    typer.echo(
        f"foveate: {request.model} with {recipe} on transformers {version('transformers')} ({why}; one request after the "
        f"other): http://{request.host}:{request.port}/v1",
        err=True,
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    uvicorn.run(server, host=request.host, port=request.port, log_level="warning", timeout_graceful_shutdown=_PATIENCE)
    return 0
