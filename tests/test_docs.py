"""What the pages show is true: code runs, commands are understood, names and links lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
import yaml
from benchmarks import methods
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from foveate import models
from foveate.cli.app import app
from foveate.core import registry
from foveate.core.recipe import Recipe
from foveate.models.processors import read_processor
from tests.film import write_film
from tests.hub import write_checkpoint, write_text_checkpoint
from tests.pages import PAGES, ROOT, Block, blocks, commands, inline, prose

PAGE = {page.relative_to(ROOT).as_posix(): page for page in PAGES}
WITH_CODE = [name for name, page in PAGE.items() if any(block.language == "python" for block in blocks(page))]
BEFORE = {"docs/probes.md": "foveate probe information-horizon --n 2 --tasks attribute --windows 0 --out runs/mine"}
"""What a page's code takes for granted."""
SERVED = {"docs/serving.md": ("foveate serve reference --recipe 'hiprune(keep=36)' --engine transformers", "127.0.0.1:8000")}
"""A server that a page's code talks to, and where the page says that it is."""
# Typer does not export it.
MissingParameter: Any = next(kind for kind in typer.BadParameter.__subclasses__() if kind.__name__ == "MissingParameter")
FAMILIES = ROOT / "docs" / "quickstart.md"
TEXT = ("qwen3", "Qwen/Qwen3-8B")
"""The text model that pages name, and its ``model_type``."""
OTHER_TOOLS = ("lmms-eval ", "pip ")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: a picture, a video, and the file of questions that docs/data.md shows, with its pictures."""
    monkeypatch.chdir(tmp_path)
    write_film(Path("talk.mp4"))
    shown = next(block.text for block in blocks(ROOT / "docs" / "data.md") if block.language == "json")
    Path("receipts.jsonl").write_text(shown)
    named = [json.loads(line)["image"] for line in shown.splitlines()]
    for name in ["cat.jpg", *(name for each in named for name in ([each] if isinstance(each, str) else each))]:
        Path(name).parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((800, 800)).save(name)
    return tmp_path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint of a family, laid out as on the Hub."""

    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return write_text_checkpoint(folder) if family == TEXT[0] else write_checkpoint(family, folder)

    return functools.cache(write)


@pytest.fixture
def hub(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the checkpoints in the quick start's table without the Hub: a tiny one of the family stands for each."""
    families = {checkpoint: family for family, checkpoint in (*checkpoints().items(), TEXT)}

    def stand_in(auto: Any, of_folder: Callable[..., Any]) -> None:
        original = auto.from_pretrained

        def from_pretrained(name: Any, **options: Any) -> Any:
            return of_folder(written(families[name]), **options) if name in families else original(name, **options)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)

    stand_in(AutoModelForImageTextToText, AutoModelForImageTextToText.from_pretrained)
    stand_in(AutoProcessor, read_processor)  # with or without torchvision
    stand_in(AutoModelForCausalLM, AutoModelForCausalLM.from_pretrained)
    stand_in(AutoTokenizer, AutoTokenizer.from_pretrained)


def run(page: Path, replaced: tuple[str, str] | None = None) -> Iterator[tuple[Block, str]]:
    """A page's blocks of Python in one namespace, one after the other: each with what it prints."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            printed = io.StringIO()
            text = block.text.replace(*replaced) if replaced else block.text
            # Tracebacks name the page and its line.
            code = compile("\n" * (block.line - 1) + text, page, "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            yield block, printed.getvalue()


@contextlib.contextmanager
def served(name: str) -> Iterator[tuple[str, str] | None]:
    """The server that a page's code talks to, if any: where the page has it, and where it is now."""
    if name not in SERVED:
        yield None
        return
    command, there = SERVED[name]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", *shlex.split(command), "--port", str(port)])
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield there, f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(name: str, desk: Path, hub: None) -> None:
    page = PAGE[name]
    if name in BEFORE:
        assert CliRunner().invoke(app, shlex.split(BEFORE[name])[1:]).exit_code == 0
    after = {one.line: two for one, two in zip(blocks(page), blocks(page)[1:])}

    with served(name) as moved:
        for block, printed in run(page, moved):
            if block.line in after and after[block.line].language == "text":
                assert printed == after[block.line].text


def test_the_first_code_of_the_readme_answers_right(desk: Path) -> None:
    _, printed = next(run(ROOT / "README.md"))

    assert printed.startswith("red\nrecipe         hiprune(keep=64) + mixkv(keep=0.2)\n")


def checkpoints() -> dict[str, str]:
    """The checkpoint that the quick start names for each ``model_type``."""
    return dict(re.findall(r"^\|[^|]*\| `(\w+)` \| `([\w./-]+)` \|", FAMILIES.read_text(), re.MULTILINE))


