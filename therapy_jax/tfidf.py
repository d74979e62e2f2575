"""Another reader than the one that rewards: TF-IDF + logistic regression on the same annotated turns (scikit-learn).

A policy may learn what its reward model likes instead of what people mean, so the emotion that replies express is judged by
a model that shares nothing with the rewarding head but its training turns; the heads' own table has it as the bar to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from therapy_jax.classifiers import annotated
from therapy_jax.dialogue import DataError, Exchange


class Evaluator(NamedTuple):
    """Another model than the rewarding head, to judge the emotion that replies express."""

    pipeline: Any

    def predict(self, texts: Sequence[str]) -> list[str]:
        return [str(label) for label in self.pipeline.predict(list(texts))] if len(texts) else []


def fit(texts: Sequence[str], labels: Sequence[str], seed: int, C: float = 10.0, balanced: bool = True) -> Any:
    """TF-IDF of word 1-2-grams + logistic regression, fitted; the only class where there is but one."""
    weight = "balanced" if balanced else None
    model = LogisticRegression(C=C, class_weight=weight, max_iter=1000, random_state=seed)
    known = model if len(set(labels)) > 1 else DummyClassifier()
    try:
        return make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), known).fit(texts, labels)
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise DataError(f"no reader of labels can be fitted on {len(texts)} annotated turns: {error}") from error


def fit_evaluator(data: dict[str, list[Exchange]], seed: int) -> Evaluator | None:
    """The evaluator of expressed emotion, on train's annotated turns of both speakers; None where there is none."""
    texts, labels = annotated("emotion", data["train"])
    return Evaluator(fit(texts, labels, seed)) if labels else None
