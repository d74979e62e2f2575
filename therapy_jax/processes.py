"""Several processes, each with its own devices, run the same script: what they must agree on, and who writes files.

With one process each function here is the identity.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
    signs = re.compile("gloo|closed by peer|connection re|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)
    return isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1 and bool(signs.search(str(error)))


def wait_for_all(what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
