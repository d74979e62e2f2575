"""What no rule spells: hints of a crisis, read by a linear classifier that learnt from labelled messages.

    message -> normalise -> words 1 to 3 in a row, letters 3 to 5 in a row -> TF-IDF -> logistic regression -> probability

The cases are the model: crisis_cases.jsonl, {"text", "class", "gate", "set"} a line, is learnt from when the first message
comes (some seconds); whoever adds a line changes the gate. What the clients of the built-in sample say stands beside them as
ordinary distress. It is linear, so that what it heard can be said (`why`), and it knows words, not situations: a hint in words
that no case has used is missed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from therapy_jax.crisis_rules import normalise

# Of the probability. Chosen where each set of cases was read by a classifier that had learnt from the others: a middle between
# hints that slip through and harmless messages that are stopped (README has both).
THRESHOLD = 0.8
LEAST, MOST = 4, 45  # words of the labelled messages


def hint(plain: str) -> float:
    """The probability that a message (as `normalise` leaves it) hints of a crisis: 0 for fewer different words than a case
    has, the highest of its stretches for more."""
    words = plain.split()
    if len(set(words)) < LEAST:
        return 0.0
    starts = range(0, max(len(words) - MOST // 2, 1), MOST // 2)
    return float(learnt().predict_proba([f" {' '.join(words[i : i + MOST])} " for i in starts])[:, 1].max())


def why(plain: str, most: int = 4) -> list[str]:
    """The words of the message that spoke most for a crisis, strongest first."""
    union, learner = learnt()[0], learnt()[1]
    words = union["words"]
    row = words.transform([plain])
    weights = row.data * learner.coef_[0][row.indices]  # the words' columns come first
    return [word_names()[row.indices[i]] for i in np.argsort(-weights)[:most] if weights[i] > 0]


@functools.cache
def word_names() -> Any:
    return learnt()[0]["words"].get_feature_names_out()


def cases() -> list[dict[str, Any]]:
    """The labelled messages that ship with the package."""
    return _lines("crisis_cases.jsonl")


def ordinary() -> list[str]:
    """What the clients of the built-in sample say; its datasheet says that no crisis is among it."""
    turns = [turn for dialogue in _lines("sample/dialogues.jsonl") for turn in dialogue["turns"]]
    return [turn["text"] for turn in turns if turn["speaker"] == "client"]


def _lines(name: str) -> list[dict[str, Any]]:
    text = files("therapy_jax").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@functools.cache
def learnt() -> Any:
    known, calm = cases(), ordinary()
    return learn([case["text"] for case in known] + calm, [case["gate"] for case in known] + [False] * len(calm))


def learn(texts: Sequence[str], gate: Sequence[bool]) -> Any:
    """Messages and whether they should be stopped -> a scikit-learn pipeline that reads normalised text."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import FeatureUnion, make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True, token_pattern=r"\S+")
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    learner = LogisticRegression(C=10.0, class_weight="balanced", max_iter=3000)
    pipeline = make_pipeline(FeatureUnion([("words", words), ("letters", letters)]), learner)
    return pipeline.fit([normalise(text) for text in texts], list(gate))