@pytest.mark.parametrize("family", checkpoints())
def test_the_quick_start_runs_on_every_family(family: str, desk: Path, hub: None) -> None:
    (_, printed), *_ = run(FAMILIES, (checkpoints()["llava"], checkpoints()[family]))

    assert "\nrecipe         hiprune(keep=0.22)\nvisual tokens  " in printed


def understood(line: str) -> None:
    """Raises what the command line would say of a command before it starts to work."""
    words = [word for word in shlex.split(line) if word != "..."]
    command, context, name, rest = typer.main.get_command(app), None, words[0], words[1:]
    while True:
        context = command.make_context(name, rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not (rest and hasattr(command, "resolve_command")):
            return
        name, command, rest = command.resolve_command(context, rest)


@pytest.mark.parametrize("name", PAGE)
def test_the_commands_of_a_page_are_understood(name: str) -> None:
    for line in commands(PAGE[name]):
        if line.startswith("foveate "):
            understood(line)
        elif line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif line.startswith("python "):
            source = line.split()[1] if line.split()[1] != "-m" else line.split()[2].replace(".", "/") + ".py"
            assert (ROOT / source).exists(), line
        elif line.startswith(OTHER_TOOLS) or name == "docs/architecture.md":
            continue  # other people's commands; the floors of the house
        else:
            pytest.fail(f"{name}: what is {line!r}?")


@pytest.mark.parametrize("name", PAGE)
def test_the_commands_and_recipes_in_a_page_s_words_exist(name: str) -> None:
    for code in inline(PAGE[name]):
        if code.startswith("foveate ") and "DIR" not in code:
            # A command that is named only, as in "`foveate run` answers", lacks its options.
            with contextlib.suppress(MissingParameter):
                understood(code)
        if re.match(r"\w+\(.*\)", code) and code.split("(")[0] in registry.methods() and "..." not in code:
            Recipe.parse(code)


def test_extras_that_the_pages_name_exist() -> None:
    named = {
        extra
        for page in PAGES
        for found in re.findall(r"pip install '[^']*\[([\w,]+)\]'", page.read_text())
        for extra in found.split(",")
    }

    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_table_of_extras_is_that_of_the_package() -> None:
    table = (ROOT / "docs" / "install.md").read_text().split("## Extras")[1].split("##")[0]

    assert {*re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE), "peers"} == set(PROJECT["optional-dependencies"])


def test_the_quick_start_has_every_family() -> None:
    # Of Omni, transformers' own class loads the thinker, as the page says.
    assert {*checkpoints(), "qwen2_5_omni_thinker"} == set(models._FAMILIES) - {"several"}  # the suite's own


def test_the_quick_start_names_checkpoints_that_transformers_names_for_the_family() -> None:
    folders = Path(transformers.__file__).parent / "models"
    for family, checkpoint in (*checkpoints().items(), TEXT):
        assert any(checkpoint in source.read_text() for source in (folders / family).glob("*.py")), checkpoint


def test_pages_name_no_other_checkpoints() -> None:
    owners = {checkpoint.split("/")[0] for checkpoint in checkpoints().values()}
    for page in PAGES:
        named = set(re.findall(rf"(?<![\w/])(?:{'|'.join(owners)})/[\w.-]*\w", page.read_text()))
        assert named <= {*checkpoints().values(), TEXT[1]}, page


@pytest.mark.parametrize("name", PAGE)
def test_links_lead_to_files(name: str) -> None:
    page = PAGE[name]
    made = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "methods/index.md": "docs/gen_methods.py"}
    for link in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", prose(page)):
        assert (ROOT / made[link]).exists() if link in made else (page.parent / link).exists(), f"{name}: {link}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())

    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {author["name"] for author in citation["authors"]} == {author["name"] for author in PROJECT["authors"]}


def test_the_list_of_methods_in_the_readme_is_what_they_say_of_themselves() -> None:
    written = (ROOT / "README.md").read_text()

    assert methods.current(written) == written, "README.md is behind its methods; run: python benchmarks/methods.py"


def test_what_the_page_on_choosing_says_of_random_is_in_the_results() -> None:
    page, results = ((ROOT / "docs" / name).read_text() for name in ("choose.md", "results.md"))
    rows = re.findall(r"^\| `(\w+)[^`]*`.* (\d+) better, (\d+) worse \|", results, re.MULTILINE)

    def won(method: str) -> int:
        return sum(int(better) - int(worse) for name, better, worse in rows if name == method)

    def named(title: str) -> list[str]:
        found = re.search(rf"- \*\*{re.escape(title)}\*\* (.*?) are\b", page, re.DOTALL)
        assert found, title
        return re.findall(r"`(\w+)`", found[1])

    assert all(won(method) > 0 for method in [*named("Before the language model."), *named("In the cache.")])
    assert all(won(method) < 0 for method in named("Below `random`."))
