"""A run folder -> report.html: one file that needs no network, and its pictures as PNG beside it (figures/).

It is made from whatever of these the folder holds, and says what is missing: metrics.jsonl, samples.jsonl, results.json,
answers.json, loupe.json, environment.json, config.yaml. Everything that comes from data or a model passes `esc` on its way
into the page, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from therapy_jax import logs, origin, plots, results_table, run
from therapy_jax.config import Config, ConfigError
from therapy_jax.files import as_path, is_remote, write_json, write_text
from therapy_jax.page import CSS, PAGE, decimals, esc, figure, loupe_table, section, strip, table

CONVERSATIONS = 20
MODELS = {"base": "base", "sft": "SFT", "ppo": "PPO"}
STAGES = {"base": "Pre-training", "sft": "SFT", "ppo": "PPO"}
MISSING = {  # what a finished run holds -> what the report lacks without it, and what makes it
    "metrics.jsonl": ("the curves", "scripts/train_sft.py and train_ppo.py"),
    "results.json": ("the table of systems", "scripts/evaluate.py"),
    "answers.json": ("the conversations", "scripts/evaluate.py"),
    "samples.jsonl": ("the replies through training", "scripts/train_ppo.py"),
    "loupe.json": ("the loupe", "scripts/report.py, where there are an SFT model and a PPO model"),
    "environment.json": ("commit, hardware and versions", "every script at its end"),
    "config.yaml": ("the settings", "every script at its start"),
}


def after(script: Callable[[Config], None]) -> Callable[[Config], None]:
    """The script, then its run's report, if the config wants one."""

    def both(config: Config) -> None:
        script(config)
        finish(config)

    return both


def finish(config: Config, loupe: bool = True) -> None:
    """A report that fails says so, and the run stays what it is."""
    from therapy_jax import processes  # imports jax, which a report on its own need not

    folder = as_path(config.run_dir)
    if not config.report or not processes.is_writer():
        return
    try:
        path = write_report(folder, config, loupe)
    except Exception as error:
        run.warn(f"report.html could not be written ({type(error).__name__}: {error}); the run itself is whole")
        return
    run.console.print(f"written: {run.escape(str(path))}")


