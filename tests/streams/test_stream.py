"""A stream is read as a prompt with all its pictures would be, bounded or not, and forgets what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.film import write_film
from tests.hub import write_checkpoint

import foveate
from foveate import FoveateError, checkpoint
from foveate.checkpoint import Checkpoint
from foveate.streams import Stream
from foveate.streams.frames import frames
from foveate.streams.words import Words

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "qwen3_vl_moe")
"""Those whose layers all have full attention."""

Loaded = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A family's tiny checkpoint."""
    folder, known = tmp_path_factory.mktemp("hub"), dict[str, Checkpoint]()

    def load(family: str) -> Checkpoint:
        if family not in known:
            known[family] = checkpoint.load(str(write_checkpoint(family, folder / family)), "cpu", "float32")
        return known[family]

    return load


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def first_logits(loaded: Checkpoint, stream: Stream, question: str) -> torch.Tensor:
    """Of the first token of the answer."""
    with watching(loaded) as seen:
        stream.ask(question, max_new_tokens=1)
    return seen[-1]


class watching:  # noqa: N801
    """The logits of every forward."""

    def __init__(self, loaded: Checkpoint) -> None:
        self.model, self.seen = loaded.model, list[torch.Tensor]()

    def __enter__(self) -> list[torch.Tensor]:
        self.hook = self.model.register_forward_hook(lambda m, a, out: self.seen.append(out.logits[:, -1]))
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def in_all_ways() -> Iterator[Any]:
    """Every family, recipe and size of chunks; in the first tier each family in one way, and each way once."""
    for family, recipe, chunk in product(FAMILIES, ("none", "hermes(keep=4000)", "streamingllm(keep=4000)"), (1, 2)):
        first = (recipe, chunk) == ("hermes(keep=4000)", 2) or family == "llava"
        yield pytest.param(family, recipe, chunk, marks=[] if first else [pytest.mark.slow])


