"""A user's own model, as their script loads it: keywords, system prompt, several pictures, some of them behind URLs."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.hub import write_checkpoint
from transformers.utils import logging as transformers_logging

from foveate.cli.quiet import quiet


def assert_one_line(result: Any, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    for fragment in fragments:
        assert fragment in line


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server of one picture, ``star.png``, and of a page that is none."""
    folder = tmp_path / "site"
    folder.mkdir()
    Image.radial_gradient("L").resize((64, 64)).save(folder / "star.png")
    (folder / "page.html").write_text("<p>A star.</p>")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def loaded_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every model that is loaded."""
    from transformers import AutoModelForImageTextToText

    seen: list[dict[str, Any]] = []
    load = AutoModelForImageTextToText.from_pretrained

    def remember(*arguments: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return load(*arguments, **keywords)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", remember)
    return seen


def test_a_picture_behind_a_url_is_a_second_one(call: Callable[..., Any], qwen: Path, picture: Path, site: str) -> None:
    command = ["run", "--prompt", "what differs?", "--model", qwen, "--max-new-tokens", 2, "--image", picture]
    one, two = call(*command), call(*command, "--image", f"{site}/star.png")

    assert one.exit_code == two.exit_code == 0, two.output

    def visual(text: str) -> int:
        return int(next(line for line in text.splitlines() if "visual tokens" in line).split()[2])

    assert visual(two.stdout) > visual(one.stdout)


@pytest.mark.parametrize(("page", "reason"), [("page.html", "is not a picture that can be read"), ("absent.png", "404")])
def test_a_url_without_a_picture_is_one_line(
    call: Callable[..., Any], qwen: Path, site: str, page: str, reason: str
) -> None:
    result = call("run", "--prompt", "what?", "--model", qwen, "--image", f"{site}/{page}")

    assert_one_line(result, f"image='{site}/{page}'", reason)


def test_a_site_that_is_not_there_is_one_line(call: Callable[..., Any], qwen: Path) -> None:
    assert_one_line(
        call("run", "--prompt", "?", "--model", qwen, "--image", "http://127.0.0.1:9/a.png"), "cannot be fetched"
    )


def test_several_pictures_are_drawn(call: Callable[..., Any], qwen: Path, picture: Path, site: str, tmp_path: Path) -> None:
    pictures = ["--image", picture, "--image", f"{site}/star.png"]
    result = call("inspect", *pictures, "--prompt", "?", "--recipe", "uniform(keep=4)", "--model", qwen, "--out", tmp_path)

    assert result.exit_code == 0, result.output
    assert (tmp_path / "inspect.png").is_file()


ARGUMENTS = ["--model-args", "attn_implementation=eager", "--system", "Be brief."]


def test_every_command_loads_the_model_as_it_is_told(
    call: Callable[..., Any], picture: Path, tmp_path: Path, loaded_with: list[dict[str, Any]]
) -> None:
    model = write_checkpoint("qwen2_5_vl", tmp_path / "model")
    # Its template has no place for a system prompt, so that a command that was told one ends as soon as it has loaded it.
    (model / "chat_template.jinja").write_text("user: {{ messages[-1]['content'][-1]['text'] }}")
    commands = [
        ["run", "--image", picture, "--prompt", "?"],
        ["inspect", "--image", picture, "--prompt", "?", "--recipe", "none", "--out", tmp_path / "inspect"],
        ["bench", "--tasks", "shape", "--out", tmp_path / "bench"],
        ["tune", "--tasks", "shape", "--max-kv", 0.9, "--out", tmp_path / "tune"],
        ["probe", "information-horizon", "--tasks", "shape", "--out", tmp_path / "probe"],
        ["probe", "embedlens", "--tasks", "shape", "--out", tmp_path / "probe"],
        ["calibrate", "shortv", "--out", tmp_path / "calibrate"],
    ]
    for command in commands:
        assert_one_line(call(*command, "--model", model, *ARGUMENTS), "system='Be brief.'")
        assert loaded_with.pop()["attn_implementation"] == "eager", command
    assert call("methods", "--matrix", "--model", model, *ARGUMENTS[:2]).exit_code == 0
    assert loaded_with.pop()["attn_implementation"] == "eager"


def test_a_bench_under_other_keywords_is_not_gone_on_with(call: Callable[..., Any], qwen: Path, tmp_path: Path) -> None:
    command = ["bench", "--model", qwen, "--tasks", "shape", "--n", 2, "--methods", "none", "--out", tmp_path / "out"]
    assert call(*command, *ARGUMENTS).exit_code == 0

    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["model_args"], settings["system"]) == ("{attn_implementation: eager}", "Be brief.")
    assert_one_line(call(*command, *ARGUMENTS[2:], "--resume"), "model_args=None", "attn_implementation: eager")
    assert_one_line(call(*command, *ARGUMENTS[:2], "--resume"), "system=None", "'Be brief.'")
    file = tmp_path / "args.yaml"
    file.write_text("attn_implementation: eager\n")
    assert call(*command, "--model-args", file, *ARGUMENTS[2:], "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--model-args", "revison=v1"], ["model_args='revison'", "did you mean 'revision'?"]),
        (["--model-args", "device_map=auto", "--device", "cpu"], ["device='cpu'", "device_map"]),
        (["--model-args", "attn_implementation=nope"], ["attn_implementation", "nope"]),
    ],
)
def test_a_mistake_in_the_keywords_is_one_line(
    call: Callable[..., Any], qwen: Path, picture: Path, options: list[str], fragments: list[str]
) -> None:
    assert_one_line(call("run", "--image", picture, "--prompt", "?", "--model", qwen, *options), *fragments)


def test_keywords_of_no_model_are_refused(call: Callable[..., Any]) -> None:
    assert_one_line(call("methods", "--matrix", "--model-args", "revision=v1"), "--model-args", "--model")


def test_warnings_of_our_own_are_shown_while_a_command_runs(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("foveate.somewhere")
    monkeypatch.setattr("foveate.cli.methods.methods", lambda **_: log.warning("one method is missing"))
    before = list(logging.getLogger("foveate").handlers)

    assert call("methods").stderr == "one method is missing\n"
    assert logging.getLogger("foveate").handlers == before


def heard() -> tuple[int, bool]:
    """What transformers says at least, and whether it shows progress."""
    return transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()


def test_transformers_is_quiet_while_a_command_runs_and_no_longer() -> None:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        assert quiet()(heard)() == (transformers_logging.ERROR, False)
        with pytest.raises(ZeroDivisionError):
            quiet()(lambda: 1 / 0)()
        assert heard() == (transformers_logging.INFO, True)
    finally:
        transformers_logging.set_verbosity(before)