def write_report(folder: Path, config: Config, loupe: bool = True) -> Path:
    """-> the path of report.html. loupe: with a look at some replies token by token, which takes one more iteration."""
    if loupe:
        look(folder, config)
    records = logs.read_log(folder / "metrics.jsonl")
    results = _json(folder / "results.json")
    is_grid = "cells" in results
    parts = [
        head(folder, config, records, results),
        alarms(records),
        *([experiment(folder, results)] if is_grid else [systems(results)]),
        curves(folder, records, config.rewards.standardise),
        terms(folder, records, results),
        conversations(_json(folder / "answers.json") or []),
        samples(logs.read_log(folder / "samples.jsonl")),
        loupes(_json(folder / "loupe.json")),
        missing(folder, () if not is_grid else ("metrics.jsonl", "answers.json", "samples.jsonl", "loupe.json", "environment.json")),
        settings(folder),
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    page = PAGE.replace("{title}", esc(folder.resolve().name if folder.exists() else str(folder))).replace("{css}", CSS)
    write_text(folder / "report.html", page.replace("{body}", body))
    return folder / "report.html"


def look(folder: Path, config: Config) -> None:
    """Write loupe.json where the models are newer than it is (loupe.py). What goes wrong there is said, no more."""
    models = [folder / stage / "model" / "model.safetensors" for stage in ("sft", "ppo")]
    path = folder / "loupe.json"
    if not all(model.is_file() for model in models):
        return
    if path.is_file() and (is_remote(path) or path.stat().st_mtime >= max(m.stat().st_mtime for m in models)):
        return
    import jax

    if jax.process_count() > 1:
        return
    from therapy_jax import loupe

    run.console.print("report: one more iteration for the loupe (compiled once, cached afterwards) ...")
    try:
        write_json(path, loupe.of_run(folder, config))
    except Exception as error:
        run.warn(f"report: no loupe ({type(error).__name__}: {error})")


# ------------------------------------------------------------------------------------------------------------ sections


def head(folder: Path, config: Config, records: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    noted = _json(folder / "environment.json")
    last = {r["stage"]: r["step"] for r in records}
    seconds = sum(stage.get("seconds", 0) for stage in noted.values())
    size = config.model.name or f"{config.model.n_layer} layers, width {config.model.n_embd}"
    told = (folder / "config.yaml").is_file()  # else these would be the settings of whoever looks
    facts = {
        "data": f"{config.data.format}, {config.data.path or 'the built-in sample'}" if told else "",
        "model": f"{size}; prompt {config.prompt.format}, emotion {config.prompt.emotion}" if told else "",
        "steps": ", ".join(f"{STAGES.get(s, s)} {step}" for s, step in last.items()),
        "seed": ", ".join(map(str, results["seeds"])) if "seeds" in results else str(config.seed) if told else "",
        "time": f"{seconds / 60:.1f} min in {', '.join(noted)}" if seconds else "",
        "commit": ", ".join(dict.fromkeys(str(s.get("commit") or "unknown") for s in noted.values())),
        "hardware": ", ".join(dict.fromkeys(f"{s.get('devices')}, {s.get('cores')} cores" for s in noted.values())),
    }
    if "cells" in results:
        facts |= {key: str(results[key] or "unknown") for key in ("commit", "hardware")}
        facts["time"] = f"{results['hours']:.2f} h in all"
    rows = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in facts.items() if v)
    care = "A research demo, not care. Replies are those of a model: they may be wrong, or worse."
    name = folder.resolve().name if folder.exists() else folder.name
    return f"<header><h1>{esc(name)}</h1><p class=quiet>{care}</p><dl class=facts>{rows}</dl></header>"


def alarms(records: Sequence[Mapping[str, Any]]) -> str:
    """Iterations at which the reward rose while held-out metrics fell (evaluate.alarm)."""
    found = [(r["step"], r["alarm"]) for r in records if "alarm" in r]
    lines = "".join(f"<li>iteration {esc(str(step))}: {esc(text)}</li>" for step, text in found)
    note = "The reward may be gamed: it rose while metrics that are not in it fell."
    return f"<section class=alarm role=note><h2>Alarm</h2><p>{note}</p><ul>{lines}</ul></section>" if found else ""


def systems(results: Mapping[str, Any]) -> str:
    if not results:
        return ""
    above, below = results_table.caption(dict(results))
    rows = results_table.rows(dict(results))
    rows = rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]  # no paper's figures for other data
    compared = [
        f"<li>{esc(pair)}: " + esc(", ".join(f"{k} {d:+.4f} [{low:+.4f}, {high:+.4f}]" for k, (d, low, high) in by.items())) + "</li>"
        for pair, by in results.get("comparisons", {}).items()
    ]  # fmt: skip
    more = f"<details><summary>Differences, with 95 % intervals of a paired bootstrap</summary><ul>{''.join(compared)}</ul></details>"
    trivial = "; ".join(f"{name}: {what}" for name, what in results_table.TRIVIAL.items() if name in results["systems"])
    return section(
        "Systems",
        f"<p>{esc(above)}. What a trivial answer wins is what a metric is worth: {trivial or 'none was asked'}.</p>"
        + table(rows)
        + f"<p class=quiet>{esc(below)}. {esc(results['signature'])}</p>"
        + (more if compared else ""),
    )


def experiment(folder: Path, results: Mapping[str, Any]) -> str:
    """A grid: its two tables, its curves, and the way to each cell's own report."""
    from therapy_jax import grid_results  # nltk: a second or two, for grids alone

    picture = folder / "curves.png"
    shown = (
        figure("curves", {"light": picture.read_bytes()}, "Validation curves of the PPO cells")
        if picture.is_file()
        else ""
    )
    cells = [
        f'<li><a href="{quote(str(path.relative_to(folder)))}">{esc(str(path.parent.relative_to(folder)))}</a></li>'
        for path in sorted(folder.glob("seed*/*/report.html"))
    ]
    compared = grid_results.comparison_rows(results)
    return section(
        "Cells",
        table(grid_results.main_rows(results))
        + (f"<h3>Differences, with 95 % intervals</h3>{table(compared)}" if compared else "")
        + shown
        + (f"<h3>Each cell's own report</h3><ul>{''.join(cells)}</ul>" if cells else ""),
    )  # fmt: skip


