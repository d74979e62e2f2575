"""What no rule spells: hints of a crisis, read by a linear classifier that learnt from labelled messages.

    message -> normalise -> phrases of 1 to 3 words, pairs of words that stand near each other, letters 3 to 5 in a row
            -> TF-IDF, times log-count ratios -> logistic regression -> log-odds

The ratios say how much more often a phrase stood in a crisis than elsewhere; features scaled by them make the strongest linear
reader of short texts (Wang & Manning 2012, "Baselines and Bigrams", NB-LR). The cases are the model: crisis_cases.jsonl, {"text",
"class", "gate", "set"} a line, is learnt from at the first message, or when a chat starts, and what was learnt is kept for the
next start (crisis_kept.py); whoever adds a line changes the gate. What the clients of the built-in sample say stands beside them
as ordinary distress. It is linear, so that what it heard can be said (`why`), and it knows words, not situations: a hint in words
that no case has used is missed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from therapy_jax.crisis_kept import kept
from therapy_jax.crisis_rules import normalise

# A middle between crises that slip through and harmless messages that are stopped, where each set of cases was read by a classifier
# that had learnt from the others, and beside the half that was written apart (README has both lines).
THRESHOLD = 0.8  # the probability from which a message is met with the answer
EVIDENCE = 4.0  # what a rule that fires adds to the log-odds: only a classifier that is nearly sure speaks against it
LEAST, MOST = 4, 45  # words of the labelled messages


def read(plain: str, by_rule: bool) -> float:
    """The probability that a message (as `normalise` leaves it) tells or hints of a crisis: the highest of its stretches.
    Of fewer different words than a case has the rules alone judge."""
    words = plain.split()
    if len(set(words)) < LEAST:
        return float(by_rule)
    starts = range(0, max(len(words) - MOST // 2, 1), MOST // 2)
    odds = learnt().decision_function([f" {' '.join(words[i : i + MOST])} " for i in starts]).max()
    return float(1 / (1 + np.exp(-odds - EVIDENCE * by_rule)))


def why(plain: str, most: int = 4) -> list[str]:
    """The words of the message that spoke most for a crisis, strongest first."""
    union, learner = learnt()[0], learnt()[1]
    words = union["phrases"]
    row = words.transform([plain])
    weights = row.data * learner.coef_[0][row.indices]  # the phrases' columns come first
    return [word_names()[row.indices[i]] for i in np.argsort(-weights)[:most] if weights[i] > 0]


@functools.cache
def word_names() -> Any:
    return learnt()[0]["phrases"].get_feature_names_out()


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
    """The gate's classifier: what an earlier start kept, where it comes from the same cases, rules and code; else learnt now."""

    def now() -> Any:
        known, calm = cases(), ordinary()
        return learn([case["text"] for case in known] + calm, [case["gate"] for case in known] + [False] * len(calm))

    return kept(now, views())


def views() -> dict[str, Any]:
    """What the classifier looks at, not yet learnt: scikit-learn vectorizers."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    by_pairs: Any = pairs  # sklearn's types know names alone
    return {
        "phrases": TfidfVectorizer(ngram_range=(1, 3), min_df=2, sublinear_tf=True, token_pattern=r"\S+"),
        "pairs": TfidfVectorizer(analyzer=by_pairs, min_df=2, sublinear_tf=True),
        "letters": TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True),
    }


def learn(texts: Sequence[str], gate: Sequence[bool]) -> Any:
    """Messages and whether they should be stopped -> a scikit-learn pipeline that reads normalised text."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import FeatureUnion, make_pipeline

    union = FeatureUnion(list(views().items()))
    found: Any = union.fit_transform([normalise(text) for text in texts])
    x, y = found.tocsr(), np.asarray(gate)
    counts = [1 + np.bincount(x[y == side].indices, minlength=x.shape[1]) for side in (True, False)]
    ratios = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
    learner = LogisticRegression(C=10.0, class_weight="balanced", max_iter=3000, tol=1e-5)
    learner.fit(x.multiply(ratios).tocsr(), y)
    learner.coef_ *= ratios  # so that it reads what the union gives
    return make_pipeline(union, learner)


def pairs(plain: str) -> list[str]:
    """Stems of words with 1 to 3 others between them."""
    stems = [_stem(word) for word in plain.split()]
    return [f"{a} .. {b}" for i, a in enumerate(stems) for b in stems[i + 2 : i + 5]]


@functools.cache
def _stem(word: str) -> str:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem(word)
