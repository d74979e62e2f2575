"""How fast, against torch and TRL: the same weights, the same batches, the same work, on this machine.

    python scripts/benchmark.py --what sft,generate,ppo --model nano,gpt2 --compare torch,trl --out bench.json

Each side of a row is a process of its own (benchmark_jax.py; benchmark_torch.py or benchmark_loop.py), and only one works
at a time. First both show that they compute the same: losses, gradients, greedy tokens, PPO losses. What does not agree is
not timed, and the exit code is 1. Then they are timed in turn, A B A B, each warm before, and a row tells the medians and
how far the ratios of the pairs lie apart. Written: OUT, and the ratios as a picture beside it (.png).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_agree import Check
from benchmark_measure import STARTUP_ROW, ask_machine, measure, measure_scaling, measure_startup
from benchmark_report import (
    against_baseline,
    best_of,
    hardware,
    plot_ratios,
    plot_scaling,
    table_of,
)
from benchmark_rows import (
    HYPER_PPO,
    HYPER_SFT,
    QUICK_SHAPES,
    SHAPES,
    SIZES,
    TINY,
    make_rows,
)
from benchmark_sides import ROOT, BenchmarkError, Settings, write_inputs
from rich.console import Console

from therapy_jax import files
from therapy_jax.dialogue import DataError
from therapy_jax.locate import WeightsError
from therapy_jax.run import console, escape

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


def threads_here() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            asked = [name for name in text.split(",") if name]
            if not asked and known is not PEERS:
                raise argparse.ArgumentTypeError(f"names none; there are {', '.join(known)}")
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
        "--model", type=names(tuple(SIZES)), help="nano, gpt2; default: nano (of the ppo rows see --ppo_model)"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="of the rows, those whose name holds this")
    parser.add_argument("--compare", type=names(PEERS), default=list(PEERS), help="torch, trl")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON; a picture is written beside it")
    parser.add_argument("--repeats", type=int, help="pairs of runs; default: 5")
    parser.add_argument(
        "--seconds", type=float, help="about the least of a run: short steps are repeated; default: 0.5"
    )
    parser.add_argument("--threads", type=int, default=threads_here(), help="of each side")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="keep: " + " ".join(MALLOC))
    parser.add_argument("--torch_python", default=sys.executable, help="the Python that torch and trl are installed in")
    parser.add_argument("--ppo_model", type=names(tuple(SIZES)), help="models of the ppo rows; default: nano")
    parser.add_argument("--conversations", metavar="FORMAT:FILE", help="such as mesc:MESC.csv; default: the sample")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for the conversations; default: one trained on them")
    parser.add_argument("--sizes", choices=("tiny",), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=f"nano in small, against {BASELINE.relative_to(ROOT)}")
    parser.add_argument("--write_baseline", action="store_true", help="with --quick: keep these ratios instead")
    parser.add_argument("--scaling", action="store_true", help="ours alone, against batch and length")
    options = parser.parse_args(argv)
    defaults = {"repeats": 3, "seconds": 0.3} if options.quick else {"repeats": 5, "seconds": 0.5}
    for name, value in {**defaults, "model": ["nano"], "ppo_model": ["nano"]}.items():
        if options.quick and getattr(options, name) is not None:
            parser.error(f"--quick has its own --{name}; leave it out")
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.repeats < 1 or options.threads < 1 or not 0 <= options.seconds < math.inf:
        parser.error("--repeats and --threads must be above 0, --seconds 0 or above")
    here = threads_here()
    if options.threads > here or (options.threads < here and not hasattr(os, "sched_setaffinity")):
        parser.error(f"--threads {options.threads}: both sides can be held to {here} here, and not to that many")
    options.out = options.out.expanduser()
    if options.out.suffix != ".json" or not options.out.parent.is_dir():
        parser.error(f"--out {options.out} must be a .json file in a folder that is there")
    if options.write_baseline and (not options.quick or "agree" in (options.what or ())):
        parser.error("--write_baseline keeps the ratios that --quick measures; give both, without --what agree")
    if options.scaling and len(options.model) > 1:
        parser.error("--scaling is of one --model at a time")
    options.asked_whole = options.what is None and not options.only and set(options.compare) == set(PEERS)
    named = [work for work in options.what or () if work != "agree"]
    for work in named:
        if NEEDS.get(work) not in (None, *options.compare):
            parser.error(f"--what {work} is a comparison with {NEEDS[work]}; add it to --compare")
    options.timed = "agree" not in (options.what or ())
    if not options.timed and "startup" in named:
        parser.error("--what agree,startup: a start has nothing to agree with")
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
    settings = Settings(folder, options.torch_python, options.threads, options.repeats, options.seconds, dict(malloc))
    what, timed, models, ppo_models = options.what, options.timed, options.model, options.ppo_model
    sizes = {name: TINY[0] if options.sizes else SIZES[name] for name in dict.fromkeys([*models, *ppo_models])}
    shapes = {name: TINY[1] if options.sizes else QUICK_SHAPES if options.quick else SHAPES[name] for name in sizes}
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
    startup = timed and "startup" in what and options.only in STARTUP_ROW
    if what and not rows and not startup:
        raise BenchmarkError(f"no row's name holds --only {options.only}")

    scripts = list(dict.fromkeys(["benchmark_jax.py", *(row.script for row in rows)]))
    measured = timed and "benchmark_torch.py" in scripts
    workers, peak, streamed = ask_machine(settings, scripts, measured, tiny=bool(options.sizes))
    theirs = workers.get("benchmark_torch.py", {}).get("versions", {})
    if any(row.work == "ppo" for row in rows) and "trl" not in theirs:
        raise BenchmarkError(
            "trl is not installed in the peers' Python; install the extra `bench`, or leave out --compare trl"
        )
    said = {
        "threads": settings.threads,
        "malloc": settings.malloc or "default",
        "repeats": options.repeats,
        "workers": workers,
    }
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
    if startup:
        try:
            results.append(measure_startup(settings))
        except BenchmarkError as error:
            results.append({"name": STARTUP_ROW, "sides": ["", ""], "state": f"failed: {error}"})
        write_report(options.out, report)
    points: list[dict[str, Any]] = []
    if options.scaling:
        report["scaling"] = points
        for point in measure_scaling(settings, sizes[models[0]], shapes[models[0]]):
            points.append(point)
            write_report(options.out, report)
        plot_scaling([p for p in points if "seconds" in p], options.out.with_suffix(".scaling.png"))
    if timed and results:
        Console(width=max(console.width, 150)).print(table_of(results, peak))  # a log has no width of its own
        for line in best_of(results):
            console.print(escape(line))
    write_report(options.out, report, picture=True)
    failed = [r for r in [*results, *points] if r["state"] not in ("timed", "agrees")]
    for r in failed:
        console.print(f"[bold red]{escape(r['name'])}[/]: {escape(r['state'])}")
    if options.write_baseline and failed:
        raise BenchmarkError(f"{BASELINE.relative_to(ROOT)} stays as it was: not every row was timed")
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
    on the machine slows some runs of either side, a change for the worse all of ours. False, too, where a kept row was not
    measured, though all were asked for. With --write_baseline keeps the ratios, and the old ones of rows not asked for."""
    now = {r["name"]: min(r["all_seconds"][1]) / min(r["all_seconds"][0]) for r in results if "ratio" in r}
    if options.write_baseline:
        old = (
            {}
            if options.asked_whole or not BASELINE.is_file()
            else json.loads(BASELINE.read_text(encoding="utf-8"))["ratios"]
        )
        where = {name: made_on[name] for name in ("cpu", "cores", "threads", "commit", "date")}
        kept = old | {name: round(ratio, 3) for name, ratio in now.items()}
        files.write_json(BASELINE, {"made_on": where, "ratios": kept})
        console.print(f"kept in {BASELINE.relative_to(ROOT)}")
        return True
    if not BASELINE.is_file():
        raise BenchmarkError(f"{BASELINE.relative_to(ROOT)} is not there; --quick --write_baseline makes it")
    kept_before = json.loads(BASELINE.read_text(encoding="utf-8"))["ratios"]
    missing = [name for name in kept_before if name not in now] if options.asked_whole else []
    for name in missing:
        console.print(f"[bold red]MISSING[/] {escape(name)}: kept, and not measured now")
    compared = against_baseline(now, kept_before)
    for name, ratio, kept, good in compared:
        before = "not kept before" if kept is None else f"kept {kept:.2f}, {ratio / kept:.0%} of it"
        said = "[green]ok[/]  " if good else "[bold red]SLOW[/]"
        console.print(f"{said} {escape(name)}: by the least times {ratio:.2f}; {before}")
    return all(good for *_, good in compared) and not missing


if __name__ == "__main__":
    sys.exit(main())
