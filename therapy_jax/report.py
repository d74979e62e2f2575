"""A run folder -> report.html: one file that needs no network, and its pictures as PNG beside it (figures/).

It is made from whatever of these the folder holds, and says what is missing: metrics.jsonl, samples.jsonl, results.json,
answers.json, loupe.json, environment.json, config.yaml. Everything that comes from data or a model passes `esc` on its way
into the page, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape as esc
from pathlib import Path
from typing import Any
from urllib.parse import quote

from therapy_jax import evaluate, grid, plots, run
from therapy_jax.config import Config
from therapy_jax.files import as_path, is_remote, write_json, write_text

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
LENSES = {  # Loupe -> (label, digits, what it is)
    "logprobs": ("log-prob", 2, "nats, of the policy that wrote the reply"),
    "ref_logprobs": ("reference", 2, "nats, of the frozen SFT policy"),
    "kl": ("KL", 3, "nats: log-prob less reference"),
    "rewards": ("reward", 3, "less beta times KL, and on the last token the score"),
    "values": ("value", 3, "the critic's guess before the token"),
    "advantages": ("advantage", 2, "what the update asks for: more of it, or less"),
    "ratio": ("ratio", 3, "new probability / old, after the update"),
}


def finish(config: Config) -> None:
    """What every script ends with. A report that fails says so, and the run stays what it is."""
    from therapy_jax import processes  # imports jax, which a report on its own need not

    folder = as_path(config.run_dir)
    if not processes.is_writer():
        return
    try:
        path = write_report(folder, config)
    except Exception as error:
        run.warn(f"report.html could not be written ({type(error).__name__}: {error}); the run itself is whole")
        return
    run.console.print(f"written: {run.escape(str(path))}")


def write_report(folder: Path, config: Config) -> Path:
    """-> the path of report.html."""
    look(folder, config)
    records = run.read_log(folder / "metrics.jsonl")
    results = _json(folder / "results.json")
    is_grid = "cells" in results
    parts = [
        head(folder, config, records, results),
        alarms(records),
        *([experiment(folder, results)] if is_grid else [systems(results)]),
        curves(folder, records),
        terms(folder, records, results),
        conversations(_json(folder / "answers.json") or []),
        samples(run.read_log(folder / "samples.jsonl")),
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
    facts = {
        "data": f"{config.data.format}, {config.data.path or 'the built-in sample'}",
        "model": f"{size}; prompt {config.prompt.format}, emotion {config.prompt.emotion}",
        "steps": ", ".join(f"{STAGES.get(s, s)} {step}" for s, step in last.items()),
        "seed": str(config.seed) if "seeds" not in results else ", ".join(map(str, results["seeds"])),
        "time": f"{seconds / 60:.1f} min in {', '.join(noted)}" if seconds else "",
        "commit": ", ".join(dict.fromkeys(str(s.get("commit") or "unknown") for s in noted.values())),
        "hardware": ", ".join(dict.fromkeys(f"{s.get('devices')}, {s.get('cores')} cores" for s in noted.values())),
    }
    if "cells" in results:
        facts |= {key: str(results[key] or "unknown") for key in ("commit", "hardware")}
        facts["time"] = f"{results['hours']:.2f} h in all"
    rows = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in facts.items() if v)
    care = "A research demo, not care. Replies are those of a model: they may be wrong, or worse."
    return f"<header><h1>{esc(folder.name)}</h1><p class=quiet>{care}</p><dl class=facts>{rows}</dl></header>"


def alarms(records: Sequence[Mapping[str, Any]]) -> str:
    """Iterations at which the reward rose while held-out metrics fell (evaluate.alarm)."""
    found = [(r["step"], r["alarm"]) for r in records if "alarm" in r]
    lines = "".join(f"<li>iteration {step}: {esc(text)}</li>" for step, text in found)
    note = "The reward may be gamed: it rose while metrics that are not in it fell."
    return f"<section class=alarm role=note><h2>Alarm</h2><p>{note}</p><ul>{lines}</ul></section>" if found else ""


def systems(results: Mapping[str, Any]) -> str:
    if not results:
        return ""
    above, below = evaluate.table_caption(dict(results))
    rows = evaluate.table_rows(dict(results))
    rows = rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]  # no paper's figures for other data
    compared = [
        f"<li>{esc(pair)}: " + esc(", ".join(f"{k} {d:+.4f} [{low:+.4f}, {high:+.4f}]" for k, (d, low, high) in by.items())) + "</li>"
        for pair, by in results["comparisons"].items()
    ]  # fmt: skip
    more = f"<details><summary>Differences, with 95 % intervals of a paired bootstrap</summary><ul>{''.join(compared)}</ul></details>"
    constant, retrieval = (
        "constant: the best single answer of train, another for each metric",
        "retrieval: the answer to the nearest client of train",
    )
    return section(
        "Systems",
        f"<p>{esc(above)}. What a trivial answer wins is what a metric is worth: {constant}; {retrieval}; random: any answer of train.</p>"
        + table(rows)
        + f"<p class=quiet>{esc(below)}. {esc(results['signature'])}</p>"
        + (more if compared else ""),
    )


def experiment(folder: Path, results: Mapping[str, Any]) -> str:
    """A grid: its two tables, its curves, and the way to each cell's own report."""
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
    compared = grid.comparison_rows(results)
    return section(
        "Cells",
        table(grid.main_rows(results))
        + (f"<h3>Differences, with 95 % intervals</h3>{table(compared)}" if compared else "")
        + shown
        + (f"<h3>Each cell's own report</h3><ul>{''.join(cells)}</ul>" if cells else ""),
    )  # fmt: skip


