"""What is measured: a row's two sides in turn, the machine at its best, a start with and without a compilation cache, and how our own
time and memory grow."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from benchmark_agree import Check, compare
from benchmark_report import ratio_and_spread, show_checks
from benchmark_rows import Row, Shapes, Size, make_rows
from benchmark_sides import ROOT, Ask, BenchmarkError, Settings, write_inputs

from therapy_jax import logs
from therapy_jax.run import console

# Of configs/quickstart.yaml: how well the models do does not matter to a start, and the rest of the run never comes.
STARTUP = {"pretrain.epochs": 1, "sft.epochs": 1, "classifiers.epochs": 2, "ppo.iterations": 4}
SCALED = ("sft", "generate", "ppo")
FACTORS = (0.5, 1, 2, 4)
STARTUP_ROW = "startup, train_ppo.py until iteration 1"


def prepare(
    row: Row, ask: Ask, settings: Settings, side: str, *, check: bool, timed: bool, **more: Any
) -> dict[str, Any]:
    task = {
        "do": "prepare",
        "work": row.work,
        "check": check,
        "timed": timed,
        **row.task,
        **more,
        "folder": str(settings.folder / row.model),
        "batch": str(settings.folder / f"{row.model}.{row.task['batch']}.npz"),
        "agree": str(settings.folder / f"agree.{side}.npz"),
        "ours": str(settings.folder / "agree.ours.npz"),
    }
    return ask(task)


def measure(row: Row, settings: Settings, known: dict[str, list[Check]], timed: bool) -> dict[str, Any]:
    """Both sides of a row: prepared one after the other, compared, and if they agree timed in turn -> what the JSON keeps.
    `known`: the checks made so far, by Row.check."""
    check = row.check not in known
    result: dict[str, Any] = {
        "name": row.name, "work": row.work, "model": row.model, "sides": [row.ours, row.peer], "state": "timed",
    }  # fmt: skip
    if check and timed and row.measure == "peak_bytes":
        # What the check takes must not count, and a GPU's peak cannot be reset: the check has processes of its own.
        result |= measure(row, settings, known, timed=False)
        if result["state"] != "agrees":
            return result
        result["state"], check = "timed", False
    with settings.worker("benchmark_jax.py", row.name) as ours, settings.worker(row.script, row.name) as theirs:
        sides = (ours, theirs)
        first = prepare(row, ours, settings, "ours", check=check, timed=timed, **row.ours_task)
        second = prepare(row, theirs, settings, "peer", check=check, timed=timed, **row.peer_task)
        if check:
            with (
                np.load(settings.folder / "agree.ours.npz", allow_pickle=False) as a,
                np.load(settings.folder / "agree.peer.npz", allow_pickle=False) as b,
            ):
                known[row.check] = compare(row.name, row.work, row.task.get("dtype", "float32"), a, b)
                if row.work == "ppo":  # of the two iterations that were compared
                    result["logged"] = {n: [a[n].tolist(), b[n].tolist()] for n in ("score", "kl", "entropy")}
            show_checks(known[row.check])
        result["agreement"] = [c._asdict() for c in known[row.check]]
        if not all(c.agrees for c in known[row.check]):
            return result | {"state": "not timed: the two sides do not agree"}
        if not timed:
            return result | {"state": "agrees"}

        # Uncounted runs until each side is warm; then as many steps a run as fill the time. A run of conversations is an
        # epoch, minutes of it: the first call was one, with every shape compiled.
        times = [1, 1]
        if row.work != "conversations":
            times = [max(1, math.ceil(settings.seconds / warm_up(ask))) for ask in sides]
        seconds: list[list[float]] = [[], []]
        for _ in range(settings.repeats):
            for ask, taken, n in zip(sides, seconds, times, strict=True):
                taken.append(ask({"do": "run", "times": n})["seconds"] / n)
        peaks = [ask({"do": "memory"})["peak_bytes"] for ask in sides]

    medians = [statistics.median(taken) for taken in seconds]
    ratio = ratio_and_spread(*seconds)
    alone = (
        [time_products(row, settings, script) for script in ("benchmark_jax.py", row.script)] if row.products else None
    )
    if row.measure == "peak_bytes":
        if None in peaks:
            return result | {"state": "not measured: this system does not tell peak memory"}
        ratio = (peaks[1] / peaks[0],) * 3
    return result | {
        "measure": row.measure,
        "seconds": medians,
        "all_seconds": seconds,
        "steps_a_run": times,
        "ratio": ratio[0],
        "spread": ratio[1:],
        "tokens_per_second": [row.useful / s for s in medians] if row.useful else None,
        "flops": row.flops,
        "flops_per_second": [f / s for f, s in zip(row.flops, medians, strict=True)] if row.useful else None,
        "dtype": row.task.get("dtype"),
        "products_seconds": alone,
        "limit": medians[1] / alone[0] if alone else None,
        "peak_bytes": peaks,
        "first_call_seconds": [first["compile_seconds"], second["compile_seconds"]],
    }


def time_products(row: Row, settings: Settings, script: str) -> float:
    """Seconds of the row's products with parameters, each timed alone by this side's library (best of 5), and nothing else: a
    program of that library cannot take less. Attention's products, all passes over arrays and the optimizer come on top."""
    dtype, shapes = row.task["dtype"], dict.fromkeys(p[:3] for p in row.products)
    with settings.worker(script) as ask:
        rate = {shape: ask({"do": "multiply", "shape": shape, "dtype": dtype})["flops"] for shape in shapes}
    return sum(p.flops / rate[p[:3]] for p in row.products)


