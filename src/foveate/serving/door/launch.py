"""vLLM's server, started behind the door."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import FrameType

from foveate.core.errors import FoveateError
from foveate.serving.door.rules import KEY, VARIABLE, Rules

DOOR = "foveate.serving.door.Door"
PLUGIN = "foveate"
"""The plug-in's name among vLLM's, in case that ``VLLM_PLUGINS`` lists those to load."""
NOWHERE = "media.invalid"
"""A host that does not exist: the only one that vLLM may fetch from by itself."""
PATIENCE = 20.0
"""Seconds that a server has to end by itself."""
_OURS = {
    "--host": "give it before the --",
    "--port": "give it before the --",
    "--data-parallel-size": "give --replicas before the --",
    "-dp": "give --replicas before the --",
    "--hf-overrides": "it brings the recipe",
    "--trust-request-mm-kwargs": "the door needs it, and it is set",
    "--no-trust-request-mm-kwargs": "the door needs it",
    "--allowed-media-domains": "give --allow-media-domain before the --",
    "--allowed-local-media-path": "no client may name a file of this machine",
    "--api-key": f"set {KEY} in the environment, which the door checks",
    "--grpc": "there is no door in front of it",
    "--headless": "start that by vllm serve",
}
"""Options of vLLM that are set here, or that would lead around the door."""
_AROUND = {"--model-impl": "it runs other models than vLLM's own, which take no recipe"}
"""Those that would lead around the recipe."""


@dataclass(frozen=True)
class Start:
    """A server to start.

    Attributes:
        model: a folder or a Hub id.
        served_as: under which name clients ask for it.
        host, port: where it listens.
        replicas: engines side by side, on this machine.
        more: arguments of vLLM's own.
    """

    model: str
    served_as: str
    host: str
    port: int
    replicas: int = 1
    more: Sequence[str] = ()


def command(start: Start, rules: Rules) -> list[str]:
    """What is run.

    Raises:
        FoveateError: if ``start.more`` has options that are set here.
    """
    refused = _OURS if rules.settings is None else _OURS | _AROUND
    for argument in start.more:
        name = argument.partition("=")[0].replace("_", "-")
        # argparse takes beginnings of names, too; vLLM's shortest of these that are unique are longer than this.
        for known, why in refused.items():
            if name == known or (len(name) > len("--ho") and known.startswith(name)):
                raise FoveateError(f"{name}: {why}; leave it out behind the --")
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", start.model, "--served-model-name", start.served_as]
    words += ["--host", start.host, "--port", str(start.port), "--middleware", DOOR, "--allowed-media-domains", NOWHERE]
    if rules.settings is not None:
        settings = {name: value for name, value in asdict(rules.settings).items() if value is not None}
        words += ["--hf-overrides", json.dumps({"foveate": settings}), "--trust-request-mm-kwargs"]
    if start.replicas > 1:
        words += ["--data-parallel-size", str(start.replicas)]
    return [*words, *start.more]


def processes(start: Start) -> int:
    """Processes that take requests, each with a door: vLLM has one for each replica, unless it is told otherwise."""
    parser = ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-asc", "--api-server-count", "--api_server_count", dest="count", type=int)
    try:
        told = parser.parse_known_args(list(start.more))[0].count
    except ArgumentError as error:
        raise FoveateError(f"--api-server-count: {error.message}") from None
    return max(1, told if told is not None else start.replicas)


def environment(rules: Rules, counts: str, given: Mapping[str, str]) -> dict[str, str]:
    """Of the process that is run; ``counts`` is a fresh folder for what its processes count.

    Raises:
        FoveateError: if what is ``given`` keeps the recipe out.
    """
    plugins = given.get("VLLM_PLUGINS")
    if rules.settings is not None and plugins is not None and PLUGIN not in plugins.split(","):
        raise FoveateError(f"VLLM_PLUGINS={plugins!r}: leaves out {PLUGIN!r}, so that no recipe would run; add it")
    ours = {
        VARIABLE: rules.to_json(),
        "PROMETHEUS_MULTIPROC_DIR": counts,
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_IMAGE_PIXELS": str(rules.max_pixels),
        # Its frontend in Rust has no place for a middleware.
        "VLLM_USE_RUST_FRONTEND": "0",
    }
    if KEY in given:
        ours["VLLM_API_KEY"] = given[KEY]
    return {**given, **ours}


def run(start: Start, rules: Rules) -> int:
    """Start it and wait for its end; its exit code. Being terminated, it is terminated, too."""
    words = command(start, rules)
    # A bound on what waits here is one on memory, which all of them take together.
    rules = replace(rules, max_queue=max(1, rules.max_queue // processes(start)))
    with tempfile.TemporaryDirectory(prefix="foveate-metrics-") as counts:
        # In a session of its own, so that an engine can be ended even where the server that started it is gone.
        server = subprocess.Popen(words, env=environment(rules, counts, os.environ), start_new_session=True)
        told: list[float] = []

        def hand_on(number: int, frame: FrameType | None) -> None:
            told.append(time.monotonic())
            server.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return _ended(server, told)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _ended(server: subprocess.Popen[bytes], told: Sequence[float]) -> int:
    """Wait for it, no longer than `PATIENCE` once it was ``told`` to end: vLLM that waits for its engine hears nothing."""
    while not told or time.monotonic() < told[0] + PATIENCE:
        with suppress(subprocess.TimeoutExpired):
            return server.wait(0.2)
    return 128 + signal.SIGTERM
