"""The peer of our reward terms: the loop that rewards are usually computed in, rouge-score and nltk, one reply at a time.

A worker of scripts/benchmark.py; benchmark_worker.py says how they talk.
"""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import benchmark_worker as worker
import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

NAMES = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}  # our names -> rouge-score's


class Words:
    """In the place of rouge-score's tokenizer: both sides are given words."""

    def tokenize(self, words: list[str]) -> list[str]:
        return words


def prepare_rewards(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """Words are whole numbers, written in digits, so that both sides count the same words. agree: values f64[terms, B]."""
    arrays = worker.load(task["batch"])

    def rows(name: str) -> list[list[str]]:
        return [
            [str(word) for word in row[mask]] for row, mask in zip(arrays[name], arrays[f"{name}_mask"], strict=True)
        ]

    hypotheses, references = rows("hyp"), rows("ref")
    rouge = [name for name in task["terms"] if name in NAMES]
    tokenizer: Any = Words()
    scorer: Any = RougeScorer([NAMES[name] for name in rouge], tokenizer=tokenizer)
    smoothing = SmoothingFunction().method1

    def score() -> dict[str, list[float]]:
        scored: dict[str, list[float]] = {name: [] for name in task["terms"]}
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            found = scorer.score(reference, hypothesis)
            for name in rouge:
                scored[name].append(found[NAMES[name]].fmeasure)
        if "bleu" in scored:
            for h, r in zip(hypotheses, references, strict=True):
                bleu: Any = sentence_bleu([r], h, smoothing_function=smoothing)
                scored["bleu"].append(float(bleu))
        return scored

    began = time.perf_counter()
    scored = score()
    seconds = time.perf_counter() - began
    worker.save(task["agree"], {"rewards": np.asarray([scored[name] for name in task["terms"]])})
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(score)


def make_side() -> worker.Side:
    threads = worker.threads_asked()
    versions = {name: importlib.metadata.version(name) for name in ("rouge-score", "nltk")}
    return worker.Side(
        hello=lambda: {"versions": versions, "device": "cpu", "threads": threads},
        multiply=None,
        stream=None,
        works={"rewards": prepare_rewards},
        synchronise=lambda: None,
        reset_peak=worker.reset_peak,
        peak_bytes=worker.peak_bytes,
    )


if __name__ == "__main__":
    worker.serve(make_side)