def curves(folder: Path, records: Sequence[Mapping[str, Any]], standardised: bool) -> str:
    of_stage = {stage: [r for r in records if r["stage"] == stage] for stage in STAGES}
    out = ""
    losses = [
        plots.panel(
            f"{STAGES[stage]}: loss (nats a token)",
            lines(of_stage[stage], {"training": "loss", "validation": "validation_loss"}),
            "step",
        )
        for stage in ("base", "sft")
        if of_stage[stage]
    ]
    if losses:
        out += figure("losses", plots.draw(1, 2, losses), "Pre-training and SFT: loss", folder, 2)
    reward: dict[str, dict[str, str]] = {"reward a reply": {"training": "score", "validation": "validation/reward"}}
    if standardised:  # what is learnt from has another unit
        reward = {
            "standardised reward a reply": {"training": "score"},
            "reward a reply": {"validation": "validation/reward"},
        }
    asked = reward | {
        "KL to SFT (nats a reply)": {"k1": "kl", "k3": "kl_k3"},
        "KL coefficient beta": {"beta": "kl_coef"},
        "length (training: tokens, validation: words)": {"training": "reply_tokens", "validation": "validation/reply_words"},
        "share of replies that stop": {"training": "stop_rate", "validation": "validation/stop_rate"},
        "entropy (nats a token)": {"entropy": "entropy"},
    }  # fmt: skip
    found = {title: lines(of_stage["ppo"], keys) for title, keys in asked.items()}
    panels = [plots.panel(title, found_lines, "iteration") for title, found_lines in found.items() if found_lines]
    if panels:
        out += figure(
            "ppo",
            plots.draw(math.ceil(len(panels) / 3), 3, panels),
            "PPO: reward, KL, its coefficient, length, stops, entropy",
            folder,
        )
    return section("Curves", out) if out else ""


