"""Signals: who is stopped, and whether the others know."""

import os
import signal

import pytest

from therapy_jax import processes, stopping


@pytest.fixture
def signals(monkeypatch):
    """Answered as in a run; nobody has sent one yet."""
    monkeypatch.setattr(stopping, "_asked", None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopping.take_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_outside_a_loop_a_signal_stops_this_process_alone(signals):
    with pytest.raises(stopping.StoppedAlone, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_loop_did_not_ask_about_stops_all_processes_behind_it(signals, monkeypatch):
    """The signal went to another process, or to this one: the same question is put to all."""
    monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
    asked = []
    monkeypatch.setattr(processes, "in_any", lambda flag: not asked.append(flag))
    for mine in (False, True):
        with pytest.raises(stopping.Stopped) as stop, stopping.deferred():
            if mine:
                os.kill(os.getpid(), signal.SIGTERM)
        assert not isinstance(stop.value, stopping.StoppedAlone)
        assert str(stop.value) == "stopped by " + ("SIGTERM" if mine else "a signal to another process")
    assert asked == [False, True]
