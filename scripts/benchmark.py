"""How fast, against torch and TRL: the same weights, the same batches, the same work, on this machine.

    python scripts/benchmark.py --what sft,generate,ppo --model nano,gpt2 --compare torch,trl --out bench.json

Each side of a row is a process of its own (benchmark_jax.py; benchmark_torch.py or benchmark_loop.py), and only one works
at a time. First both show that they compute the same: losses, gradients, greedy tokens, PPO losses. What does not agree is
not timed, and the exit code is 1. Then they are timed in turn, A B A B, each once uncounted, and a row tells the medians and
how far the ratios of the pairs lie apart. Written: OUT, and the ratios as a picture beside it (.png).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_agree import Check, compare
from benchmark_report import (
    against_baseline,
    best_of,
    hardware,
    plot_ratios,
    plot_scaling,
    ratio_and_spread,
    show_checks,
    table_of,
)
from benchmark_rows import (
    HYPER_PPO,
    HYPER_SFT,
    QUICK_SHAPES,
    SHAPES,
    SIZES,
    TINY,
    Row,
    Shapes,
    Size,
    make_batch,
    make_rows,
)
from rich.console import Console

from therapy_jax import files, logs
from therapy_jax.dialogue import DataError
from therapy_jax.locate import WeightsError
from therapy_jax.run import console, escape

ROOT = Path(__file__).resolve().parent.parent
# Of configs/quickstart.yaml: how well the models do does not matter to a start, and the rest of the run never comes.
STARTUP = {"pretrain.epochs": 1, "sft.epochs": 1, "classifiers.epochs": 2, "ppo.iterations": 4}
BASELINE = ROOT / "tests" / "data" / "bench_baseline.json"
WORKS = ("sft", "conversations", "generate", "ppo", "rewards", "startup", "memory")
COMPARED = ("sft", "generate", "ppo", "rewards")  # by --quick, and by --what agree
PEERS = ("torch", "trl")
NEEDS = {
    "sft": "torch",
    "long": "torch",
    "conversations": "torch",
    "generate": "torch",
    "memory": "torch",
    "ppo": "trl",
}  # whom each work is compared with
# glibc's malloc hands freed memory back and faults it in again at the next step; with these it keeps it, in huge pages.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "99999999999",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class BenchmarkError(Exception):
    """What keeps the benchmark, or one row of it, from being run; one sentence."""


# ---- workers

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def start_worker(python: str, script: str, threads: int, environment: Mapping[str, str]) -> Iterator[Ask]:
    """A worker process for as long as the block lasts. Yields ask(question) -> answer; BenchmarkError where it ends
    instead, with the last line that it said."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        command = [python, str(ROOT / "scripts" / script), "--threads", str(threads)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment)
            )
        except OSError as error:
            raise BenchmarkError(f"{python} cannot be started ({error.strerror})") from error
        assert process.stdin is not None and process.stdout is not None
        asking, answers = process.stdin, process.stdout

        def ask(question: dict[str, Any]) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                asking.write(json.dumps(question) + "\n")
                asking.flush()
            if line := answers.readline():
                return json.loads(line)
            process.wait()
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            raise BenchmarkError(f"{script}: {said[-1] if said else f'ended with code {process.returncode}'}")

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                asking.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            answers.close()


