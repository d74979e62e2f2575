"""What scripts/benchmark.py says in the end: ratios, the table, the pictures, the machine, and the ratios of an earlier day."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_agree import Check
from rich.table import Table

from therapy_jax import logs
from therapy_jax.run import console, escape

KEPT_SHARE = 0.6  # of the kept ratio; --quick fails below it. Two cores shared with others are that noisy


def ratio_and_spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """-> (median, smallest, largest) of theirs / ours over the pairs; above 1 we are faster, or smaller."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def against_baseline(
    now: Mapping[str, float], kept: Mapping[str, float]
) -> list[tuple[str, float, float | None, bool]]:
    """-> (row, ratio now, ratio kept or None, good enough). Only ratios are compared, never seconds: those are the
    machine's. A row that was not kept before cannot fail."""
    return [(name, now[name], kept.get(name), now[name] >= KEPT_SHARE * kept.get(name, 0.0)) for name in now]


def show_checks(checks: Sequence[Check]) -> None:
    for c in checks:
        said = "[green]agrees[/]" if c.agrees else "[bold red]DISAGREES[/]"
        console.print(f"{said}  {escape(c.row)}: {c.quantity}, gap {c.gap:.2g}, tolerance {c.tolerance:.2g}")


def best_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the same work was timed in several precisions and manners: the fastest of each side, in a sentence."""
    lines = []
    for work in dict.fromkeys(r["name"].split(",")[0] for r in results if r.get("work") == "sft" and "ratio" in r):
        rows = [r for r in results if r["name"].split(",")[0] == work and r.get("measure") == "seconds"]
        taken: tuple[dict[str, list[float]], dict[str, list[float]]] = {}, {}
        for r in rows:
            for side, label, seconds in zip(taken, r["sides"], r["seconds"], strict=True):
                side.setdefault(label, []).append(seconds)  # one manner may have been timed in several rows
        best = [min((statistics.median(found), label) for label, found in side.items()) for side in taken if side]
        ours, theirs = best if len(rows) > 1 else (None, None)
        if ours and theirs:
            lines.append(
                f"{work}: fastest of ours {ours[1]}, {ours[0]:.4g} s; of theirs {theirs[1]}, {theirs[0]:.4g} s: "
                f"ratio {theirs[0] / ours[0]:.2f}"
            )
    return lines


def table_of(results: Sequence[Mapping[str, Any]], peak: Mapping[str, float]) -> Table:
    """Two lines a row: ours, theirs. products: seconds of the matrix products with parameters, timed alone; "of" beside a ratio: what
    it would be if ours took no more than those."""
    table = Table(title="ours / theirs; ratio above 1: ours is faster (memory: smaller)", show_lines=True)
    for name in "row,side,seconds,tokens/s,GFLOP/s,of peak,products,memory,first call,ratio".split(","):
        table.add_column(name, justify="left" if name in ("row", "side") else "right")
    for r in results:
        sides = "\n".join(map(escape, r["sides"]))
        if "ratio" not in r:
            table.add_row(escape(r["name"]), sides, escape(r["state"]))
            continue

        def lines(values: Any, form: Callable[[Any], str]) -> str:
            return "\n".join("" if value is None else form(value) for value in values or ())

        rate, top = r.get("flops_per_second"), peak.get(r.get("dtype") or "", 0.0)
        low, high = r["spread"]
        limit = f" of {r['limit']:.2f}" if r.get("limit") else ""
        table.add_row(
            escape(r["name"]),
            sides,
            lines(r["seconds"], "{:.4g}".format),
            lines(r.get("tokens_per_second"), "{:,.0f}".format),
            lines(rate, lambda x: f"{x / 1e9:,.1f}"),
            lines([x / top for x in rate] if rate and top else None, "{:.0%}".format),
            lines(r.get("products_seconds"), "{:.4g}".format),
            lines(r.get("peak_bytes"), lambda x: f"{x / 2**20:,.0f} MiB"),
            lines(r.get("first_call_seconds"), "{:.1f} s".format),
            f"[bold]{r['ratio']:.2f}[/]{limit}\n{low:.2f}..{high:.2f}",
        )
    return table


def plot_ratios(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The ratio of each row, with the range over its pairs; the line at 1 is as fast as the peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [r for r in results if "ratio" in r][::-1]
    if not found:
        return
    figure, panel = plt.subplots(figsize=(10, 1 + 0.45 * len(found)), layout="constrained")
    ratios = [r["ratio"] for r in found]
    ranges = [[r["ratio"] - r["spread"][0] for r in found], [r["spread"][1] - r["ratio"] for r in found]]
    panel.barh([r["name"] for r in found], ratios, xerr=np.maximum(ranges, 0.0), color="tab:blue", alpha=0.8)
    panel.axvline(1.0, color="black", linewidth=1)
    panel.set(xscale="log", xlabel="theirs / ours (above 1: ours is faster, or smaller)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def hardware() -> dict[str, Any]:
    """What a figure means nothing without."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": logs.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def plot_scaling(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds and memory of each work over batch and over length, log-log, beside the line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    works = ("sft", "generate", "ppo")
    columns = [(axis, what) for axis in ("batch", "length") for what in ("seconds", "peak_bytes")]
    figure, panels = plt.subplots(len(works), len(columns), figsize=(14, 9), squeeze=False, layout="constrained")
    for line, work in zip(panels, works, strict=True):
        for panel, (axis, what) in zip(line, columns, strict=True):
            found = [(p["value"], p[what]) for p in points if p["work"] == work and p["axis"] == axis and p[what]]
            if not found:
                continue
            x, y = (np.asarray(values, float) for values in zip(*found, strict=True))
            y = y / 2**20 if what == "peak_bytes" else y
            panel.loglog(x, y, "o-", label="measured")
            panel.loglog(x, y[0] * x / x[0], "--", color="grey", label="ideal: in proportion")
            panel.set(xlabel=axis, ylabel="peak memory, MiB" if what == "peak_bytes" else "seconds", title=work)
            panel.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            panel.minorticks_off()
    panels[0][0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
