"""Real pictures from libraries."""

from __future__ import annotations

import sys

import pytest

from foveate.core.errors import FoveateError
from foveate.tasks import samples


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_samples_are_colour_pictures(name: str) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")

    picture = samples.sample(name)
    assert picture.mode == "RGB"
    assert min(picture.size) > 100


def test_an_unknown_sample_is_refused() -> None:
    with pytest.raises(FoveateError, match="sample='lena': must be one of astronaut, "):
        samples.sample("lena")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)

    with pytest.raises(FoveateError, match=r"pip install 'foveate\[samples\]'"):
        samples.sample("cat")
