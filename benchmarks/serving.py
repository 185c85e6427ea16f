"""What a recipe does for a server: requests a second and latencies against "full" on the same server, in alternating rounds.

    python -m benchmarks.serving --quick             # where vLLM is installed (docs/serving.md); one round of each
    python -m benchmarks.serving --minutes 20        # begins no round after that; goes on when started again

Random weights at the shape below, so what answers say is nothing; eight tokens each. `foveate serve` starts vLLM; an arm is
what clients ask of it (`"foveate": {"keep": ...}`), and a round asks under each arm once, in turned order every other
time, about the same pictures, which are new in every round. Loads are *saturation* (all requests at once) and two fixed
rates (Poisson), half and nine tenths of what "full" did at saturation until then. Of *repeated* pictures, half of the
requests are about two that the server was asked about just before. Ratios are of two arms of a round. CPU seconds are those
of the server's processes: on a machine that others use they say more than the clock does. Rounds that began when the machine
was busy are measured again by the next run. Writes docs/serving-bench.json after every round, and docs/serving-bench.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate import reference
from foveate.bench.statistics import ratio

OUT = Path(__file__).parent.parent / "docs" / "serving-bench"
ANSWER, WORDS, HOT = 8, 64, 2
"""Tokens of an answer, words of a question (one token each), pictures that are asked about again."""
TEXT = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16)
VISION = dict(hidden_size=256, intermediate_size=1024)
RATES = {"half": 0.5, "nine tenths": 0.9}
"""Fixed rates, as shares of what "full" does at saturation."""
BUSY = 5.0
"""Load of the machine above which a round is measured again."""


@dataclass(frozen=True)
class Arm:
    """What clients ask. ``keep``: of the recipe, None without one. ``side``: of their pictures. ``server``: of which one."""

    name: str
    keep: int | float | str | None
    side: int = 336
    server: int = 0


@dataclass(frozen=True)
class Load:
    """How they ask. ``rate``: of `RATES`, None for all at once. ``repeated``: half of the pictures. ``arms``: by number."""

    rate: str | None = None
    repeated: bool = False
    arms: tuple[int, ...] = ()
    requests: int = 8
    answer: int = ANSWER
    client: str = "ours"

    @property
    def name(self) -> str:
        known = ", half of the pictures repeated" if self.repeated else ""
        at = "saturation" if self.rate is None else f"{self.rate} of the rate of full"
        if self.answer == 1:
            return "prompts alone, one token each"
        return f"{at}{known}" if self.client == "ours" else f"{at}, {self.client}"


@dataclass(frozen=True)
class Group:
    """Servers that are up together, one of which is asked at a time, and what they are asked; the first arm is the base.

    servers: recipe (None: without) and further arguments of vLLM.
    """

    name: str
    model: str
    servers: tuple[tuple[str | None, tuple[str, ...]], ...]
    arms: tuple[Arm, ...]
    loads: tuple[Load, ...]


FULL, RECIPE, ALL = Arm("full", "full"), Arm("hiprune, keep 0.22", 0.22), Arm("hiprune, keep 1.0", 1.0)
LOADS = (
    Load(),
    Load(repeated=True),
    *(Load(rate, repeated, arms=(0, 1)) for repeated in (False, True) for rate in RATES),
)
CACHED, UNCACHED = ("--enable-prefix-caching",), ("--no-enable-prefix-caching",)
GROUPS = (
    Group(
        "no prefix cache",
        "llava",
        (("hiprune(keep=0.22)", UNCACHED),),
        (FULL, RECIPE, ALL),
        (Load(), Load(arms=(0, 1), client="vllm bench serve"), Load(arms=(0, 1), answer=1), *LOADS[1:]),
    ),
    Group(
        "peers",
        "llava",
        (("random(keep=0.22)", UNCACHED), (None, UNCACHED)),
        (FULL, Arm("random, keep 0.22", 0.22), Arm("a server without a recipe", None, server=1)),
        (Load(),),
    ),
    Group(
        "pictures scaled down",
        "qwen",
        (("hiprune(keep=121)", UNCACHED),),
        (Arm("full", "full", 384), Arm("hiprune, keep 121", 121, 384), Arm("scaled down to 121 tokens", "full", 176)),
        (Load(),),
    ),
    Group("prefix cache", "llava", (("hiprune(keep=0.22)", CACHED),), (FULL, RECIPE, ALL), LOADS),
)


def write_model(kind: str, folder: Path) -> Path:
    """A checkpoint with random weights, and the tokenizer and processor of the reference model of its family."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from foveate.reference.published import respell

    source = reference.path("reference" if kind == "llava" else "reference-qwen")
    config = AutoConfig.from_pretrained(source)
    for name, value in TEXT.items():
        setattr(config.text_config, name, value)
    config.text_config.head_dim = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    for name, value in VISION.items():
        setattr(config.vision_config, name, value)
    config.dtype = "float32"
    if kind == "llava":
        config.image_seq_length = 576
        known: dict[str, Any] = dict(image_size=336, patch_size=14, num_attention_heads=4, num_hidden_layers=9)
    else:
        config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
        known = dict(num_heads=4, out_hidden_size=TEXT["hidden_size"], depth=8, fullatt_block_indexes=[3, 7])
    for name, value in known.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    if kind == "llava":
        respell(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    if kind == "llava":
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text())
        settings["image_processor"] |= {name: {"height": 336, "width": 336} for name in ("crop_size", "size")}
        path.write_text(json.dumps(settings | {"patch_size": 14}))
    return folder


