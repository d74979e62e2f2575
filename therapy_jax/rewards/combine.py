"""Named terms, weighed and reported: total = sum over terms of weight * value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from therapy_jax.config import RewardWeights
from therapy_jax.gpt2 import Array
from therapy_jax.rewards import emotion, form, overlap
from therapy_jax.rewards.batch import RewardBatch

Term = Callable[[RewardBatch], Array]


def on_words(metric: Callable[..., Array]) -> Term:
    """An overlap metric as a term: reply words against reference words."""
    return lambda b: metric(b.words, b.words_mask, b.reference_words, b.reference_mask)


TERMS: dict[str, Term] = {  # the names are the fields of config.RewardWeights
    "rouge1": on_words(functools.partial(overlap.rouge_n, n=1)),
    "rouge2": on_words(functools.partial(overlap.rouge_n, n=2)),
    "rouge_l": on_words(overlap.rouge_l),
    "bleu": on_words(overlap.bleu),
    "emotion_stated": emotion.stated,
    "repetition": form.repetition,
    "length": form.length,
    "ending": form.ending,
}


def score(
    batch: RewardBatch, weights: RewardWeights, terms: Mapping[str, Term] = TERMS
) -> tuple[Array, dict[str, Array]]:
    """-> (total f32[B], {name: raw value f32[B]}), every term computed, also those of weight 0.

    Raises ValueError, naming the term, where one gives another shape than [B] or another dtype than float32: a single
    number would silently broadcast, and integers would silently lose fractions.
    """
    size = batch.words.shape[:1]
    raw = {name: term(batch) for name, term in terms.items()}
    for name, values in raw.items():
        if values.shape != size or values.dtype != jnp.float32:
            raise ValueError(
                f"reward term {name} gives {values.dtype}{list(values.shape)}, it must give float32{list(size)}"
            )
    wanted = dataclasses.asdict(weights)
    total = sum((wanted[name] * values for name, values in raw.items()), start=jnp.zeros(size, jnp.float32))
    return total, raw
