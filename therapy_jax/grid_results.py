"""The finished cells of an experiment (grid.py) -> results.json, table.md and curves.png: means and spreads over the seeds, and
what differs by more than chance. Pure but for reading the folders and drawing the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from matplotlib.figure import Figure
from rich.table import Table

from therapy_jax import logs, metrics, plots
from therapy_jax.config import Config, ConfigError
from therapy_jax.files import flatten
from therapy_jax.grid import TRIVIAL, Cell
from therapy_jax.results_table import PAPER

COLUMNS = {  # results.json -> (what the table calls it, digits); a metric that no system has is left out
    "bleu": ("BLEU", 4),
    "rouge1": ("ROUGE-1", 4),
    "rouge2": ("ROUGE-2", 4),
    "rougeL": ("ROUGE-L", 4),
    "meteor": ("METEOR", 4),
    "meteor_exact_stem": ("METEOR (ex., stem)", 4),
    "emotion_stated_macro_f1": ("stated emotion F1", 3),
    "emotion_expressed_macro_f1": ("expressed emotion F1", 3),
    "distinct2": ("Distinct-2", 3),
    "commonest_share": ("commonest reply", 3),
    "perplexity": ("perplexity", 1),
    "reply_perplexity": ("reply perplexity", 1),
    "reply_words": ("words", 1),
}
PANELS = {  # metrics.jsonl -> title of a panel of curves.png
    "validation/reward": "reward (each cell's own)",
    "validation/rougeL": "ROUGE-L",
    "validation/meteor": "METEOR",
    "kl": "KL to SFT (nats a reply)",
    "validation/distinct2": "Distinct-2",
    "validation/reply_words": "words a reply",
}


def aggregate(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """One system's results of each seed -> {metric: {values, mean, sd}}; nested metrics as "terms.rouge_l".

    sd is the sample's (divided by n - 1), None for one seed. What is no number in each of the rows is left out.
    """
    flat = [flatten(row) for row in rows]
    numbers = [{k: float(v) for k, v in row.items() if type(v) in (int, float)} for row in flat]
    found = {key: [row[key] for row in numbers] for key in numbers[0] if all(key in row for row in numbers)}
    return {
        key: {"values": x, "mean": float(np.mean(x)), "sd": float(np.std(x, ddof=1)) if len(x) > 1 else None}
        for key, x in found.items()
    }


def summary(config: Config, cells: Sequence[Cell]) -> dict[str, Any]:
    """Finished cells -> results.json of the experiment."""
    of_name = {name: [c for c in cells if c.name == name] for name in (*config.grid.sft, *config.grid.ppo)}
    results = {c.folder: _read(c.folder / "results.json") for c in cells}
    trivial = results[cells[0].folder]
    spent = {name: [_seconds(c.folder) for c in part] for name, part in of_name.items()}
    root = cells[0].folder.parent.parent
    spent |= {name: [_seconds(root / name)] for name in ("pretrained", "language_model")}
    return {
        "data": trivial["data"],
        "signature": trivial["signature"],
        "emotion_majority_accuracy": trivial["emotion_majority_accuracy"],
        "seeds": sorted({c.config.seed for c in cells}),
        **_surroundings([root / "pretrained", root / "language_model", *(c.folder for c in cells)]),
        "hours": round(sum(sum(stages.values()) for part in spent.values() for stages in part) / 3600, 3),
        "seconds": {
            name: {k: [s[k] for s in part] for k in part[0] if all(k in s for s in part)}
            for name, part in spent.items()
        },
        "cells": {
            name: {
                "stage": part[0].system,
                "from": part[0].source,
                "overrides": (config.grid.ppo if part[0].source else config.grid.sft)[name],
                "metrics": aggregate([results[c.folder]["systems"][c.system] for c in part]),
            }
            for name, part in of_name.items()
        },
        "trivial": {
            **{name: aggregate([trivial["systems"][name]]) for name in TRIVIAL},
            "therapist": aggregate([trivial["therapist"]]),
        },
        "comparisons": compare(of_name, config),
        "paper": PAPER,
    }


def compare(of_name: Mapping[str, Sequence[Cell]], config: Config) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{PPO cell: {its SFT cell, retrieval, random: {metric: [mean difference, low, high]}}}, a 95 % interval by paired
    bootstrap over the exchanges. The score of an exchange is its mean over the seeds (of evaluate.draws, the first one of each)."""
    first = next(iter(of_name.values()))[0]
    asked = [(a["client"], a["therapist"]) for a in _read(first.folder / "answers.json")]

    def scores(cells: Sequence[Cell], system: str) -> list[dict[str, float]]:
        by_seed = []
        for cell in cells:
            answers = _read(cell.folder / "answers.json")
            if [(a["client"], a["therapist"]) for a in answers] != asked:
                raise ConfigError(f"{cell.folder / 'answers.json'}: not the exchanges that {first.name} answered")
            by_seed.append([metrics.item_scores(a[system], a["therapist"]) for a in answers])
        return [metrics.mean_scores(items) for items in zip(*by_seed, strict=True)]

    sources = {name: part[0].source for name, part in of_name.items() if part[0].source}
    known = {name: scores(of_name[name], of_name[name][0].system) for name in {*sources, *sources.values()} if name}
    known |= {name: scores([first], name) for name in ("retrieval", "random") if sources}
    bootstrap = config.evaluate.bootstrap, config.seed
    return {
        name: {
            other: {k: list(v) for k, v in metrics.paired_bootstrap(known[name], known[other], *bootstrap).items()}
            for other in (source, "retrieval", "random")
        }
        for name, source in sources.items()
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _environment(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "environment.json"
    return _read(path) if path.is_file() else {}


def _seconds(folder: Path) -> dict[str, float]:
    return {stage: noted["seconds"] for stage, noted in _environment(folder).items()}


def _surroundings(folders: Sequence[Path]) -> dict[str, Any]:
    """Commit, hardware and versions of all stages; where they were not the same throughout, all that there were."""
    stages = [noted for folder in folders for noted in _environment(folder).values()]

    def all_of(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))

    packages = [k for k in stages[0] if k not in ("commit", "finished", "seconds", "devices", "cores")]
    return {
        "commit": all_of([s["commit"] for s in stages]) or None,
        "hardware": all_of([f"{s['devices']}, {s['cores']} cores" for s in stages]),
        "versions": {name: all_of([s[name] for s in stages]) for name in packages},
    }


# ------------------------------------------------------------------------------------------ figures -> tables, curves


def main_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: the trivial systems, the cells, the paper; "mean ± sd", "mean" alone for one seed."""
    systems = {**results["trivial"], **{name: cell["metrics"] for name, cell in results["cells"].items()}}
    if results["data"]["name"] == "mesc":
        systems["paper"] = {key: {"mean": value, "sd": None} for key, value in results["paper"].items()}
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in systems.values())}

    def text(value: Mapping[str, Any] | None, digits: int) -> str:
        if value is None:
            return ""
        spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{spread}"

    rows = [[name, *(text(row.get(key), n) for key, (_, n) in columns.items())] for name, row in systems.items()]
    return [["", *(label for label, _ in columns.values())], *rows]


def comparison_rows(results: Mapping[str, Any], intervals: bool = True) -> list[list[str]]:
    """Head and rows: one difference "cell - other" a row, with its 95 % interval, or with a star where the interval
    leaves 0 out; no rows at all without a PPO cell."""

    def text(mean: float, low: float, high: float) -> str:
        return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" if intervals else f"{mean:+.4f}{' *'[low > 0 or high < 0]}"

    pairs = [
        (f"{cell} - {other}", values) for cell, part in results["comparisons"].items() for other, values in part.items()
    ]
    keys = list(pairs[0][1]) if pairs else []
    rows = [[pair, *(text(*values[key]) for key in keys)] for pair, values in pairs]
    return [["", *(COLUMNS[key][0] for key in keys)], *rows] if pairs else []


def markdown(results: Mapping[str, Any]) -> str:
    """table.md: both tables, and what made them."""
    data = results["data"]
    seeds = ", ".join(map(str, results["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())

    def table(rows: list[list[str]]) -> str:
        lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    differences = (
        "Differences of item scores, averaged over seeds; 95 % intervals of a paired bootstrap over exchanges:\n"
    )
    compared = comparison_rows(results)
    majority = results["emotion_majority_accuracy"]
    always = (
        "No emotion is annotated."
        if majority is None
        else (f"Emotion accuracy of always answering the majority: {majority:.4f}.")
    )
    return "\n".join(
        (
            f"{data['name']}, {data['split']} split, {data['n']} exchanges; mean ± sd over seeds {seeds}.\n",
            table(main_rows(results)),
            *((differences, table(compared)) if compared else ()),
            always,
            f"Signature: `{results['signature']}`.",
            f"Commit {results['commit'] or 'unknown'}; {results['hardware']}; {results['hours']:.2f} h; {versions}.\n",
        )
    )


def screen(rows: list[list[str]]) -> Table:
    """The same rows for a terminal, narrower: a mean stands over its sd."""
    out = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for i, label in enumerate(rows[0]):
        out.add_column(label.replace(" ", "\n"), justify="right" if i else "left", overflow="fold")
    for name, *texts in rows[1:]:
        out.add_row(name, *(text.replace(" ± ", "\n±") for text in texts))
    return out


def curves(cells: Sequence[Cell], path: Path) -> None:
    """PPO on the validation prompts (KL: on its own replies), a line a cell: the mean over seeds, and from the least to the
    greatest. A line ends where the first of its seeds ended."""
    names = dict.fromkeys(c.name for c in cells if c.source)
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS.items(), strict=True):
        key = key.replace("meteor", metrics.meteor_name())
        for i, name in enumerate(names):
            found = [logs.read_log(c.folder / "metrics.jsonl") for c in cells if c.name == name]
            steps, values = plots.series([[line for line in log if line["stage"] == "ppo"] for log in found], key)
            colour, style = plots.COLOURS[i % len(plots.COLOURS)], ("-", "--", ":")[i // len(plots.COLOURS) % 3]
            axes.plot(steps, values.mean(0), style, color=colour, linewidth=1.6, label=name)
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        plots.tidy(axes, title)
    for axes in figure.axes[3:]:
        axes.set_xlabel("PPO iteration")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(names), 7), frameon=False)
    figure.savefig(path, dpi=150)
