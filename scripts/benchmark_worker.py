"""What the workers of scripts/benchmark.py share: the conversation with the driver, the clock, memory, threads.

Standard library and numpy alone, so that a worker can live in any Python. One JSON object a line, on stdin and stdout:

    {"do": "hello"}                       -> versions, device, threads
    {"do": "multiply", "shape", "dtype"}  -> {"flops": FLOP/s of a product, shape = rows, inner, out; the best of several}
    {"do": "stream", "size"}              -> {"bytes": read and written a second by adding to that many bytes}
    {"do": "prepare", "work", ...}        -> {"compile_seconds", "agree": path of the .npz that the other side must equal}
    {"do": "run", "times": n}             -> {"seconds": of n runs}
    {"do": "memory"}                      -> {"seconds", "peak_bytes": of one run; on a GPU of the process so far}
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Json = dict[str, Any]
Follow = Callable[[Iterator[None]], None]  # does the work once for each turn that the iterator yields


class Side(NamedTuple):
    """What a worker can do. Everything else here is the same for all of them."""

    hello: Callable[[], Json]
    multiply: Callable[[tuple[int, int, int], str], float] | None  # (rows, inner, out), dtype -> FLOP/s
    stream: Callable[[int], float] | None  # bytes -> bytes/s
    works: Mapping[str, Callable[[Json], tuple[Json, Follow]]]  # name -> task -> (answer, what to do in each turn)
    synchronise: Callable[[], None]  # returns once the device has nothing left to do
    reset_peak: Callable[[], None]
    peak_bytes: Callable[[], int | None]


def threads_asked() -> int:
    """`--threads N`, the worker's only argument, obeyed before any library makes its pools: N processors are left to this
    process, so that a library which takes all it can see takes N as well."""
    count = int(sys.argv[sys.argv.index("--threads") + 1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    return count


def serve(make_side: Callable[[], Side]) -> None:
    """Answer the driver until it closes stdin. stdout is the driver's alone: what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(reply: Json) -> None:
        print(json.dumps(reply), file=out, flush=True)

    side = make_side()
    questions = (json.loads(line) for line in sys.stdin)
    for question in questions:
        if question["do"] == "hello":
            answer(side.hello())
        elif question["do"] == "multiply":
            assert side.multiply is not None
            answer({"flops": side.multiply(question["shape"], question["dtype"])})
        elif question["do"] == "stream":
            assert side.stream is not None
            answer({"bytes": side.stream(question["size"])})
        else:
            reply, follow = side.works[question["work"]](question)
            answer(reply)
            follow(turns(questions, answer, side))  # from here on the driver only asks for runs


def turns(questions: Iterator[Json], answer: Callable[[Json], None], side: Side) -> Iterator[None]:
    """Yields once for each run that the driver asks for, and times what happens until the next one is wanted. A generator,
    because a trainer whose loop is not ours can be stopped in it as well: see `benchmark_torch.ppo`."""
    for question in questions:
        measured = question["do"] == "memory"
        if measured:
            side.reset_peak()
        side.synchronise()
        began = time.perf_counter()
        for _ in range(question.get("times", 1)):
            yield
        side.synchronise()
        reply: Json = {"seconds": time.perf_counter() - began}
        if measured:
            reply["peak_bytes"] = side.peak_bytes()
        answer(reply)


def each(step: Callable[[], Any]) -> Follow:
    """The ordinary way to follow: one call a turn."""

    def follow(all_turns: Iterator[None]) -> None:
        for _ in all_turns:
            step()

    return follow


def best_rate(work: float, step: Callable[[], Any], repeats: int = 5) -> float:
    """`work` per second in the fastest of several synchronised calls, after one that does not count."""
    step()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return work / min(seconds)


def reset_peak() -> None:
    """Forget the process's peak memory so far (Linux). What malloc keeps goes back first, else the peak would be that of
    the agreement check before, and not of the run."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Peak resident memory since `reset_peak`, in bytes; None where there is no /proc."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def load(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def save(path: str, arrays: Mapping[str, Any]) -> None:
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})  # pyright: ignore[reportArgumentType]