class Settings(NamedTuple):
    """What holds for the whole benchmark."""

    folder: Path  # models, batches and what the sides must agree on
    python: str  # of the peers
    threads: int
    repeats: int  # pairs
    seconds: float  # least time of one run: short steps are repeated until they fill it
    malloc: dict[str, str]

    def worker(self, script: str, row: str = "") -> contextlib.AbstractContextManager[Ask]:
        """A compilation cache of its own for each row: what compiling costs is what it costs the first time."""
        ours = script != "benchmark_torch.py"
        environment = {
            **{k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
            **self.malloc,
            "OMP_NUM_THREADS": str(self.threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU has to hold both sides
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor" / row.replace(" ", "_").replace("/", "_")),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if ours:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return start_worker(sys.executable if ours else self.python, script, self.threads, environment)


def write_inputs(settings: Settings, sizes: Mapping[str, Size], shapes: Mapping[str, Shapes]) -> None:
    """folder/MODEL, which both sides load, and folder/MODEL.WORK.npz, the batches."""
    for model, size in sizes.items():
        shape = shapes[model]
        positions = max(shape.sft[1], sum(shape.generate[1:]), sum(shape.ppo[1:3]), shape.memory[1], shape.long[1])
        config = {
            "vocab_size": size.vocabulary,
            "n_positions": max(1024, positions),
            "n_embd": size.width,
            "n_layer": size.layers,
            "n_head": size.heads,
            "eos_token_id": size.vocabulary - 1,
        }
        with settings.worker("benchmark_jax.py") as ask:
            ask({"do": "prepare", "work": "export", "folder": str(settings.folder / model), "sizes": config})
        for work in ("sft", "long", "memory", "generate", "ppo", "rewards"):
            arrays: dict[str, Any] = dict(make_batch(work, size, shape))
            np.savez(settings.folder / f"{model}.{work}.npz", **arrays)


# ---- measuring


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

        # One uncounted run each; then as many steps a run as fill the time, the same number on both sides. A run of
        # conversations is an epoch, minutes of it: the first call was one, with every shape compiled.
        times = 1
        if row.work != "conversations":
            warm = [ask({"do": "run", "times": 1})["seconds"] for ask in sides]
            times = max(1, math.ceil(settings.seconds / statistics.mean(warm)))
        seconds: list[list[float]] = [[], []]
        for _ in range(settings.repeats):
            for ask, taken in zip(sides, seconds, strict=True):
                taken.append(ask({"do": "run", "times": times})["seconds"] / times)
        peaks = [ask({"do": "memory"})["peak_bytes"] for ask in sides]

    medians = [statistics.median(taken) for taken in seconds]
    ratio = ratio_and_spread(*seconds)
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
        "peak_bytes": peaks,
        "first_call_seconds": [first["compile_seconds"], second["compile_seconds"]],
    }


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
                peak[dtype] = max(peak.get(dtype, 0.0), ask({"do": "multiply", "size": size, "dtype": dtype})["flops"])
            if script == "benchmark_jax.py":
                streamed = ask({"do": "stream", "size": 2**22 if tiny else 2**29})["bytes"]
    return Machine(workers, peak, streamed)


def measure_startup(settings: Settings) -> dict[str, Any]:
    """scripts/train_ppo.py from its launch until metrics.jsonl has the line of iteration 1: with an empty compilation
    cache, then again with the cache that this start has filled. What both need (the SFT model, the classifiers) is made
    before. A process a start; the ratio is empty / filled."""
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
        "name": "startup, train_ppo.py until iteration 1",
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


# ---- scaling

SCALED = ("sft", "generate", "ppo")
FACTORS = (0.5, 1, 2, 4)


def measure_scaling(settings: Settings, size: Size, shape: Shapes) -> list[dict[str, Any]]:
    """Our seconds and peak memory of an SFT step, a generation and a PPO iteration, against batch and against length:
    FACTORS times the usual one. A process a point, so that no point inherits another's memory."""
    points = []
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
                with settings.worker("benchmark_jax.py") as ask:
                    prepare(row, ask, settings, "ours", check=False, timed=True, **ours)
                    seconds = [ask({"do": "run", "times": 1})["seconds"] for _ in range(1 + settings.repeats)][1:]
                    peak = ask({"do": "memory"})["peak_bytes"]
                shutil.rmtree(settings.folder / model)
                point = {"work": work, "axis": axis, "value": grown[i], "shape": grown}
                points.append({**point, "seconds": statistics.median(seconds), "peak_bytes": peak})
                memory = "" if peak is None else f", {peak / 2**20:,.0f} MiB"
                console.print(f"scaling {work}, {axis} {grown[i]}: {points[-1]['seconds']:.4g} s{memory}")
    return points


# ---- the command


def threads_here() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            asked = [name for name in text.split(",") if name]
            if unknown := [name for name in asked if name not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
            return asked

        return read

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    everything = ",".join(WORKS)
    parser.add_argument(
        "--what",
        type=names((*WORKS, "long", "agree")),
        help=f"of {everything}; agree: the checks alone; long: an SFT step that fills a GPU",
    )
    parser.add_argument(
        "--model", type=names(tuple(SIZES)), default=["nano"], help="nano, gpt2 (ppo: nano alone by default)"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="of the rows, those whose name holds this")
    parser.add_argument("--compare", type=names(PEERS), default=list(PEERS), help="torch, trl")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON; a picture is written beside it")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--seconds", type=float, default=0.5, help="least seconds of a run")
    parser.add_argument("--threads", type=int, default=threads_here(), help="of each side")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="keep: " + " ".join(MALLOC))
    parser.add_argument("--torch_python", default=sys.executable, help="the Python that torch and trl are installed in")
    parser.add_argument("--ppo_model", type=names(tuple(SIZES)), default=["nano"], help="models of the ppo rows")
    parser.add_argument("--conversations", metavar="FORMAT:FILE", help="such as mesc:MESC.csv; default: the sample")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for the conversations; default: one trained on them")
    parser.add_argument("--sizes", choices=("tiny",), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=f"nano in small, against {BASELINE.relative_to(ROOT)}")
    parser.add_argument("--write_baseline", action="store_true", help="with --quick: keep these ratios instead")
    parser.add_argument("--scaling", action="store_true", help="ours alone, against batch and length")
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.threads < 1 or options.seconds < 0:
        parser.error("--repeats and --threads must be above 0, --seconds 0 or above")
    if options.write_baseline and not options.quick:
        parser.error("--write_baseline keeps what --quick measures; give both")
    named = [work for work in options.what or () if work != "agree"]
    for work in named:
        if NEEDS.get(work) not in (None, *options.compare):
            parser.error(f"--what {work} is a comparison with {NEEDS[work]}; add it to --compare")
    options.timed = "agree" not in (options.what or ())
    if not named:  # all that there is, or all that can be compared
        everything = options.timed and not options.quick
        named = [
            work for work in WORKS if (everything or work in COMPARED) and NEEDS.get(work) in (None, *options.compare)
        ]
    options.what = [] if options.scaling and options.what is None else named
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
            return benchmark(options, Path(folder))
    except (BenchmarkError, DataError, WeightsError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        return 2
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def benchmark(options: argparse.Namespace, folder: Path) -> int:
    malloc = MALLOC if options.malloc == "keep" and sys.platform == "linux" else {}
    repeats, seconds = (3, 0.3) if options.quick else (options.repeats, options.seconds)
    settings = Settings(folder, options.torch_python, options.threads, repeats, seconds, dict(malloc))
    what, timed = options.what, options.timed
    models = ["nano"] if options.quick else options.model
    sizes = {name: TINY[0] if options.sizes else SIZES[name] for name in dict.fromkeys([*models, *options.ppo_model])}
    shapes = {name: TINY[1] if options.sizes else QUICK_SHAPES if options.quick else SHAPES[name] for name in sizes}
    ppo_models = ["nano"] if options.quick else options.ppo_model
    counts: dict[str, Any] = {}
    if "conversations" in what:
        import benchmark_conversations  # imports jax

        for name in models:
            path, words = folder / f"{name}.conversations.npz", sizes[name].vocabulary
            counts[name] = benchmark_conversations.write(path, options.conversations, options.tokenizer, words)
    rows = [
        row
        for work in what
        for row in make_rows([work], ppo_models if work == "ppo" else models, sizes, shapes, options.quick, counts)
        if options.only in row.name
    ]

    scripts = list(dict.fromkeys(["benchmark_jax.py", *(row.script for row in rows)]))
    measured = timed and "benchmark_torch.py" in scripts
    workers, peak, streamed = ask_machine(settings, scripts, measured, tiny=bool(options.sizes))
    theirs = workers.get("benchmark_torch.py", {}).get("versions", {})
    if any(row.work == "ppo" for row in rows) and "trl" not in theirs:
        raise BenchmarkError(
            "trl is not installed in the peers' Python; install the extra `bench`, or leave out --compare trl"
        )
    said = {"threads": settings.threads, "malloc": settings.malloc or "default", "repeats": repeats, "workers": workers}
    report: dict[str, Any] = {"hardware": hardware() | said, "hyper": {"sft": HYPER_SFT, "ppo": HYPER_PPO}}
    console.print(
        f"{report['hardware']['cpu']}: {settings.threads} threads a side; malloc: {settings.malloc or 'default'}"
    )
    for script, said in workers.items():
        console.print(f"{script}: {said['device']}, {', '.join(f'{k} {v}' for k, v in said['versions'].items())}")

    if streamed is not None:
        told = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in peak.items())
        console.print(f"peak of a square product: {told}; memory read and written: {streamed / 1e9:,.1f} GB/s")
    write_inputs(settings, {row.model: sizes[row.model] for row in rows}, shapes)

    known: dict[str, list[Check]] = {}
    results = []
    report |= {"peak": peak, "bytes_per_second": streamed, "rows": results}
    for row in rows:
        try:
            results.append(measure(row, settings, known, timed))
        except BenchmarkError as error:
            results.append(
                {"name": row.name, "work": row.work, "sides": [row.ours, row.peer], "state": f"failed: {error}"}
            )
        last = results[-1]
        ratio = f"; ratio {last['ratio']:.2f}" if "ratio" in last else ""
        console.print(f"{escape(row.name)}: {escape(last['state'])}{ratio}")
        write_report(options.out, report)  # a long benchmark that is stopped keeps what it has
    if timed and "startup" in what:
        results.append(measure_startup(settings))
    if options.scaling:
        report["scaling"] = measure_scaling(settings, sizes[models[0]], shapes[models[0]])
        plot_scaling(report["scaling"], options.out.with_suffix(".scaling.png"))
    if timed and results:
        Console(width=max(console.width, 150)).print(table_of(results, peak))  # a log has no width of its own
        for line in best_of(results):
            console.print(escape(line))
    write_report(options.out, report, picture=True)
    failed = [r for r in results if r["state"] not in ("timed", "agrees")]
    for r in failed:
        console.print(f"[bold red]{escape(r['name'])}[/]: {escape(r['state'])}")
    good = judge_quick(options, results, report["hardware"]) if options.quick and timed else True
    return 0 if good and not failed else 1


def write_report(path: Path, report: Mapping[str, Any], picture: bool = False) -> None:
    try:
        files.write_json(path, report)
        if picture:
            plot_ratios(report["rows"], path.with_suffix(".png"))
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written ({error.strerror})") from error


def judge_quick(options: argparse.Namespace, results: Sequence[Mapping[str, Any]], made_on: Mapping[str, Any]) -> bool:
    """Prints each ratio beside the kept one; False where even that of the least times has fallen below 60 % of it: a neighbour
    on the machine slows some runs of either side, a change for the worse all of ours. With --write_baseline keeps the ratios."""
    now = {r["name"]: min(r["all_seconds"][1]) / min(r["all_seconds"][0]) for r in results if "ratio" in r}
    if options.write_baseline:
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        where = {name: made_on[name] for name in ("cpu", "cores", "threads", "commit", "date")}
        kept = {name: round(ratio, 3) for name, ratio in now.items()}
        files.write_json(BASELINE, {"made_on": where, "ratios": kept})
        console.print(f"kept in {BASELINE.relative_to(ROOT)}")
        return True
    if not BASELINE.is_file():
        console.print(f"{BASELINE.relative_to(ROOT)} is not there yet; --quick --write_baseline makes it")
        return True
    compared = against_baseline(now, json.loads(BASELINE.read_text(encoding="utf-8"))["ratios"])
    for name, ratio, kept, good in compared:
        before = "not kept before" if kept is None else f"kept {kept:.2f}, {ratio / kept:.0%} of it"
        said = "[green]ok[/]  " if good else "[bold red]SLOW[/]"
        console.print(f"{said} {escape(name)}: by the least times {ratio:.2f}; {before}")
    return all(good for *_, good in compared)


if __name__ == "__main__":
    sys.exit(main())
