"""Ctrl-C that falls into a finaliser, where Python drops what is raised."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from tests.bench.interrupting import Interrupting, heard

from foveate.bench.interrupts import Interrupts


@pytest.fixture(autouse=True)
def hearing() -> Iterator[None]:
    """Also where the tests run in the background of a shell, whose commands ignore Ctrl-C."""
    with heard():
        yield


def handler() -> object:
    return signal.getsignal(signal.SIGINT)


def within(*steps: Callable[[], object]) -> None:
    """Take steps while signals are noted."""
    with Interrupts():
        for step in steps:
            step()


def fail() -> None:
    raise ValueError("first")


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
    before, reached = handler(), list[int]()
    with pytest.raises(KeyboardInterrupt):
        within(Interrupting, lambda: reached.append(1))
    assert reached == [1]
    assert handler() is before


def test_an_error_is_not_replaced() -> None:
    before = handler()
    with pytest.raises(ValueError, match="first"):
        within(Interrupting, fail)
    assert handler() is before


def test_whoever_insists_is_heard_at_once() -> None:
    reached = list[int]()
    send = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        within(send, lambda: reached.append(1), send, lambda: reached.append(2))
    assert reached == [1]


def test_kill_is_heard_where_a_function_handles_it() -> None:
    before, reached = signal.signal(signal.SIGTERM, signal.default_int_handler), list[int]()
    try:
        with pytest.raises(KeyboardInterrupt):
            within(lambda: signal.raise_signal(signal.SIGTERM), lambda: reached.append(1))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Interrupts():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == [1]


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