class Server:
    """One that is up."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: str) -> None:
        self.process, self.port, self.model = process, port, model

    def cpu(self) -> float:
        """Seconds of CPU of all its processes so far."""
        parents, spent = {}, {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(path.parent.name)], spent[int(path.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])

        def ours(number: int) -> bool:
            return number == self.process.pid or (number in parents and ours(parents[number]))

        return sum(ticks for number, ticks in spent.items() if ours(number)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(model: Path, recipe: str | None, more: Sequence[str], log: Path, minutes: float = 8) -> Iterator[Server]:
    """A server until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = [sys.executable, "-m", "foveate", "serve", str(model), "--port", str(port)]
    words += [] if recipe is None else ["--recipe", recipe]
    words += ["--", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", *more]
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(process, port, log, time.monotonic() + 60 * minutes)
            yield Server(process, port, str(model))
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, until: float) -> None:
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"no server came up:\n{log.read_text(errors='replace')[-3000:]}")


@dataclass(frozen=True)
class Answered:
    """One answer: seconds to its first token, between tokens, when it was sent and done, and tokens of its prompt."""

    first: float
    between: list[float]
    sent: float
    done: float
    prompt: int


def body(server: Server, arm: Arm, picture: Image.Image, words: Sequence[str], answer: int) -> bytes:
    """A request."""
    file = io.BytesIO()
    picture.resize((arm.side, arm.side)).save(file, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": " ".join(words)}]
    given: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": answer,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return json.dumps(given | ({} if arm.keep is None else {"foveate": {"keep": arm.keep}})).encode()


async def ask(port: int, raw: bytes, answer: int, after: float = 0.0) -> Answered:
    """Send a request ``after`` so many seconds, and listen to its stream to the end, of ``answer`` tokens."""
    await asyncio.sleep(after)
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    )
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + raw)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"refused: {status!r} {(await reader.read())[-500:]!r}")
    moments: list[tuple[float, int]] = []
    prompt = 0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage") or {}
            moments.append((time.perf_counter(), usage.get("completion_tokens", 0)))
            prompt = usage.get("prompt_tokens", prompt)
    writer.close()
    if not moments or moments[-1][1] != answer:
        raise SystemExit(f"an answer of {moments[-1:]} tokens, not {answer}")
    first, between = split(sent, moments)
    return Answered(first, between, sent, moments[-1][0], prompt)


def split(sent: float, moments: Sequence[tuple[float, int]]) -> tuple[float, list[float]]:
    """Seconds to the first token, and before each later one: of tokens that come together, an equal share each.

    ``moments``: when how many tokens had come, in order; pieces without a new token do not count.
    """
    known, new = 0, []
    for moment, count in moments:
        if count > known:
            new.append((moment, count))
            known = count
    between = [(b - a) / (m - n) for (a, n), (b, m) in pairwise(new) for _ in range(m - n)]
    # What came with the first token came at once.
    return new[0][0] - sent, [0.0] * (new[0][1] - 1) + between


def arrivals(rate: float | None, count: int, seed: int) -> list[float]:
    """When requests are sent, the first at 0: a Poisson process of ``rate`` a second, or all at once."""
    if rate is None:
        return [0.0] * count
    draw = random.Random(seed)
    moments = [0.0]
    while len(moments) < count:
        moments.append(moments[-1] + draw.expovariate(rate))
    return moments


def vocabulary() -> list[str]:
    tokens = json.loads((reference.path("reference") / "tokenizer.json").read_text())["model"]["vocab"]
    return [word for word in tokens if word.isalnum()]


