"""Cells side by side on Ray come to what they come to one after the other, also when workers are killed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.bench.conftest import ask, made_up
from tests.bench.deadly import deadly, nowhere

from foveate.bench.admission import admitted
from foveate.bench.cells import plan
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.parallel import LIVES, Crew, connected, run_on_ray
from foveate.bench.run import run
from foveate.core.errors import FoveateError

EVERY = partial(admitted, named=[], left_out=print)
Nodes = list[dict[str, float]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A Ray of our own."""
    with connected("local") as found:
        yield found


def test_a_killed_worker_loses_nothing_and_a_failing_cell_only_itself(
    nodes: Nodes, folder: ResultFolder, settings: Settings, tmp_path: Path, log: Any
) -> None:
    none, random, _, _, _, hiprune, fastv, scope = plan(["shape"], ["hiprune", "fastv", "scope"], [0.5])
    alone = ResultFolder(tmp_path / "alone", settings)
    run([none, random, hiprune], ask, made_up, alone, log)
    marks, said = tmp_path / "marks", []
    marks.mkdir()

    cells = [none, random, hiprune, fastv, scope]
    admit = partial(admitted, named=["fastv"], left_out=said.append)
    run_on_ray(cells, ask, partial(deadly, marks), folder, log, Crew.fitting(nodes, "cpu", len(cells), 2), admit)

    assert folder.records == alone.records
    assert contents(folder.path / "cells") == contents(alone.path / "cells")
    assert said == ["left out: scope(keep=0.5): too bright"]
    assert len(list(marks.glob("random-*"))) == 2
    assert [(each.cell, each.error) for each in folder.failures] == [(fastv, "fastv: has a bad day")]


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_is_given_up(
    nodes: Nodes, folder: ResultFolder, settings: Settings, tmp_path: Path, log: Any
) -> None:
    none, _, uniform, *_ = plan(["shape"], [], [0.5])

    run_on_ray([uniform, none], ask, partial(deadly, tmp_path), folder, log, Crew.fitting(nodes, "cpu", 2, 1), EVERY)

    assert [each.method for each in folder.records] == ["none"]
    assert folder.failures[0].cell == uniform
    assert f"ray: {LIVES} workers were lost over this cell" in folder.failures[0].error
    assert len(list(tmp_path.glob("uniform-*"))) == LIVES


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_method_that_was_named_and_is_refused_ends_it_before_any_work(
    nodes: Nodes, folder: ResultFolder, tmp_path: Path, log: Any
) -> None:
    cells = plan(["shape"], ["scope"], [0.5])
    admit = partial(admitted, named=["scope"], left_out=print)

    with pytest.raises(FoveateError, match=r"^methods: scope\(keep=0.5\): too bright; leave it out"):
        run_on_ray(cells, ask, partial(deadly, tmp_path), folder, log, Crew.fitting(nodes, "cpu", 1, 1), admit)

    assert not log.started_cells


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_the_user_s_mistake_and_leaves_nothing(
    nodes: Nodes, folder: ResultFolder, log: Any
) -> None:
    cells = plan(["shape"], [], [0.5])

    with pytest.raises(FoveateError, match=r"^model='nowhere': cannot be loaded$"):
        run_on_ray(cells, ask, nowhere, folder, log, Crew.fitting(nodes, "cpu", len(cells), 1), EVERY)

    assert not [path for path in folder.path.iterdir() if path.name != ".lock"]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_where_no_ray_is_gets_one_line(address: str) -> None:
    with pytest.raises(FoveateError, match=rf"^ray='{address}': cannot be had .*--ray without an"), connected(address):
        pass


@pytest.mark.parametrize(
    ("nodes", "wanted", "workers", "cores"),
    [
        ([{"CPU": 2}], None, 2, 1),
        ([{"CPU": 8}], 2, 2, 4),
        ([{"CPU": 8}], 3, 3, 2),
        ([{"CPU": 2}], 5, 5, 0),
        ([{"CPU": 64}], None, 40, 1),
        # Fifteen cores each would leave the fourth worker without a place.
        ([{"CPU": 20}, {"CPU": 20}, {"CPU": 20}], 4, 4, 10),
        ([{"CPU": 8}] * 10, 2, 2, 8),
        ([{"memory": 1e9}, {"CPU": 4}], None, 4, 1),
    ],
)
def test_workers_on_cores(nodes: Nodes, wanted: int | None, workers: int, cores: int) -> None:
    assert Crew.fitting(nodes, "cpu", 40, wanted) == Crew(workers, cores, 0)


@pytest.mark.parametrize(
    ("nodes", "wanted", "workers", "cores", "gpu"),
    [
        ([{"CPU": 64, "GPU": 8}], None, 8, 8, 1),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 500}], None, 8, 8, 1),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 128, "GPU": 1}], None, 9, 2, 1),
        ([{"CPU": 16, "GPU": 2}], 3, 3, 5, 0.5),
    ],
)
def test_workers_on_gpus(nodes: Nodes, wanted: int | None, workers: int, cores: int, gpu: float) -> None:
    assert Crew.fitting(nodes, "cuda", 40, wanted) == Crew(workers, cores, gpu)


def test_a_ray_without_a_gpu_has_no_place_for_a_model_on_one() -> None:
    with pytest.raises(FoveateError, match=r"^device='cuda': no node of this Ray has a GPU"):
        Crew.fitting([{"CPU": 8}], "cuda", 40)
