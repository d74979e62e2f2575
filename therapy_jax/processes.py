"""Several processes, each with its own devices, run the same script: what they must agree on, who writes files, and how one
that ends by itself takes the others with it.

With one process each function here is the identity.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # jax has no public word for the service that all processes are connected to
from jax.experimental import multihost_utils

TOLD = "therapy_jax/told"  # where the first process that ends by itself leaves its exit code and sentence
POLL = 1.0  # seconds between two looks at it

_said: str | None = None  # what this process has told, or would have
_leaving: int | None = None  # its exit code, once it ends without waiting for the others


def is_writer() -> bool:
    """True in the one process that writes logs, models and results (process 0). Checkpoints are written by all together."""
    return jax.process_index() == 0


def shared(value: Any) -> Any:
    """Something plain (as JSON holds it) as process 0 has it, in every process: they must not go different ways because one
    of them read a file while another was writing it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int64(text.size)))
    padded = np.resize(text, size) if is_writer() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def in_any(flag: bool) -> bool:
    """Whether it is so in any process; every process must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def is_loss_of_another(error: Exception) -> bool:
    """Whether this is how a collective fails when a process that takes part in it is gone."""
    signs = {
        jax.errors.JaxRuntimeError: "gloo|closed by peer|connection re|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED",
        ValueError: "gloo",  # where it fails while the program is being called, not while its result is awaited
    }
    found = [kind for kind, sign in signs.items() if isinstance(error, kind) and re.search(sign, str(error), re.I)]
    return bool(found) and jax.process_count() > 1


def wait_for_all(what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


# ------------------------------------------------------------------------------------------- one that ends by itself


def index() -> int:
    """Which process this is, also where JAX finds no device and could not be asked."""
    return distributed.global_state.process_id


def service() -> Any:
    """The client of the service that all processes are connected to; None where this one is alone."""
    state = distributed.global_state
    return state.client if (state.num_processes or 1) > 1 else None


@functools.cache  # a script may start several stages
def watch(hear: Callable[[int, str], object]) -> None:
    """From here on this process ends when another `tell`s why it does, whatever it is waiting for: hear(code, sentence), and
    out with that code. (That one is lost without a word is for jax to notice.)"""

    def listen() -> None:
        while (client := service()) is not None:  # None again once jax has let go of the others at an ordinary exit
            time.sleep(POLL)
            try:
                who, code, sentence = json.loads(client.key_value_try_get(TOLD))
            except jax.errors.JaxRuntimeError:  # nothing is told
                continue
            if who == index():
                return
            try:
                if sentence != _said:
                    hear(code, f"process {who}: {sentence}")
            finally:
                _leave(code)

    threading.Thread(target=listen, daemon=True).start()


def give_way() -> None:
    """Where another process has told why it ends, what went wrong here has followed from it: wait for `watch` to end this one."""
    if (client := service()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nothing is told
            client.key_value_try_get(TOLD)
            time.sleep(6 * POLL)


def tell(code: int, sentence: str) -> None:
    """End this process with this exit code, and the others with it: they would wait in a collective for one that does not
    come. Where another has told before, its word counts. Main thread only; returns where this process is alone."""
    global _said
    if (client := service()) is None:
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it is ending already
    _said = sentence
    try:
        client.key_value_set(TOLD, json.dumps([index(), code, sentence]))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):  # the service has gone: nobody can be told
            _leave(code)
    time.sleep(1.5 * POLL)  # all have looked by then; had another told before, this process has ended with its code
    _leave(code)


def _leave(code: int) -> None:
    """End without jax's own exit, which waits for the others."""
    global _leaving
    if index() == 0:  # the service is its own, and jax aborts whoever loses it: last
        time.sleep(3 * POLL)
    _leaving = code
    late = threading.Timer(POLL, os._exit, [code])  # whatever the cleaning up may wait for
    late.daemon = True
    late.start()
    atexit._run_exitfuncs()


@atexit.register  # runs after all that was registered later (open logs, temporary folders), and before jax's own
def _end() -> None:
    if _leaving is not None:
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_leaving)
