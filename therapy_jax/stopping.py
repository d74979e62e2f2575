"""SIGTERM (a machine that is taken away) and SIGINT (Ctrl-C): a training loop finishes its iteration, saves and ends.

Outside a loop, and while it evaluates what is saved already, there is nothing to save: the script ends at once. Python runs
its signal handlers between two bytecodes of the main thread, so a compiled program that is running must return first; a
second thread sees the signal the moment it comes. It says what will happen, and a second Ctrl-C ends the process there and
then. Files are never half written, so that even this loses no more than what came after the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from therapy_jax import processes

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again; the same command goes on
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it

_asked: str | None = None  # the signal that has come
_deferred = False  # whether a loop will look at it


class Stopped(BaseException):
    """The run ends here because a signal asked for it. Not an Exception: nobody should catch it by accident."""


class StoppedAlone(Stopped):
    """The same, without the other processes: they have not been asked."""


def listen(say: Callable[[str], object]) -> None:
    """From here on SIGTERM and SIGINT are answered as above; main thread only. `say` is called from another thread."""
    global _asked
    _asked = None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, say), daemon=True).start()
    take_signals()


def take_signals() -> None:
    """Answer both signals from here on (again, where jax.distributed.initialize has taken SIGTERM for itself)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handler)


def _handler(number: int, frame: object) -> None:
    global _asked
    _asked = signal.Signals(number).name
    if not _deferred:
        raise StoppedAlone(f"stopped by {_asked}")


def _watch(reader: int, say: Callable[[str], object]) -> None:
    seen = 0
    while number := os.read(reader, 1):
        number = number[0]
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        if seen and number == signal.SIGINT:
            say("stopped at once; the same command goes on from the last checkpoint")
            os._exit(INTERRUPTED)
        if not seen and _deferred:
            name = signal.Signals(number).name
            say(f"{name}: finishing this iteration, then saving (Ctrl-C stops at once, without saving)")
        seen += 1


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within: signals wait until the loop asks `wanted`. One that it did not come to ask about ends the run behind it, in all
    processes."""
    with _deferring(True):
        yield
    if not _deferred and (name := wanted()):
        raise Stopped(f"stopped by {name}")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within `deferred`, around what only reads a state that is saved: here a signal ends the run as it would outside.
    With several processes it waits still, since all must stop at the same step."""
    if jax.process_count() > 1:
        yield
        return
    with _deferring(False):
        if _asked:
            raise Stopped(f"stopped by {_asked}")
        yield


@contextlib.contextmanager
def _deferring(value: bool) -> Iterator[None]:
    global _deferred
    before, _deferred = _deferred, value
    try:
        yield
    finally:
        _deferred = before


def wanted(now: bool = True) -> str | None:
    """The signal that has come to any process, in every process at the same step; None where none has. Every process must
    ask. now=False: do not ask the others at this step (it makes the hosts wait for one another)."""
    if jax.process_count() == 1:
        return _asked
    return (_asked or "a signal to another process") if now and processes.in_any(_asked is not None) else None
