"""results.json as a table: a row a metric, a column a system, for the screen, the report and the model card."""

from __future__ import annotations

from typing import Any

import rich.box
from rich.table import Table

PAPER = {  # arXiv 2511.11884; tokenisation and BLEU order are not stated there
    "bleu": 0.0111,
    "rouge1": 0.1397,
    "rouge2": 0.0213,
    "rougeL": 0.1317,
    "meteor": 0.0581,
    "emotion_accuracy": 0.9934,
    "base_emotion_accuracy": 0.6696,
}
TRIVIAL = {  # what a trivial answer wins is what a metric is worth
    "constant": "the best single answer of train, another for each metric",
    "commonplace": "the answers of train that share most phrases with all others, as few as are half as varied as therapists are",
    "retrieval": "the answer to the nearest client of train",
    "random": "any answer of train",
}
ROWS = {  # results.json -> what the table calls it
    "reward": "reward",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "meteor": "METEOR",
    "meteor_exact_stem": "METEOR (ex., stem)",
    "emotion_stated_accuracy": "stated acc.",
    "emotion_stated_macro_f1": "stated F1",
    "emotion_expressed_accuracy": "expressed acc.",
    "emotion_expressed_macro_f1": "expressed F1",
    "distinct1": "Distinct-1",
    "distinct2": "Distinct-2",
    "commonest_share": "commonest",
    "reply_perplexity": "reply perpl.",
    "perplexity": "perplexity",
    "reply_words": "words",
    "stop_rate": "stops",
}


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Head and rows of the table: a row a metric, a column a system, the paper's figures last."""
    data, systems = results["data"], results["systems"]
    paper = {**PAPER, "emotion_stated_accuracy": PAPER["emotion_accuracy"]} if data["name"] == "mesc" else {}
    lines = [["", *systems, "paper"]]
    for key, label in ROWS.items():
        if any(key in values for values in systems.values()):
            digits = 1 if key in ("perplexity", "reply_perplexity", "reply_words") else 4
            cells = [values.get(key) for values in (*systems.values(), paper)]
            lines.append([label, *("" if cell is None else f"{cell:.{digits}f}" for cell in cells)])
    return lines


def caption(results: dict[str, Any]) -> tuple[str, str]:
    """What stands above and below the table."""
    data, majority = results["data"], results["emotion_majority_accuracy"]
    below = "no emotion is annotated"
    if majority is not None:
        below = f"emotion accuracy of always answering the majority: {majority:.4f}; stated emotions only"
    return f"{data['name']}, {data['split']} split, {data['n']} exchanges", below


def screen(results: dict[str, Any]) -> Table:
    """results.json for the screen."""
    above, below = caption(results)
    out = Table(
        title=above,
        caption=below,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    head, *lines = rows(results)
    out.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        out.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        out.add_row(*line)
    return out
