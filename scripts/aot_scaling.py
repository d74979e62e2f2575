"""How cost grows with the chips of a slice: the picture of aot_check.py --scaling, drawn from its JSON Lines."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(lines: list[dict[str, Any]], chip: Any, path: str) -> None:
    """lines: of one program, each with `chips` and `kind` (weak or strong). The time that a chip needs at least for its
    products, and for what it sends, both at the chip's public rates."""
    figure, (memory, traffic, times) = plt.subplots(1, 3, figsize=(13, 4))
    for kind, style in (("weak", "o-"), ("strong", "s--")):
        rows = sorted((row for row in lines if row["kind"] == kind and row["fits"]), key=lambda row: row["chips"])
        chips = [row["chips"] for row in rows]
        sent = [sum(row["sent"].values()) for row in rows]
        label = (
            f"{kind}: {rows[0]['batch'] // rows[0]['chips']} rows a chip"
            if kind == "weak"
            else f"{kind}: {rows[0]['batch']} rows"
        )
        memory.plot(chips, [row["total"] / 2**30 for row in rows], style, label=label)
        traffic.plot(chips, [s / 1e9 for s in sent], style, label=label)
        times.plot(
            chips, [row["flops"] / chip.flops * 1e3 for row in rows], style, color="tab:blue", label=f"products, {kind}"
        )
        times.plot(chips, [s / chip.link * 1e3 for s in sent], style, color="tab:red", label=f"links, {kind}")
    memory.axhline(chip.memory / 2**30, color="grey", linewidth=0.8)
    memory.set(title="memory of one chip", ylabel="GiB")
    traffic.set(title="sent by one chip in a step", ylabel="GB", ylim=(0, None))
    times.set(title="least time of a step", ylabel="ms", yscale="log")
    for axes in (memory, traffic, times):
        axes.set(xscale="log", xlabel=f"chips ({chip.name})")
        axes.set_xticks([4, 8, 16, 64, 256], ["4", "8", "16", "64", "256"])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