def warm_up(ask: Ask) -> float:
    """Runs until one is no more than a tenth faster than the one before it, ten at most -> the seconds of that one."""
    last = ask({"do": "run", "times": 1})["seconds"]
    for _ in range(9):
        before, last = last, ask({"do": "run", "times": 1})["seconds"]
        if last > 0.9 * before:
            break
    return last


class Machine(NamedTuple):
    """What the workers say of themselves, and what the machine can do at best."""

    workers: dict[str, Any]  # by script
    peak: dict[str, float]  # by dtype: FLOP/s of a large square product, the higher of jax's and torch's, each alone
    bytes_per_second: float | None  # read and written


def ask_machine(settings: Settings, scripts: Sequence[str], measured: bool, tiny: bool) -> Machine:
    workers: dict[str, Any] = {}
    peak: dict[str, float] = {}
    streamed = None
    for script in scripts:
        with settings.worker(script) as ask:
            workers[script] = ask({"do": "hello"})
            if not measured or script == "benchmark_loop.py":
                continue
            size = 256 if tiny else 2048 if workers[script]["device"] == "cpu" else 8192
            for dtype in ("float32", "bfloat16"):
                peak[dtype] = max(
                    peak.get(dtype, 0.0), ask({"do": "multiply", "shape": [size] * 3, "dtype": dtype})["flops"]
                )
            if script == "benchmark_jax.py":
                streamed = ask({"do": "stream", "size": 2**22 if tiny else 2**29})["bytes"]
    return Machine(workers, peak, streamed)


def measure_startup(settings: Settings) -> dict[str, Any]:
    """scripts/train_ppo.py from its launch until metrics.jsonl has the line of iteration 1: with an empty compilation
    cache, then again with the cache that this start has filled. What both need (the SFT model, the classifiers) is made
    before. A process a start, as a user starts it: --threads and --malloc do not hold here. The ratio is empty / filled."""
    run_dir = settings.folder / "startup"
    log = run_dir / "metrics.jsonl"
    flags = [part for name, value in STARTUP.items() for part in (f"--{name}", str(value))]
    flags += ["--run_dir", str(run_dir)]

    def launch(script: str, cache: str) -> subprocess.Popen:
        command = [sys.executable, f"scripts/{script}.py", "--config", "configs/quickstart.yaml", *flags]
        command += ["--compilation_cache", str(settings.folder / cache)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def seconds_to_first_iteration(cache: str) -> float:
        shutil.rmtree(run_dir / "ppo", ignore_errors=True)
        logs.take_up(run_dir, "ppo", -1)
        began = time.perf_counter()
        process = launch("train_ppo", cache)
        try:
            while not any((line["stage"], line["step"]) == ("ppo", 1) for line in logs.read_log(log)):
                if process.poll() is not None:
                    raise BenchmarkError(
                        f"train_ppo.py ended with code {process.returncode} before its first iteration"
                    )
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()

    if launch("train_sft", "cache.before").wait() != 0:
        raise BenchmarkError("train_sft.py failed, so there is no model that PPO could start from")
    seconds_to_first_iteration("cache.before")  # trains the classifiers
    pairs = [
        (seconds_to_first_iteration(f"cache.{i}"), seconds_to_first_iteration(f"cache.{i}"))
        for i in range(settings.repeats)
    ]
    empty, filled = ([pair[i] for pair in pairs] for i in (0, 1))
    ratio, *spread = ratio_and_spread(filled, empty)
    return {
        "name": STARTUP_ROW,
        "model": "quickstart",
        "sides": ["filled cache", "empty cache"],
        "state": "timed",
        "measure": "seconds",
        "agreement": [],
        "seconds": [statistics.median(filled), statistics.median(empty)],
        "all_seconds": [filled, empty],
        "ratio": ratio,
        "spread": spread,
    }


def measure_scaling(settings: Settings, size: Size, shape: Shapes) -> Iterator[dict[str, Any]]:
    """Our seconds and peak memory of an SFT step, a generation and a PPO iteration, against batch and against length:
    FACTORS times the usual one. A process a point, so that none inherits another's memory, or loses the others by taking
    too much of it."""
    for work in SCALED:
        for axis in ("batch", "length"):
            for factor in FACTORS:
                grown = list(getattr(shape, work))
                i = 0 if axis == "batch" else (1 if work == "sft" else 2)  # of a reply: its length
                grown[i] = int(grown[i] * factor)
                scaled = shape._replace(**{work: tuple(grown)})
                model = f"scaling.{work}.{axis}.{factor}"
                write_inputs(settings, {model: size}, {model: scaled})
                rows = make_rows([work], [model], {model: size}, {model: scaled}, quick=True)
                row = rows[0]
                ours = {**row.ours_task, **({"value_head": "shared"} if work == "ppo" else {})}
                name = f"scaling {work}, {axis} {grown[i]}"
                point = {"name": name, "work": work, "axis": axis, "value": grown[i], "shape": grown, "state": "timed"}
                try:
                    with settings.worker("benchmark_jax.py") as ask:
                        prepare(row, ask, settings, "ours", check=False, timed=True, **ours)
                        warm_up(ask)
                        seconds = [ask({"do": "run", "times": 1})["seconds"] for _ in range(settings.repeats)]
                        peak = ask({"do": "memory"})["peak_bytes"]
                    point |= {"seconds": statistics.median(seconds), "peak_bytes": peak}
                    memory = "" if peak is None else f", {peak / 2**20:,.0f} MiB"
                    console.print(f"{name}: {point['seconds']:.4g} s{memory}")
                except BenchmarkError as error:
                    point["state"] = f"failed: {error}"
                shutil.rmtree(settings.folder / model)
                yield point