def curves(folder: Path, records: Sequence[Mapping[str, Any]]) -> str:
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
    asked = {
        "reward a reply": {"training": "score", "validation": "validation/reward"},
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
            "ppo", plots.draw(2, 3, panels), "PPO: reward, KL, its coefficient, length, stops, entropy", folder
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
        sums = table([["term", "raw", "weighted"], *([n, f"{raw:.3f}", f"{part:+.3f}"] for n, raw, part in parts)])
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
    if path.is_file():
        out += f"<details><summary>config.yaml</summary><pre>{esc(path.read_text(encoding='utf-8'))}</pre></details>"
    return section("How it was made", out) if out else ""


# ----------------------------------------------------------------------------------------------------------- the loupe


def strip(words: Sequence[str], columns: Mapping[str, Sequence[float]], name: str) -> str:
    """Tokens and the columns of a Loupe -> a coloured strip. The lens in use is a radio button, the numbers of a token are
    its own child that shows on hover and on tap: no script. `name` must be the page's only one."""
    first = "advantages" if len(set(columns["advantages"])) > 1 else "kl"  # without a critic all have the same
    switch = "".join(
        f"<label><input type=radio name={name} value={key}{' checked' if key == 'advantages' else ''}>{label}</label>"
        for key, (label, _, _) in LENSES.items()
    )
    ends = {key: max((abs(_signed(key, x)) for x in columns[key]), default=0.0) or 1.0 for key in LENSES}
    tokens = []
    for i, word in enumerate(words):
        tints = ";".join(f"--{key}:{tint(_signed(key, columns[key][i]) / ends[key])}" for key in LENSES)
        numbers = "".join(
            f"<span>{label} <b>{decimals(columns[key][i], n)}</b></span>" for key, (label, n, _) in LENSES.items()
        )
        tokens.append(f'<span class=t tabindex=0 style="{tints}">{visible(word)}<span class=n>{numbers}</span></span>')
    return (
        f"<div class=loupe><div class=lenses>{switch}</div><div class=strip>{''.join(tokens)}"
        "<div class=hint>Blue: above 0 (ratio: above 1). Orange: below. Hover over a token, or tap it.</div></div></div>"
    )


def loupe_table(words: Sequence[str], columns: Mapping[str, Sequence[float]]) -> str:
    """The same as rows, and the sums of what adds up."""
    rows = [["token", *(label for label, _, _ in LENSES.values())]]
    for i, word in enumerate(words):
        rows.append([word, *(decimals(columns[key][i], n) for key, (_, n, _) in LENSES.items())])
    sums = {key: sum(columns[key]) for key in ("logprobs", "ref_logprobs", "kl", "rewards")}
    rows.append(["sum", *(decimals(sums[key], n) if key in sums else "" for key, (_, n, _) in LENSES.items())])
    return table(rows)


def tint(x: float) -> str:
    """x in [-1, 1] -> a translucent colour, which works on a light and on a dark page."""
    colour = "0,114,178" if x >= 0 else "213,94,0"
    return f"rgba({colour},{min(abs(x), 1.0) * 0.6:.2f})"


def visible(word: str) -> str:
    return esc(word).replace("\n", "⏎") or "∅"


def _signed(key: str, x: float) -> float:
    return math.log(max(x, 1e-6)) if key == "ratio" else x


# --------------------------------------------------------------------------------------------------------- small parts


def lines(
    records: Sequence[Mapping[str, Any]], keys: Mapping[str, str]
) -> dict[str, tuple[Sequence[int], Sequence[float]]]:
    """{label: key of a log line} -> {label: (steps, values)}, without those that are nowhere logged."""
    found = {
        label: [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        for label, key in keys.items()
    }
    return {label: ([s for s, _ in points], [v for _, v in points]) for label, points in found.items() if points}


def section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>"


def table(rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """Head and rows of plain text -> a table in a scroll box of its own; numbers to the right, `text` to the left."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{esc(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    kind = " class=text" if text else ""
    return f"<div class=scroll tabindex=0><table{kind}><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table></div>"


def figure(
    name: str,
    pictures: Mapping[str, bytes],
    caption: str,
    folder: Path | None = None,
    columns: int = 3,
    wide: bool = False,
) -> str:
    """{theme: PNG} -> the picture of the reader's theme; with a folder, the light one also as figures/NAME.png."""
    if folder is not None:
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / f"{name}.png").write_bytes(pictures["light"])
    uri = {theme: "data:image/png;base64," + base64.b64encode(png).decode() for theme, png in pictures.items()}
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{uri["dark"]}">' if "dark" in uri else ""
    style = f"--columns:{columns * (1.5 if wide else 1)}"
    image = f'<picture>{dark}<img src="{uri["light"]}" alt="{esc(caption)}" style="{style}"></picture>'
    box = f"<div class=scroll tabindex=0>{image}</div>"
    return f"<figure{'' if dark else ' class=paper'}>{box}<figcaption>{esc(caption)}</figcaption></figure>"


def decimals(x: float, digits: int) -> str:
    return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before nothing


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
CSS = """
:root { --page: #fff; --text: #1c1c1c; --quiet: #666; --line: #e2e2e2; --card: #f7f7f6; --alarm: #fdf3e7; --mark: #b25400; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --text: #e6e6e6; --quiet: #9a9a9a; --line: #333; --card: #1f1f1f; --alarm: #2b2115; --mark: #e8a25c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: .75rem; font-weight: 600; margin: 0 0 .2rem; color: var(--quiet); }
p { margin: 0 0 .75rem; max-width: 46rem; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
a { color: inherit; }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.quiet, figcaption, .hint { color: var(--quiet); font-size: .875rem; }
.alarm { border: 0; border-left: 4px solid var(--mark); background: var(--alarm); padding: 1rem 1.25rem; border-radius: 4px; }
.alarm h2 { color: var(--mark); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0 0; font-size: .9rem; }
.facts dt { color: var(--quiet); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .25rem 0 .75rem; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: pre; }
table.text td, table.text th { text-align: left; white-space: normal; } table.text td:last-child { min-width: 16rem; }
figure { margin: 0 0 1.5rem; } figure img { display: block; width: calc(var(--columns) * 21.8rem); max-width: 100%; height: auto; }
@media (max-width: 44rem) {
  main { padding: 1.25rem 1rem 3rem; }
  figure img { width: calc(var(--columns) * 16rem); max-width: none; }
}
figure.paper img { background: #fff; border-radius: 4px; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--quiet); font-size: .875rem; }
pre { font-size: .8rem; line-height: 1.45; overflow-x: auto; background: var(--card); padding: 1rem; border-radius: 6px; }
article { background: var(--card); border-radius: 8px; padding: 1rem 1.25rem; margin: 0 0 1rem; }
article > :last-child { margin-bottom: 0; }
.client { border-left: 3px solid var(--line); padding-left: .75rem; font-size: 1rem; font-weight: 500; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem 1.5rem; }
.replies p { margin: 0; font-size: .93rem; white-space: pre-line; }
.lenses { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .5rem 0; font-size: .85rem; }
.lenses label { display: inline-flex; align-items: center; gap: .3rem; white-space: nowrap; }
.lenses input { margin: 0; accent-color: #0072b2; }
.strip { position: relative; padding-bottom: 2.2rem; line-height: 2; overflow-wrap: anywhere; }
.t { white-space: pre-wrap; padding: .15rem .1rem; border-radius: 3px; cursor: default; background: var(--advantages); margin-right: 1px; }
.t:hover, .t:focus { outline: 2px solid var(--quiet); }
.n, .hint { position: absolute; left: 0; right: 0; bottom: 0; min-height: 1.9rem; line-height: 1.5; }
.n { display: none; flex-wrap: wrap; align-content: flex-start; gap: 0 1rem; background: var(--card); font-size: .85rem;
  font-variant-numeric: tabular-nums; z-index: 1; }
@media (max-width: 44rem) { .strip { padding-bottom: 5.2rem; } .n, .hint { min-height: 4.9rem; } }
.n b { font-weight: 600; }
.t:focus .n { display: flex; } .t:hover .n { display: flex; z-index: 2; }
""" + "\n".join(f".loupe:has(input[value={key}]:checked) .t {{ background: var(--{key}); }}" for key in LENSES)
