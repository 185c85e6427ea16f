"""The report of a bench as a page: what it says, that it holds all it needs, and that no data becomes markup."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.browser import CHROMIUM, Browser

from foveate.bench.cells import Cell, plan
from foveate.bench.folder import ResultFolder, Results
from foveate.bench.records import Failure
from foveate.bench.run import run
from foveate.core.errors import FoveateError
from foveate.core.files import write_json
from foveate.core.recipe import NONE, Recipe
from foveate.report.page import page, write_page
from foveate.tasks import questions

NASTY = "</script><img src=x onerror=alert(1)>\"'"
FIGURE = {
    "title": "Horizon",
    "caption": NASTY,
    "x_label": "layer",
    "y_label": "answers changed",
    "series": [{"name": "shape", "x": [0, 1, 2], "y": [1.0, 0.5, None], "low": [0.9, 0.4, None], "high": [1, 0.6, None]}],
}


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute))]


def words(html: str) -> str:
    return " ".join(Parsed(html).text.split())


def gallery_of(html: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="gallery">(.*?)</script>', html, re.DOTALL)
    return dict(json.loads(found))


@pytest.fixture
def done(folder: ResultFolder, measure: Any, log: Any) -> ResultFolder:
    """Two tasks, two methods of which one is no better than random, two budgets."""
    cells = plan(["shape", "existence"], ["hiprune", "fastv"], [0.5, 0.25])
    run(cells, lambda task: questions(task, 20, 0), measure, folder, log)
    note = {"majority_answer": "cross", "majority_score": 0.125, "below_floor": False}
    write_json(folder.path / "tasks.json", {"shape": note, "existence": {**note, "below_floor": True}})
    return folder


def test_the_page_says_what_the_bench_came_to(done: ResultFolder) -> None:
    text = words(page(done))

    assert "With keep 0.5, hiprune retains most: 88.9 % of the unmodified model's score (random selection 55.6 %)." in text
    assert "4 of 8 results are no better than random selection" in text
    assert "fastvshape at 0.5, 0.25existence at 0.5, 0.25" in text
    assert "did not learn existence well enough" in text
    assert "always “cross”" in text


def test_what_kept_everything_and_what_needs_training_is_said(done: ResultFolder, measure: Any, log: Any) -> None:
    def generous(cell: Cell, *given: Any) -> Any:
        return measure(replace(cell, method=NONE, keep=None), *given)

    run(plan(["shape"], ["ppe"], [512]), lambda task: questions(task, 20, 0), generous, done, log)
    text = words(page(done))

    assert "Kept everything No picture has more tokens than the budget, so nothing was dropped." in text
    assert "Needs training ppe: as published, the model is trained with it" in text
    assert "ppe needs training" in text


def test_every_section_is_there(done: ResultFolder) -> None:
    found = Parsed(page(done))

    assert [a["id"] for tag, a in found.tags if tag == "section"] == [
        *("short", "fronts", "map", "layers", "examples", "table", "setup")
    ]
    assert found.text.count("best on top") == 3 * 2
    assert sum(tag == "figure" for tag, _ in found.tags) == 2 + 2 + 3


def test_the_fastest_within_a_loss_is_offered(done: ResultFolder) -> None:
    text = words(page(done))

    # hiprune loses 11 %, which is more than any reader is taken to give up.
    assert "How fast may it be?" not in text


def test_points_tell_method_budget_score_and_speed(done: ResultFolder) -> None:
    tips = Parsed(page(done)).all("data-tip")

    assert "hiprune · keep 0.25\nscore 80.0 % [58.4, 91.9]\nspeed-up 4.00x\n36.0 visual tokens in the last layer" in tips


def test_the_page_holds_all_it_needs(done: ResultFolder) -> None:
    html = page(done)
    found = Parsed(html)

    assert all(address.startswith(("#", "data:")) for name in ("src", "href") for address in found.all(name))
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_only_the_page_s_own_script_may_run(done: ResultFolder) -> None:
    html = page(done)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)

    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in html


def test_examples_hold_each_picture_once_and_what_each_method_left(done: ResultFolder) -> None:
    gallery = gallery_of(page(done))

    asked = gallery["tasks"]["shape"][0]
    depth = {(cell["method"], cell["keep"]): cell["depth"][0][0].split() for cell in asked["cells"]}
    assert len(gallery["images"]) == 4
    assert set(gallery["images"]) >= {picture["png"] for picture in asked["pictures"]}
    assert depth["none", ""] == ["2"] * 144
    assert depth["hiprune", "0.25"] == ["2"] * 36 + ["1"] * 108


def test_nothing_from_data_becomes_markup(folder: ResultFolder, measure: Any, log: Any) -> None:
    def nasty(cell: Cell, asked: Any, advance: Callable[[int], None]) -> Any:
        measured = measure(replace(cell, method=cell.method.removesuffix(NASTY)), asked, advance)
        answers = [replace(answer, prompt=NASTY, answer=NASTY, prediction=NASTY) for answer in measured.answers]
        return replace(measured, answers=answers)

    cells = plan(["shape"], ["hiprune"], [0.5])
    cells[-1] = replace(cells[-1], method="hiprune" + NASTY)
    run(cells, lambda task: questions(task, 20, 0), nasty, folder, log)
    folder.report(Failure(Cell(NASTY, NASTY, None, Recipe()), NASTY, ""))
    write_json(folder.path / "tasks.json", {"shape": {"majority_answer": NASTY, "majority_score": 0, "below_floor": True}})
    write_json(folder.path / "probes.json", {"title": NASTY, "figures": [FIGURE]})
    html = page(folder)

    found = Parsed(html)
    assert not [tag for tag, attributes in found.tags if tag == "img" or "onerror" in attributes]
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert gallery_of(html)["tasks"]["shape"][0]["cells"][0]["prediction"] == NASTY
    assert "hiprune" + NASTY in found.text


def test_probes_are_drawn(done: ResultFolder) -> None:
    write_json(done.path / "probes.json", {"title": "Probes", "figures": [FIGURE]})

    found = Parsed(page(done))

    assert "probes" in found.all("id")
    assert "shape\nlayer 1\nanswers changed 0.5" in found.all("data-tip")


def test_probes_of_another_make_are_refused_in_one_line(done: ResultFolder) -> None:
    write_json(done.path / "probes.json", {"figures": [{"title": "no series"}]})

    with pytest.raises(FoveateError, match=r"^probes.json: must hold figures"):
        page(done)


def test_a_folder_without_layers_and_pictures_is_shown_without_them(done: ResultFolder) -> None:
    for path in (done.path / "cells").iterdir():
        cell = json.loads(path.read_text())
        gone = ("visual_by_layer", "kv_by_layer", "evidence_by_layer", "examples")
        write_json(path, {name: value for name, value in cell.items() if name not in gone})

    assert not {"layers", "examples"} & set(Parsed(page(done)).all("id"))


def test_methods_without_a_budget_alone_are_shown(folder: ResultFolder, measure: Any, log: Any) -> None:
    run([Cell("shape", "none", None, Recipe())], lambda task: questions(task, 20, 0), measure, folder, log)

    assert "Score retained in percent, best on top" in words(page(folder))


def test_a_folder_in_which_nothing_is_finished_is_refused(folder: ResultFolder) -> None:
    folder.begin()

    with pytest.raises(FoveateError, match=r"holds no finished cell yet; foveate bench --resume goes on there"):
        page(Results.open(folder.path))


def test_a_folder_read_again_makes_the_same_page(done: ResultFolder) -> None:
    assert page(Results.open(done.path)) == page(done)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page(done: ResultFolder, tmp_path: Path, width: int, dark: bool) -> None:
    write_json(done.path / "probes.json", {"title": "Probes", "figures": [FIGURE]})
    path = tmp_path / "report.html"
    write_page(done, path)
    with Browser(tmp_path / "profile") as browser:
        browser.open(path, width, dark=dark)

        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('#example article').length") == 5
        assert browser.run("document.querySelectorAll('.heat:not([hidden])').length") == 1

        browser.run("document.querySelector('.multiples svg').focus()")
        browser.press("ArrowRight")
        assert "speed-up" in browser.run("document.getElementById('tip').textContent")

        browser.run("document.querySelectorAll('[name=map-budget]')[1].click()")
        assert browser.run("document.querySelector('.heat:not([hidden])').dataset.budget") == "0.25"

        browser.run("document.querySelector('.legend [data-series=hiprune]').click()")
        hidden = "[...document.querySelectorAll('.chart [data-series=hiprune]')].every(e => e.classList.contains('off'))"
        assert browser.run("[...document.querySelectorAll('.chart [data-series=hiprune]')].length") > 0
        assert browser.run(hidden)

        browser.run("document.querySelectorAll('#table th button')[3].click()")
        assert browser.run("document.querySelector('#table tbody tr').cells[1].textContent") == "none"

        assert browser.troubles == []
        assert {address for address in browser.requests if not address.startswith("data:")} == {path.as_uri()}