def measure(server: Server, arm: Arm, load: Load, rate: float | None, seed: int) -> dict[str, Any]:
    """One arm's part of a round."""
    draw, words = random.Random(seed), vocabulary()

    def picture() -> Image.Image:
        return Image.frombytes("RGB", (384, 384), draw.randbytes(384 * 384 * 3))

    def request(about: Image.Image) -> bytes:
        return body(server, arm, about, draw.choices(words, k=WORDS), load.answer)

    hot = [picture() for _ in range(HOT if load.repeated else 0)]
    about = [hot[i // 2 % HOT] if load.repeated and i % 2 else picture() for i in range(load.requests)]
    raw, moments = [request(each) for each in about], arrivals(rate, load.requests, seed)

    async def run() -> list[Answered]:
        for each in hot:
            await ask(server.port, request(each), load.answer)
        nonlocal before
        before = server.cpu()
        return await asyncio.gather(*(ask(server.port, each, load.answer, moment) for each, moment in zip(raw, moments)))

    before = 0.0
    answers = asyncio.run(run())
    seconds = max(each.done for each in answers) - min(each.sent for each in answers)
    return {
        "requests": load.requests,
        "per_second": load.requests / seconds,
        "cpu": (server.cpu() - before) / load.requests,
        "first": [round(each.first, 4) for each in answers],
        "between": [round(gap, 4) for each in answers for gap in each.between],
        "prompt": round(statistics.mean(each.prompt for each in answers), 1),
    }


def measure_vllm(server: Server, arm: Arm, load: Load, seed: int, folder: Path) -> dict[str, Any]:
    """The same load by vLLM's own client."""
    result = folder / "bench.json"
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat"]
    words += ["--base-url", f"http://127.0.0.1:{server.port}", "--endpoint", "/v1/chat/completions", "--model", server.model]
    words += ["--dataset-name", "random-mm", "--num-prompts", str(load.requests), "--seed", str(seed), "--ignore-eos"]
    words += ["--random-input-len", str(WORDS), "--random-output-len", str(ANSWER), "--random-range-ratio", "0"]
    words += ["--random-mm-base-items-per-request", "1", "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
    words += ["--random-mm-bucket-config", f"{{({arm.side}, {arm.side}, 1): 1.0}}", "--temperature", "0"]
    words += ["--extra-body", json.dumps({"foveate": {"keep": arm.keep}}), "--disable-tqdm"]
    words += ["--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", result.name]
    before = server.cpu()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        raise SystemExit(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-3000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != load.requests:
        raise SystemExit(f"vllm bench serve: {found['completed']} of {load.requests} answered; {found.get('errors')}")
    return {
        "requests": load.requests,
        "per_second": found["request_throughput"],
        "cpu": (server.cpu() - before) / load.requests,
        "first": [round(each, 4) for each in found["ttfts"]],
        "between": [round(gap, 4) for each in found["itls"] for gap in each],
    }


class Kept:
    """What was measured so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rounds = json.loads(path.read_text())["rounds"] if path.exists() else []
        self.rounds: list[dict[str, Any]] = [each for each in rounds if each["busy"] <= BUSY]

    def has(self, group: Group, load: Load, number: int) -> bool:
        return any((r["group"], r["load"], r["round"]) == (group.name, load.name, number) for r in self.rounds)

    def of(self, group: Group, load: Load) -> list[dict[str, Any]]:
        return [r for r in self.rounds if (r["group"], r["load"]) == (group.name, load.name)]

    def add(self, entry: dict[str, Any]) -> None:
        self.rounds.append(entry)
        self.path.write_text(json.dumps({"run": machine(), "rounds": self.rounds}) + "\n")

    def rate(self, group: Group, load: Load) -> float | None:
        """Requests a second: a share of what "full" did at saturation when the load was measured first."""
        if load.rate is None:
            return None
        if known := self.of(group, load):
            return float(known[0]["rate"])
        base = [r["arms"][group.arms[0].name]["per_second"] for r in self.of(group, Load())]
        return RATES[load.rate] * statistics.median(base)


def machine() -> dict[str, Any]:
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "machine": f"{os.cpu_count()} cores, {processor.partition(': ')[2] or platform.machine()}",
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers", "foveate")},
    }


def measure_group(group: Group, kept: Kept, rounds: int, until: float, folder: Path) -> None:
    """All rounds of a group that are not there yet."""
    # Of all loads the first round, then the second: what time ends has as many of each.
    left = [(n, load) for n in range(rounds) for load in group.loads if not kept.has(group, load, n)]
    if not left or time.monotonic() > until:
        return
    model = folder / group.model
    if not model.exists():
        write_model(group.model, model)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(served(model, recipe, more, folder / f"{group.name}-{number}.log"))
            for number, (recipe, more) in enumerate(group.servers)
        ]
        for arm in group.arms:  # what is slow the first time
            measure(servers[arm.server], arm, Load(requests=2), None, seed=-1)
        for done, (number, load) in enumerate(left):
            if done and time.monotonic() > until:
                return
            arms = [group.arms[i] for i in load.arms] or list(group.arms)
            busy, rate, found = os.getloadavg()[0], kept.rate(group, load), {}
            seed = 1000 * number + group.loads.index(load)
            for turn, arm in enumerate(arms if number % 2 == 0 else reversed(arms)):
                server = servers[arm.server]
                if load.client == "ours":
                    found[arm.name] = measure(server, arm, load, rate, seed)
                    continue
                for client in sorted(("our client", load.client), reverse=number % 2 == 1):
                    if client == "our client":
                        found[f"{arm.name}, {client}"] = measure(server, arm, load, rate, seed)
                    else:  # pictures are drawn by its seed alone, so an arm's would be known to the next
                        found[f"{arm.name}, {client}"] = measure_vllm(server, arm, load, 10 * seed + turn, folder)
            entry = {"group": group.name, "load": load.name, "round": number, "rate": rate, "busy": busy, "arms": found}
            kept.add(entry)
            speeds = {name: round(each["per_second"], 3) for name, each in found.items()}
            print(group.name, "|", load.name, "| round", number, speeds, flush=True)


def page(kept: Kept, command: str) -> str:
    """docs/serving-bench.md."""
    run, busy, layers = machine(), [r["busy"] for r in kept.rounds], TEXT["num_hidden_layers"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    lines = [
        "# Serving, measured",
        "",
        f"Written by `{command}` ({run['machine']}; {versions}; float32, eager, one thread).",
        f"The load was {min(busy):.0f} to {max(busy):.0f} when rounds began (median {statistics.median(busy):.0f}),",
        "with what the arm before left of it. Other work may have run: ratios within a round are worth quoting, as far as",
        "their intervals go, and above all those of CPU seconds. n is the number of rounds.",
        "",
        f"Servers are `foveate serve` on vLLM, with random weights: LLaVA with 576 tokens a picture, {layers} layers of",
        f"width {TEXT['hidden_size']}, and `hiprune(keep=0.22)`; {WORDS} words a question, {ANSWER} tokens an answer.",
        '*full* asks the same server for `"foveate": {"keep": "full"}`.',
        "",
        "Columns: tokens of a prompt; requests a second; seconds to the first token and milliseconds between tokens, of all",
        "rounds together (a token that comes with the one before it: 0); CPU seconds of the server, a request; and",
        "requests a second and CPU seconds over those of *full* in the same round, medians with 95 % intervals (of three",
        "rounds or fewer the range).",
    ]
    lines += _prefill(kept)
    missing = {group.name: [load.name for load in group.loads if not kept.of(group, load)] for group in GROUPS}
    if any(missing.values()):
        lines += ["", "Not measured yet:", ""]
        lines += [f"- {name}: {'; '.join(loads)}." for name, loads in missing.items() if loads]
    for group in GROUPS:
        loads = [load for load in group.loads if kept.of(group, load)]
        if loads:
            lines += ["", f"## {group.name[0].upper()}{group.name[1:]}", *NOTES.get(group.name, ())]
        for load in loads:
            lines += _clients(kept.of(group, load)) if load.client != "ours" else _table(group, load, kept.of(group, load))
    return "\n".join(lines) + "\n"


NOTES = {
    "peers": (
        "",
        "`random` keeps as many tokens and reads nothing. The server without a recipe is a second one, up at the same time",
        "and idle while the other is asked; *full* is asked of the one with the recipe.",
    ),
    "pictures scaled down": (
        "",
        "What operators do today: the client sends smaller pictures. LLaVA-1.5 cannot show this: whatever comes, it resizes",
        "to 336 x 336. So this is a Qwen2.5-VL of the same size: 384 x 384 pictures of 576 tokens, of which the recipe",
        "keeps 121, or 176 x 176 pictures, which have 121. Smaller pictures save the encoder's work as well, which a recipe",
        "behind it does not; what they lose no recipe can choose.",
    ),
    "prefix cache": ("", "Only what comes before a question can hit it: no question comes twice."),
}


def _prefill(kept: Kept) -> list[str]:
    """How much of a request is reading its prompt: what fewer tokens save is nothing else."""
    rounds = kept.of(GROUPS[0], Load())
    if not rounds:
        return []
    full, fewer = ([r["arms"][arm.name] for r in rounds] for arm in (FULL, RECIPE))
    saved = statistics.median(a["cpu"] - b["cpu"] for a, b in zip(full, fewer))
    tokens = full[0]["prompt"] - fewer[0]["prompt"]
    return [
        "",
        f"Reading {tokens:.0f} of the {full[0]['prompt']:.0f} tokens of a prompt costs the server {saved:.2f} s of CPU.",
    ]


def _table(group: Group, load: Load, rounds: Sequence[dict[str, Any]]) -> list[str]:
    rate = "" if rounds[0]["rate"] is None else f": {rounds[0]['rate']:.2f} requests a second, Poisson"
    base = group.arms[0].name
    lines = [
        "",
        f"**{load.name[0].upper()}{load.name[1:]}{rate}** (n = {len(rounds)}, {load.requests} requests each)",
        "",
        "| | tokens | requests/s | first token p50 | p95 | between p50 | p95 | CPU s | requests/s over full "
        "| CPU s over full |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [arm.name for arm in group.arms if arm.name in rounds[0]["arms"]]:
        mine = [r["arms"][name] for r in rounds]
        full = [r["arms"][base] for r in rounds]
        first, gaps = (np.concatenate([each[what] for each in mine]) for what in ("first", "between"))
        between = [f"{1e3 * np.quantile(gaps, at):.0f}" if len(gaps) else "-" for at in (0.5, 0.95)]
        served, spent = ("-", "-") if name == base else (_ratio(mine, full, "per_second"), _ratio(mine, full, "cpu"))
        lines.append(
            f"| {name} | {mine[0]['prompt']:.0f} | {statistics.median(each['per_second'] for each in mine):.2f} "
            f"| {np.quantile(first, 0.5):.2f} | {np.quantile(first, 0.95):.2f} | {between[0]} | {between[1]} "
            f"| {statistics.median(each['cpu'] for each in mine):.2f} "
            f"| {served} | {spent} |"
        )
    return lines


def _clients(rounds: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for r in rounds for name in r["arms"]))
    lines = [
        "",
        f"**Two clients** (n = {len(rounds)}): the same load at saturation, by the client of this benchmark and by",
        "`vllm bench serve --dataset-name random-mm`, one right after the other.",
        "",
        "| | ours, requests/s | vllm bench serve | ratio | ratio of CPU s |",
        "|---|---|---|---|---|",
    ]
    for ours, theirs in zip(sorted(n for n in names if n.endswith(", our client")), sorted(n for n in names if "vllm" in n)):
        mine, other = [r["arms"][ours] for r in rounds], [r["arms"][theirs] for r in rounds]
        rates = [statistics.median(each["per_second"] for each in of) for of in (mine, other)]
        lines.append(
            f"| {ours.removesuffix(', our client')} | {rates[0]:.2f} | {rates[1]:.2f} | {_ratio(other, mine, 'per_second')} "
            f"| {_ratio(other, mine, 'cpu')} |"
        )
    return lines


def _ratio(over: Sequence[dict[str, Any]], under: Sequence[dict[str, Any]], what: str) -> str:
    found = ratio([a[what] / b[what] for a, b in zip(over, under)])
    return f"{found.value:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--minutes", type=float, default=240, help="start no further round after so many")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results, without suffix")
    parser.add_argument("--groups", nargs="+", choices=[group.name for group in GROUPS], default=None)
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    args = parser.parse_args()
    # One thread, on any core, so that a server's speed does not hang on how many cores are free.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["HF_HUB_OFFLINE"] = "1"
    kept, until = Kept(args.out.with_suffix(".json")), time.monotonic() + 60 * args.minutes
    rounds = 1 if args.quick else args.rounds
    groups = [group for group in GROUPS if not args.page and (args.groups is None or group.name in args.groups)]
    with tempfile.TemporaryDirectory(prefix="foveate-serving-") as folder:
        for place, group in enumerate(groups):
            now = time.monotonic()  # what time there is is shared among the groups to come
            measure_group(group, kept, rounds, now + (until - now) / (len(groups) - place), Path(folder))
    args.out.with_suffix(".md").write_text(page(kept, "python -m benchmarks.serving"))


if __name__ == "__main__":
    main()
