"""What the gate has learnt, kept between starts, since to learn it takes half a minute: its words and their weights, as safetensors.

    cases, rules, code -> digest -> CACHE/gate/DIGEST.safetensors -> the classifier, or learnt anew where there is none

The digest is of everything that the classifier comes from: who changes a case, a rule or the code has another file, and so learns
anew. Nothing of the gate depends on the file being there, or being whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from therapy_jax.files import cache_folder

SOURCES = (
    "crisis_cases.jsonl", "sample/dialogues.jsonl", "crisis_rules.txt", "crisis_rules.py", "crisis_hints.py", "crisis_kept.py",
)  # fmt: skip
LIBRARIES = ("scikit-learn", "nltk", "numpy", "scipy")


def kept(learn: Callable[[], Any], views: dict[str, Any]) -> Any:
    """What an earlier start has learnt, or what learn() gives now, kept for the next one: a pipeline of `views` (vectorizers that
    have learnt nothing yet) and a logistic regression."""
    from safetensors import SafetensorError  # what it says of a full disk, too

    path = cache_folder() / "gate" / f"{digest()}.safetensors"
    # No file, or a damaged one: there is the way around.
    with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
        return load(path, views)
    found = learn()
    with contextlib.suppress(OSError, SafetensorError):  # nowhere to write to: the next start learns, too
        save(path, found)
    return found


def digest() -> str:
    """Of all that the classifier comes from."""
    found = hashlib.sha256()
    for name in SOURCES:
        found.update(files("therapy_jax").joinpath(name).read_bytes())
    found.update(" ".join(map(importlib.metadata.version, LIBRARIES)).encode())
    return found.hexdigest()[:32]


def save(path: Path, pipeline: Any) -> None:
    """Written by rename: another process never sees half of it. Raises OSError or SafetensorError."""
    from safetensors.numpy import save_file

    union, learner = pipeline[0], pipeline[1]
    arrays = {"coef": learner.coef_, "intercept": learner.intercept_}
    for name, view in union.transformer_list:
        words = "\n".join(view.get_feature_names_out())
        arrays |= {f"{name}.words": np.frombuffer(words.encode(), np.uint8), f"{name}.idf": view.idf_}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(arrays, partial)
    os.replace(partial, path)


def load(path: Path, views: dict[str, Any]) -> Any:
    """Raises OSError, ValueError, KeyError or SafetensorError where the file is not there or not whole."""
    from safetensors.numpy import load_file
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import FeatureUnion, make_pipeline

    arrays = load_file(path)
    for name, view in views.items():
        words = arrays[f"{name}.words"].tobytes().decode().split("\n")
        view.vocabulary = {word: i for i, word in enumerate(words)}
        view.idf_ = arrays[f"{name}.idf"]
    learner = LogisticRegression()
    learner.coef_, learner.intercept_, learner.classes_ = arrays["coef"], arrays["intercept"], np.asarray([False, True])
    if learner.coef_.shape != (1, sum(len(view.vocabulary) for view in views.values())):
        raise ValueError(f"{path}: weights and words do not go together")
    return make_pipeline(FeatureUnion(list(views.items())), learner)