def terms(folder: Path, records: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """Each reward term: raw, weighted, and its share of the score's variance at the first and the last iteration."""
    ppo = [r for r in records if r["stage"] == "ppo"]
    names = [key.removeprefix("reward/") for key in (ppo[-1] if ppo else {}) if key.startswith("reward/")]
    trained = [r for r in ppo if f"reward/{names[0]}" in r] if names else []
    if not trained:
        return ""
    weights = results.get("reward_weights", {})
    first, last = trained[0], trained[-1]
    names.sort(key=lambda name: -abs(last.get(f"weighted/{name}", 0.0)))

    def drawn(name: str) -> dict[str, tuple[Sequence[int], Sequence[float]]]:
        return lines(ppo, {"training": f"reward/{name}", "validation": f"validation/reward/{name}"})

    raw = [plots.panel(name, drawn(name), "iteration", legend=i == 0) for i, name in enumerate(names)]
    pictures = plots.draw(math.ceil(len(raw) / 3), 3, raw, height=2.0)
    out = figure("terms", pictures, "Each reward term, raw: mean over replies", folder, 3)
    used = [name for name in names if any(r.get(f"weighted/{name}") for r in trained)]
    weighted = [
        plots.panel(
            "weighted: what each adds to the score", lines(ppo, {n: f"weighted/{n}" for n in part}), "iteration"
        )
        for part in (used[k : k + 5] for k in range(0, len(used), 5))
    ]
    if weighted:
        pictures = plots.draw(math.ceil(len(weighted) / 2), 2, weighted, width=5.4)
        out += figure("weighted", pictures, "Each reward term, weighted", folder, 2, wide=True)

    def number(record: Mapping[str, Any], key: str) -> str:
        return decimals(record[key], 3) if key in record else ""

    rows = [["term", "weight", "raw, first", "raw, last", "weighted, first", "weighted, last", "share of variance"]]
    for name in names:
        cells = [number(r, f"{kind}/{name}") for kind in ("reward", "weighted") for r in (first, last)]
        weight = weights.get(name)
        rows.append([name, "" if weight is None else f"{weight:g}", *cells, number(last, f"share/{name}")])
    return section("Reward terms", out + table(rows) + "<p class=quiet>First and last iteration, training replies.</p>")


def conversations(answers: Sequence[Mapping[str, Any]]) -> str:
    """CONVERSATIONS of the evaluation's exchanges, spread evenly over it."""
    count = min(CONVERSATIONS, len(answers))
    cards = []
    for i in range(count):
        answer = answers[i * len(answers) // count]
        before = "".join(
            f"<p><b>{esc(str(turn['speaker']))}</b> {esc(str(turn['text']))}</p>" for turn in answer.get("context", [])
        )
        before = f"<details><summary>What was said before</summary>{before}</details>" if before else ""
        replies = {
            "therapist (annotated)": answer["therapist"],
            **{MODELS[m]: answer[m] for m in MODELS if m in answer},
        }
        cells = "".join(
            f"<div><h4>{esc(name)}</h4><p>{esc(text) or '(nothing)'}</p></div>" for name, text in replies.items()
        )
        cards.append(f"<article>{before}<p class=client>{esc(answer['client'])}</p><div class=replies>{cells}</div></article>")  # fmt: skip
    note = f"<p>{count} of {len(answers)} exchanges of the evaluation, evenly spread, not chosen.</p>"
    return section("Conversations", note + "".join(cards)) if count else ""


def samples(records: Sequence[Mapping[str, Any]]) -> str:
    """Three validation prompts, answered again and again while PPO went on."""
    clients = list(dict.fromkeys(r["client"] for r in records))[:3]
    blocks = []
    for client in clients:
        mine = [r for r in records if r["client"] == client]
        rows = [["iteration", "emotion", "reply"], *([str(r["step"]), r["emotion"] or "", r["reply"]] for r in mine)]
        blocks.append(f"<h3 class=client>{esc(client)}</h3>{table(rows, text=True)}")
    return section("Replies through training", "".join(blocks)) if blocks else ""


def loupes(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    whose = "the kept PPO policy" if found["stage"] == "ppo" else "the SFT policy"
    note = (
        f"One more iteration from {whose}: {found['batch']} replies to held-out prompts, {found['steps']} steps at learning rate "
        f"{found['learning_rate']:.2g} with an optimizer that starts anew; estimator {found['estimator']}, "
        f"beta {found['kl_coef']:.3g}, clip {found['clip']:g}."
    )
    if found["estimator"] != "gae":
        note += " Without a critic values are 0, and the advantage is the same on each token of a reply."
    cards = []
    for i, reply in enumerate(found["replies"]):
        weights = found["weights"]
        parts = [
            (name, raw, weights.get(name, 1.0) * raw) for name, raw in reply["terms"].items() if weights.get(name, 1.0)
        ]
        parts = sorted(parts, key=lambda part: -abs(part[2]))
        weighted = "weight × raw, before standardising" if found.get("standardise") else "weighted"
        sums = table([["term", "raw", weighted], *([n, f"{raw:.3f}", f"{part:+.3f}"] for n, raw, part in parts)])
        cards.append(
            f"<article><p class=client>{esc(reply['client'])}</p>{strip(reply['tokens'], reply, f'lens{i}')}"
            f"<details><summary>As a table</summary>{loupe_table(reply['tokens'], reply)}</details>"
            f"<details><summary>Score {reply['score']:.3f}: its terms</summary>{sums}</details></article>"
        )
    return section("The loupe", f"<p>{esc(note)}</p>{''.join(cards)}")


def missing(folder: Path, not_asked: Sequence[str]) -> str:
    lacking = {name: why for name, why in MISSING.items() if name not in not_asked and not (folder / name).is_file()}
    rows = "".join(f"<li><code>{name}</code>: {what} ({made})</li>" for name, (what, made) in lacking.items())
    return section("Not here", f"<ul>{rows}</ul>") if lacking else ""


def settings(folder: Path) -> str:
    path, noted = folder / "config.yaml", _json(folder / "environment.json")
    out = ""
    if noted:
        keys = list(dict.fromkeys(key for stage in noted.values() for key in stage))
        rows = [["", *noted], *([key, *(str(stage.get(key, "")) for stage in noted.values())] for key in keys)]
        out += f"<details><summary>Commit, hardware, versions</summary>{table(rows)}</details>"
    for file in (path, *(folder / stage / "model" / origin.SETTINGS for stage in STAGES)):
        if file.is_file():
            name = esc(file.relative_to(folder).as_posix())
            out += f"<details><summary>{name}</summary><pre>{esc(file.read_text(encoding='utf-8'))}</pre></details>"
    return section("How it was made", out) if out else ""


def lines(
    records: Sequence[Mapping[str, Any]], keys: Mapping[str, str]
) -> dict[str, tuple[Sequence[int], Sequence[float]]]:
    """{label: key of a log line} -> {label: (steps, values)}, without those that are nowhere logged."""
    found = {
        label: [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        for label, key in keys.items()
    }
    return {label: ([s for s, _ in points], [v for _, v in points]) for label, points in found.items() if points}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); the script that wrote it writes it anew") from error
