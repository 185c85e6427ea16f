"""``foveate inspect`` as a user calls it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import foveate
from foveate import checkpoint, tasks
from foveate.bench.measure import evidence_recalls
from foveate.cli.inspect import look
from foveate.core.files import write_whole
from foveate.core.recipe import Recipe


@pytest.fixture
def inspect(call: Any, tiny: Path, tmp_path: Path) -> Any:
    return lambda *options: call("inspect", "--model", tiny, "--out", tmp_path / "out", *options)


@pytest.fixture
def page(tmp_path: Path) -> Any:
    return lambda: (tmp_path / "out" / "inspect.html").read_text(encoding="utf-8")


def test_a_picture_of_one_s_own_is_drawn_under_two_recipes(inspect: Any, page: Any, picture: Path, tmp_path: Path) -> None:
    result = inspect("--image", picture, "--prompt", "what?", "--recipe", "fastv(keep=36)", "--against", "tome(keep=48)")

    assert result.exit_code == 0, result.stderr
    assert "36 of 144 tokens (25 %)" in page()
    assert "48 of 144 tokens (33 %)" in page()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inspect.html", "inspect.png"]
    with Image.open(tmp_path / "out" / "inspect.png") as drawn:
        assert min(drawn.size) > 500


def test_of_a_conversation_the_turn_with_the_pictures_is_drawn(inspect: Any, page: Any) -> None:
    result = inspect("--task", "dialogue", "--recipe", "uniform(keep=36)")

    assert result.exit_code == 0, result.stderr
    assert "36 of 144 tokens (25 %)" in page()


def test_the_page_needs_no_network(inspect: Any, page: Any) -> None:
    inspect("--task", "shape", "--recipe", "scope(keep=36) + snapkv(keep=0.5, window=4)")

    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page())
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in page()


def test_what_users_write_is_text_on_the_page(inspect: Any, page: Any, picture: Path) -> None:
    result = inspect("--image", picture, "--prompt", "<b>x</b> & <script>1</script> $x_$", "--recipe", "none")

    assert result.exit_code == 0, result.stderr
    assert "&lt;b&gt;x&lt;/b&gt; &amp; &lt;script&gt;" in page()
    assert "<b>x</b>" not in page()


def test_a_real_picture_is_drawn(inspect: Any) -> None:
    pytest.importorskip("skimage")

    assert inspect("--image", "sample:cat", "--prompt", "what?", "--recipe", "uniform(keep=9)").exit_code == 0


@pytest.mark.parametrize(
    "recipe", ["scope(keep=36)", "fastv(keep=20, layer=2)", "tome(keep=40)", "v2drop(layers=(1,), ratios=(0.4,))"]
)
def test_counts_and_evidence_are_the_report_s_and_the_bench_s(tiny: Path, recipe: str) -> None:
    loaded, question = checkpoint.load(str(tiny), "cpu", "float32"), tasks.question("attribute", 0, 3)
    inspection = look(loaded, question, Recipe.parse(recipe), seed=0)
    with foveate.attach(loaded.model, recipe) as session:
        loaded.answer(loaded.inputs([question.images], [question.prompt]), question.max_new_tokens)
    (alive,), (grids,) = session.trace.alive(loaded.layers), session.trace.grids

    assert inspection.story.stages[-1].count == session.report.visual_tokens[-1]
    assert inspection.recalls[-1] == evidence_recalls(question, grids, [alive])[0]
    assert inspection.recalls[0] == 1


def test_evidence_of_a_cache_is_the_mean_share_that_heads_hold(tiny: Path) -> None:
    loaded, question = checkpoint.load(str(tiny), "cpu", "float32"), tasks.question("attribute", 0, 3)
    inspection = look(loaded, question, Recipe.parse("snapkv(keep=0.5, window=4)"), seed=0)
    stage, ((rows, columns),) = inspection.story.stages[-1], inspection.story.grids

    cells = torch.from_numpy(tasks.evidence_cells(question.evidence[0], rows, columns).ravel())
    assert stage.share is not None
    assert inspection.recalls[-1] == pytest.approx(float(torch.from_numpy(stage.share[0])[cells].mean()))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "image: give --image and --prompt, or --task for a generated question"),
        (("--image", "cat.png"), "image: give --image and --prompt, or --task for a generated question"),
        (
            ("--task", "shape", "--prompt", "x"),
            "task='shape': brings its own picture and prompt; leave out --image and --prompt",
        ),
        (("--task", "sums"), "task='sums': must be one of "),
        (("--image", "cat.png", "--prompt", "x"), "image='cat.png': no such file"),
        (("--image", "sample:lena", "--prompt", "x"), "sample='lena': must be one of astronaut, "),
        (("--task", "shape", "--against", "fastv(keep=2.5)"), "fastv: keep=2.5"),
        (("--task", "shape", "--against", "fastw"), "unknown method 'fastw'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(inspect: Any, tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    result = inspect("--recipe", "none", *options)

    assert result.exit_code == 2
    assert result.stderr.startswith("foveate: ")
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said(inspect: Any, picture: Path) -> None:
    result = inspect("--task", "shape", "--recipe", "none", "--out", picture / "inside")

    assert result.exit_code == 2
    assert "cannot be written (Not a directory); name another folder" in result.stderr


def test_files_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_whole(path, b"old")

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
