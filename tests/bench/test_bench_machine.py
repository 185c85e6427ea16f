"""What is said of the machine, and what of its memory."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.bench import machine as machine_module
from foveate.bench.machine import device_name, machine
from foveate.bench.peak import Peak


def test_the_processor_has_the_name_that_people_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "processor\t: 0\nmodel name\t: Analytical Engine 3000\nflags\t: steam\n"
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: listed)

    assert machine()["processor"] == "Analytical Engine 3000"
    assert device_name("cpu").startswith("Analytical Engine 3000 (")


def test_a_system_that_lists_no_processor_names_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setattr(platform, "processor", lambda: "")

    assert machine()["processor"] == platform.machine()


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = machine_module.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_name", lambda number: f"Loom {number}")

    assert machine()["gpus"] == ["Loom 0"]
    assert device_name("cuda:0") == "Loom cuda:0"


def test_on_a_cpu_nobody_counts_the_peak() -> None:
    assert Peak(nn.Linear(2, 2)).bytes() is None


def test_the_peak_is_that_of_all_gpus_since_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    gpus = [torch.device("cuda", number) for number in range(2)]
    monkeypatch.setattr(nn.Module, "parameters", lambda self: [nn.Parameter(torch.ones(1), False), *map(On, gpus, gpus)])
    peaks = dict.fromkeys(gpus, 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: peaks.update({gpu: 3}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[gpu])

    assert Peak(parts).bytes() == 6


class On:
    """A parameter on a device."""

    def __init__(self, device: torch.device, *_: object) -> None:
        self.device = device
