"""The documentation as a site: it builds without a warning, and nothing in it is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from benchmarks.notebook import NOTEBOOK, executed

from tests.browser import CHROMIUM, Browser
from tests.pages import ROOT

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "object": "data"}
"""What a browser loads by itself, and the attribute that says from where."""
NOT_LOADED = {"canonical", "next", "prev"}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built; any warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "DISABLE_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


class Loads(HTMLParser):
    """Collects the addresses that a page loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        if tag in LOADED and said.get("rel") not in NOT_LOADED and said.get(LOADED[tag]):
            self.addresses.append(str(said[LOADED[tag]]))


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    styles = [found for sheet in site.rglob("*.css") for found in re.findall(r"url\(\s*[\"']?([^\"')]+)", sheet.read_text())]

    addresses = [address for page in pages for address in Loads(page).addresses]

    assert addresses
    assert [address for address in [*addresses, *styles] if address.startswith(("http:", "https:", "//"))] == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_asks_for_files_alone_and_no_page_is_wider_than_its_window(site: Path, tmp_path: Path, width: int) -> None:
    with Browser(tmp_path) as browser:
        for name in ("index", "quickstart", "choose", "notebook", "api", "results"):
            browser.open(site / f"{name}.html", width)
            assert browser.run("document.documentElement.scrollWidth") <= width, name

    assert browser.requests
    assert [address for address in browser.requests if not address.startswith(("file:", "data:", "blob:"))] == []


def test_the_api_pages_say_what_arguments_mean(site: Path) -> None:
    text = (site / "api.html").read_text()

    for name in ("attach", "Session", "Recipe", "core.report.Report", "checkpoint.load.load", "core.method.Method.check"):
        assert f'id="foveate.{name}"' in text
    assert "seed of methods that draw" in text


def test_the_notebook_runs_and_shows_what_it_showed() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    shown = _words(kept)

    again = executed(nbformat.read(NOTEBOOK, as_version=4))

    assert _words(again) == shown


def _words(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells show as text, numbers left out: seconds differ by the run, scores by the processor's rounding."""
    texts = [
        output.get("text") or output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    return [re.sub(r"\d[\d.e+-]*", "#", text) for text in texts]
