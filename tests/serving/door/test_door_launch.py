"""How servers are started, and what is refused before they are."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.serving.door.conftest import RECIPE
from typer.testing import CliRunner, Result

from foveate.cli import serve as cli
from foveate.cli.app import app
from foveate.core.errors import FoveateError
from foveate.serving.door import launch
from foveate.serving.door.launch import Start, command, environment
from foveate.serving.door.rules import KEY, VARIABLE, Rules
from foveate.serving.settings import Settings

START = Start("/models/m", "m", "127.0.0.1", 8000)
RULES = Rules(Settings(RECIPE, min_keep=16))


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_vllm_is_started_behind_the_door_with_the_recipe() -> None:
    words = command(Start("/models/m", "m", "0.0.0.0", 81, 2, ["--max-model-len", "4096"]), RULES)

    assert words[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "/models/m"]
    assert json.loads(after(words, "--hf-overrides")) == {"foveate": {"recipe": RECIPE, "min_keep": 16}}
    assert Settings.of(json.loads(after(words, "--hf-overrides"))["foveate"]) == RULES.settings
    assert after(words, "--middleware") == "foveate.serving.door.Door"
    assert (after(words, "--host"), after(words, "--port"), after(words, "--served-model-name")) == ("0.0.0.0", "81", "m")
    assert (after(words, "--data-parallel-size"), words[-2:]) == ("2", ["--max-model-len", "4096"])
    assert "--trust-request-mm-kwargs" in words


def test_without_a_recipe_vllm_is_as_it_is_behind_the_door() -> None:
    words = command(START, Rules())

    assert "--middleware" in words
    assert not {"--hf-overrides", "--trust-request-mm-kwargs", "--data-parallel-size"} & {*words}
    assert command(Start("m", "m", "h", 1, 1, ["--model-impl", "transformers"]), Rules())[-1] == "transformers"


@pytest.mark.parametrize(
    "argument",
    [
        "--hf-overrides",
        "--hf_overrides={}",
        "--port=1",
        "--api-key",
        "--allowed-local-media-path=/",
        "--data-parallel",
        "-dp",
        "--model-impl=transformers",
    ],
)
def test_options_that_are_set_here_are_refused_behind_the_dashes(argument: str) -> None:
    with pytest.raises(FoveateError, match="leave it out behind the --"):
        command(Start("m", "m", "h", 1, 1, ["--seed", "1", argument]), RULES)


@pytest.mark.parametrize("argument", ["--max-num-seqs", "--hf-config-path", "--limit-mm-per-prompt", "--allowed-origins"])
def test_vllm_s_other_options_are_handed_on(argument: str) -> None:
    assert command(Start("m", "m", "h", 1, 1, [argument, "1"]), RULES)[-2:] == [argument, "1"]


def test_the_environment_carries_the_rules_and_what_vllm_is_not_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(Rules(Settings(RECIPE), max_pixels=1000), "/counts", {"PATH": "/bin", KEY: "secret"})

    assert (found["PATH"], found["PROMETHEUS_MULTIPROC_DIR"], found["VLLM_API_KEY"]) == ("/bin", "/counts", "secret")
    assert (found["VLLM_MEDIA_URL_ALLOW_REDIRECTS"], found["VLLM_MAX_IMAGE_PIXELS"]) == ("0", "1000")
    monkeypatch.setenv(VARIABLE, found[VARIABLE])
    assert Rules.from_environment() == Rules(Settings(RECIPE), max_pixels=1000)


def test_a_list_of_plug_ins_without_ours_is_refused() -> None:
    with pytest.raises(FoveateError, match="add it"):
        environment(RULES, "/counts", {"VLLM_PLUGINS": "other"})
    assert environment(RULES, "/counts", {"VLLM_PLUGINS": "other,foveate"})
    assert environment(Rules(), "/counts", {"VLLM_PLUGINS": ""})


SERVER = """
import os, signal, sys, time
open(sys.argv[1], "w").write(os.environ["PROMETHEUS_MULTIPROC_DIR"])
time.sleep(30)
"""


STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SERVER}"
"""As vLLM while it waits for its engine."""


@pytest.mark.parametrize(("server", "code"), [(SERVER, -signal.SIGTERM), (STUBBORN, 128 + signal.SIGTERM)])
def test_a_server_ends_with_its_command_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, code: int
) -> None:
    told = tmp_path / "told"
    monkeypatch.setattr(launch, "command", lambda start, rules: [sys.executable, "-c", server, str(told)])
    monkeypatch.setattr(launch, "PATIENCE", 0.5)

    def end() -> None:
        while not (told.exists() and told.read_text()):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end, daemon=True).start()

    assert launch.run(START, RULES) == code
    assert not Path(told.read_text()).exists()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("replicas", "more", "share"),
    [
        (1, [], 256),
        (4, [], 64),
        (4, ["--api-server-count", "2"], 128),
        (1, ["-asc=3"], 85),
        (1, ["--api_server_count=1000"], 1),
    ],
)
def test_each_process_of_vllm_has_its_share_of_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, more: list[str], share: int
) -> None:
    told, script = tmp_path / "told", f"import os, sys; open(sys.argv[1], 'w').write(os.environ[{VARIABLE!r}])"
    monkeypatch.setattr(launch, "command", lambda start, rules: [sys.executable, "-c", script, str(told)])

    assert launch.run(Start("m", "m", "h", 1, replicas, more), RULES) == 0
    assert json.loads(told.read_text())["max_queue"] == share


def test_a_count_that_is_none_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"--api-server-count: .*'many'"):
        launch.processes(Start("m", "m", "h", 1, 1, ["--api-server-count", "many"]))


def invoked(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments])


def refused(*arguments: str) -> str:
    """What the one line says."""
    result = invoked(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    return result.stderr


REFUSED: list[tuple[list[str], str]] = [
    (["reference", "--engine", "tgi"], "engine='tgi'"),
    (["reference", "hiprune"], "one argument too many"),
    (["reference", "--min-keep", "16"], "give --recipe"),
    (["reference", "--recipe", "hiprun(keep=2)"], "hiprun"),
    (["reference", "--recipe", RECIPE, "--min-keep", "few"], "min-keep='few'"),
    (["reference", "--recipe", RECIPE, "--max-keep", "1.5"], "max_keep=1.5"),
    (["reference", "--recipe", RECIPE, "--shadow", "0.1", "--max-keep", "64"], "max_keep=64"),
    (["reference", "--recipe", RECIPE, "--min-keep", "64", "--max-keep", "16"], "min_keep=64"),
    (["reference", "--shadow", "0.1"], "no recipe"),
    (["reference", "--engine", "transformers", "--replicas", "2"], "replicas=2"),
    (["reference", "--engine", "transformers", "--allow-other-media"], "text and pictures"),
    (["reference", "--engine", "transformers", "--", "--seed", "1"], "--seed"),
    (["reference", "--engine", "transformers", "--recipe", "downsample(most=64)"], "send smaller pictures"),
    (["nowhere", "--engine", "transformers"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "part"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_options_that_make_no_sense_are_refused(arguments: list[str], part: str) -> None:
    assert part in refused(*arguments)


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Start, Rules]]:
    """As if vLLM were installed; what would be started."""
    started: list[tuple[Start, Rules]] = []
    found: Callable[[str], Any] = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: object() if name == "vllm" else found(name))
    monkeypatch.setattr(cli, "run", lambda start, rules: started.append((start, rules)) or 3)
    return started


def test_vllm_is_taken_where_it_is_installed(with_vllm: list[tuple[Start, Rules]], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- hiprune: {keep: 36}")
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--max-keep", "0.5", "--allow-media-domain", "example.org"]

    result = invoked("reference", *options, "--replicas", "2", "--", "--max-model-len", "64")

    ((start, rules),) = with_vllm
    assert result.exit_code == 3
    assert (start.served_as, Path(start.model).name) == ("reference", "checkpoint")
    assert (start.replicas, start.more) == (2, ["--max-model-len", "64"])
    assert (rules.settings, rules.media_domains) == (Settings(RECIPE, max_keep=0.5), ("example.org",))
    assert rules.behind.name == "vllm"


def test_options_of_the_other_engine_are_refused_on_vllm(with_vllm: list[tuple[Start, Rules]]) -> None:
    assert "behind a --" in refused("reference", "--dtype", "float16")
    assert with_vllm == []


def test_without_vllm_it_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)

    assert "not installed" in refused("reference", "--engine", "vllm")
    assert "pip install 'foveate[serve]'" in refused("reference")


def test_an_older_transformers_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foveate.serving.door.fallback", None)

    assert "pip install 'transformers>=5.23,<6'" in refused("reference", "--engine", "transformers")