@pytest.mark.parametrize(("family", "recipe", "chunk"), in_all_ways())
def test_a_stream_that_fits_is_the_prompt_with_all_its_pictures(
    family: str, recipe: str, chunk: int, loaded: Loaded
) -> None:
    model, shown = loaded(family), pictures(3)
    with watching(model) as seen, torch.inference_mode():
        model.model.generate(**model.inputs([shown], ["what is it?"]), max_new_tokens=1, do_sample=False)
    with foveate.stream(model, recipe, chunk=chunk) as stream:
        for picture in shown:
            stream.push(picture)
        torch.testing.assert_close(first_logits(model, stream, "what is it?"), seen[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["hermes(keep=40)", "streamingllm(keep=40)"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_bounded_however_long_it_runs(family: str, recipe: str, loaded: Loaded) -> None:
    with foveate.stream(loaded(family), recipe) as stream:
        sizes = set[tuple[int, int]]()
        for number, picture in enumerate(pictures(12)):
            stream.push(picture)
            if number > 6:
                sizes.add((stream.entries, stream.nbytes))
        layers = [layer.keys.shape[2] for layer in stream._cache.cache.layers]

    assert len(sizes) == 1
    assert set(layers) == {40 + stream._cache._prefix}


@pytest.mark.parametrize("reindex", ["lazy", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_positions_of_every_layer_go_on_from_the_largest(family: str, reindex: str, loaded: Loaded) -> None:
    with foveate.stream(loaded(family), f"hermes(keep=40, reindex={reindex!r}, headroom=0)") as stream:
        for picture in pictures(8):
            stream.push(picture)
        cache = stream._cache
        largest = max(int(positions.max()) for positions in cache._positions)

    assert cache.next == largest + 1
    assert all(positions.shape[1] == layer.keys.shape[2] for positions, layer in zip(cache._positions, cache.cache.layers))
    if reindex == "eager":
        assert largest <= 41 + cache._prefix


@pytest.mark.parametrize(
    "recipe",
    [
        "none",
        "hermes(keep=40)",
        "snapkv(keep=30, window=4)",
        "prefixkv(keep=0.5)",
        "fastv(layer=2)",
        "streamingllm(keep=30)",
        "h2o(keep=30)",
    ],
)
def test_a_question_leaves_no_trace(recipe: str, loaded: Loaded) -> None:
    model, shown = loaded("qwen2_5_vl"), pictures(6)

    def run(asks: bool) -> tuple[list[torch.Tensor], str]:
        with foveate.stream(model, recipe, chunk=2) as stream:
            for number, picture in enumerate(shown):
                stream.push(picture)
                if asks and number == 3 and "hermes" not in recipe:
                    stream.ask("what was that?", max_new_tokens=4)
            before = [layer.keys.clone() for layer in stream._cache.cache.layers]
            first = stream.ask("what is it?", max_new_tokens=4)
            after = [layer.keys for layer in stream._cache.cache.layers]
            assert all(map(torch.equal, before, after))
            assert stream.ask("what is it?", max_new_tokens=4) == first
            return before, first

    once, twice = run(asks=True), run(asks=False)
    assert all(map(torch.equal, once[0], twice[0]))
    assert once[1] == twice[1]


def test_what_was_said_guides_what_stays(loaded: Loaded) -> None:
    with foveate.stream(loaded("llava"), "hermes(keep=40)") as stream:
        texts = list[str]()
        ids = stream._ids
        stream._ids = lambda text: texts.append(text) or ids(text)  # type: ignore[func-returns-value, assignment, method-assign]
        for picture in pictures(4):
            stream.push(picture)
        assert texts
        assert not any("You were asked" in text for text in texts)
        stream.ask("who is there?", max_new_tokens=2)
        stream.push(pictures(1)[0])

    assert any("You were asked: who is there?" in text for text in texts)


def test_recipes_that_prune_pictures_make_chunks_shorter(loaded: Loaded) -> None:
    entries = {}
    for recipe in ("none", "divprune(keep=4)", "divprune(keep=4) + hermes(keep=12)", "stc(keep=4)"):
        with foveate.stream(loaded("llava"), recipe) as stream:
            for picture in pictures(4):
                stream.push(picture)
            entries[recipe] = stream.entries - stream._cache._prefix
            stream.ask("what is it?", max_new_tokens=2)

    assert entries["divprune(keep=4)"] == entries["stc(keep=4)"] < entries["none"]
    assert entries["divprune(keep=4) + hermes(keep=12)"] == 12


def test_arrays_tensors_and_files(loaded: Loaded, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4")
    shown = list(frames(str(film), 6))
    with foveate.stream(loaded("llava")) as stream:
        for _, picture in shown[:2]:
            stream.push(picture)
        stream.push(np.asarray(shown[2][1]))
        stream.push(torch.from_numpy(np.asarray(shown[3][1]).copy()))
        assert stream.frames == 4

    assert [round(6 * seconds) for seconds, _ in shown] == list(range(12))


def test_two_threads_two_streams(loaded: Loaded) -> None:
    model, answers = loaded("llava"), dict[int, str]()
    session_free = foveate.stream(model, "hermes(keep=40)")
    session_free.close()

    def watch(number: int) -> None:
        with foveate.stream(models[number], "hermes(keep=40)") as stream:
            for picture in pictures(5)[:: 1 if number % 2 else -1]:
                stream.push(picture)
            answers[number] = stream.ask("what is it?", max_new_tokens=4)

    models = [model, loaded("qwen2_5_vl")]
    alone = {}
    for number in range(2):
        watch(number)
        alone[number] = answers.pop(number)
    threads = [threading.Thread(target=watch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == alone


def test_a_chunk_that_fails_leaves_the_stream_as_it_was(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = loaded("qwen2_5_vl"), pictures(5)
    answers = []
    for fails in (False, True):
        with foveate.stream(model, "hermes(keep=40)") as stream:
            for number, picture in enumerate(shown):
                if fails and number == 3:
                    layer = stream.session.anatomy.layers[-1].mlp
                    with monkeypatch.context() as patch:
                        patch.setattr(layer, "forward", failing)
                        with pytest.raises(RuntimeError, match="power cut"):
                            stream.push(picture)
                stream.push(picture)
            answers.append((stream.entries, stream.frames, stream.ask("what is it?", max_new_tokens=4)))

    assert answers[0] == answers[1]


def failing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("power cut")


@pytest.fixture
def refused(loaded: Loaded) -> Iterator[Callable[[str, str], None]]:
    def check(family: str, recipe: str) -> None:
        model = loaded(family)
        foveate.stream(model, recipe)

    yield check
    for family in ("gemma3", "qwen3_5", "llava"):
        with foveate.attach(loaded(family).model, "none"):  # nothing is left half-attached
            pass


@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("gemma3", "none", "stream: decoder layer 0 of gemma3 has sliding attention"),
        ("qwen3_5", "none", "stream: decoder layer 0 of qwen3_5 has a recurrent state"),
        ("llava", "hermes(keep=0.5)", "hermes: keep=0.5: a stream has no length to take a share of; give a count"),
        ("llava", "mixkv(host='adakv')", "mixkv(keep=0.5, host='adakv') puts entries into a store"),
        ("llava", "kivi", "puts entries into a store"),
    ],
)
def test_what_cannot_go_on_for_ever_is_refused(
    family: str, recipe: str, said: str, refused: Callable[[str, str], None]
) -> None:
    with pytest.raises(FoveateError, match=said.replace("(", r"\(").replace(")", r"\)")):
        refused(family, recipe)


def test_bad_input_is_refused_by_name(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="chunk=0: must be 1 or more"):
        foveate.stream(loaded("llava"), chunk=0)
    with foveate.stream(loaded("llava")) as stream:
        with pytest.raises(FoveateError, match="ask: no frame has come yet"):
            stream.ask("what is it?")
        with pytest.raises(FoveateError, match=r"frame=ndarray of float64 \[4, 4, 3\]: must be a PIL image"):
            stream.push(np.zeros((4, 4, 3)))
        with pytest.raises(FoveateError, match=r"frame=str .*: must be a PIL image"):
            stream.push("cat.png")
    with pytest.raises(FoveateError, match="stream: is closed"):
        stream.push(pictures(1)[0])
    with pytest.raises(FoveateError, match="cannot be read"):
        next(frames(str(tmp_path / "none.mp4"), 1.0))
    with pytest.raises(FoveateError, match="fps=0: must be above 0"):
        next(frames("x", 0))
    with pytest.raises(FoveateError, match="such as camera:0"):
        next(frames("camera:front", 1))


def test_templates_that_number_pictures_are_refused() -> None:
    class Numbering:
        def apply_chat_template(self, turns: list[dict], **options: object) -> str:
            parts = turns[-1]["content"]
            return "".join(f"<{n}>" if part["type"] == "image" else part["text"] for n, part in enumerate(parts))

    with pytest.raises(FoveateError, match="does not put pictures one behind the other"):
        Words.of(Numbering())
