"""What no rule spells: hints of a crisis, read by a linear classifier that learnt from labelled messages.

    message -> normalise -> words 1 to 3 in a row, characters 3 to 5 in a row -> TF-IDF -> logistic regression -> probability

The cases are the model: crisis_cases.jsonl, one {"text", "class", "gate"} a line, is read and learnt from when the first
message comes (a second or two); whoever adds a line changes the gate. The ordinary distress of the built-in sample stands beside
them as what is no crisis. It is linear, so that what it heard can be said: see `why`.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import numpy as np

from therapy_jax.crisis_rules import normalise

THRESHOLD = 0.5  # of the probability; chosen with authors left out in turn (README), false alarms first


def hint(text: str) -> float:
    """The probability that the message hints of a crisis."""
    return float(learn().predict_proba([normalise(text)])[0, 1])


def cases() -> list[dict[str, Any]]:
    """The labelled messages that ship with the package."""
    lines = (files("therapy_jax") / "crisis_cases.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ordinary() -> list[str]:
    """What the clients of the built-in sample say; its datasheet says that no crisis is among it."""
    lines = (files("therapy_jax") / "sample" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    return [turn["text"] for line in lines for turn in json.loads(line)["turns"] if turn["speaker"] == "client"]


@functools.cache
def learn() -> Any:
    known = cases()
    return fit([c["text"] for c in known] + ordinary(), [c["gate"] for c in known] + [False] * len(ordinary()))


def fit(texts: list[str], labels: list[bool]) -> Any:
    """-> a scikit-learn pipeline on normalised texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True, token_pattern=r"\S+")
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    learner = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000)
    return make_pipeline(make_union(words, letters), learner).fit([normalise(text) for text in texts], labels)


def why(text: str, most: int = 5) -> list[str]:
    """The words of the message that spoke most for a crisis."""
    union, learner = learn()[0], learn()[1]
    row = union.transform([normalise(text)])
    part = row.multiply(learner.coef_[0]).toarray()[0]
    names = union.get_feature_names_out()
    top = [i for i in np.argsort(-part)[: 4 * most] if part[i] > 0 and names[i].startswith("tfidfvectorizer-1__")]
    return [names[i].split("__")[1] for i in top[:most]]
