"""Ctrl-C that falls into a finaliser, where Python drops what is raised."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest
from tests.bench.interrupting import Interrupting

from foveate.bench.interrupts import Interrupts


def handler() -> object:
    return signal.getsignal(signal.SIGINT)


def test_it_is_raised_where_it_is_asked_for() -> None:
    before, reached = handler(), False
    with Interrupts() as interrupts:
        Interrupting()
        reached = True
        with pytest.raises(KeyboardInterrupt):
            interrupts.deliver()
        interrupts.deliver()  # once is enough
    assert reached
    assert handler() is before


def test_the_end_of_the_block_asks_too() -> None:
    before = handler()
    with pytest.raises(KeyboardInterrupt), Interrupts():
        Interrupting()
    assert handler() is before


def test_an_error_is_not_replaced() -> None:
    before = handler()
    with pytest.raises(ValueError, match="first"), Interrupts():
        Interrupting()
        raise ValueError("first")
    assert handler() is before


def test_whoever_insists_is_heard_at_once() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert not reached


def test_a_handler_of_the_callers_own_gets_it() -> None:
    heard: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        with Interrupts() as interrupts:
            Interrupting()
            assert not heard
            interrupts.deliver()
            assert heard == [(signal.SIGINT, None)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(heard) == 1


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            assert handler() is signal.SIG_IGN
            Interrupting()
            interrupts.deliver()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with Interrupts():
            seen.append(handler())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler()]
