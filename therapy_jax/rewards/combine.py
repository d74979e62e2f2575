"""Named terms, weighed and reported: total = sum over terms of weight * value.

`raw_terms` computes them, `combine` makes one score per reply and says what each term did to it. With standardising, a
term enters as (value - mean) / sd of all its values so far, so that none rules by its scale alone; those running
statistics are state, and belong to the checkpoint.

>>> raw = {"rouge1": jnp.array([0.25, 0.5]), "length": jnp.array([-0.5, 0.0])}
>>> combine(raw, {"rouge1": 1.0, "length": 0.25}, init_stats(raw), standardise=False)[0].tolist()
[0.125, 0.5]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from therapy_jax.config import RewardConfig
from therapy_jax.gpt2 import Array
from therapy_jax.rewards import emotion, form, meaning, overlap, strategy
from therapy_jax.rewards.batch import RewardBatch

Term = Callable[[RewardBatch], Array]
Raw = dict[str, Array]  # name -> f32[B]


def on_words(metric: Callable[..., Array]) -> Term:
    """An overlap metric as a term: reply words against reference words."""
    return lambda b: metric(b.words, b.words_mask, b.reference_words, b.reference_mask)


TERMS: dict[str, Term] = {  # the names are the fields of config.RewardWeights
    "rouge1": on_words(functools.partial(overlap.rouge_n, n=1)),
    "recall": on_words(overlap.recall),
    "rouge2": on_words(functools.partial(overlap.rouge_n, n=2)),
    "rouge_l": on_words(overlap.rouge_l),
    "bleu": on_words(overlap.bleu),
    "semantic": meaning.semantic,
    "context": meaning.context,
    "emotion_stated": emotion.stated,
    "emotion_expressed": emotion.expressed,
    "strategy": strategy.strategy,
    "repetition": form.repetition,
    "sameness": form.sameness,
    "idiom": form.idiom,
    "length": form.length,
    "ending": form.ending,
    "manner": form.manner,
}


class RewardError(ValueError):
    """A reward that cannot be used; the message names the term or the function, and the sample where there is one."""


class RunningStats(NamedTuple):
    """Of every value of a term so far. Pytrees of f32[], one leaf a term."""

    count: dict[str, Array]
    mean: dict[str, Array]
    m2: dict[str, Array]  # sum of squared distances from the mean


def init_stats(names: Iterable[str]) -> RunningStats:
    return RunningStats(*({name: jnp.float32(0) for name in names} for _ in range(3)))


def update_stats(stats: RunningStats, raw: Raw) -> RunningStats:
    """One batch more: Chan, Golub & LeVeque 1979, "Updating formulae", eq. 2.1. Exact, whatever the batches were."""
    count, mean, m2 = {}, {}, {}
    for name, values in raw.items():
        n, size = stats.count[name], values.shape[0]
        delta = values.mean() - stats.mean[name]
        count[name] = n + size
        mean[name] = stats.mean[name] + delta * size / count[name]
        m2[name] = (
            stats.m2[name] + jnp.square(values - values.mean()).sum() + jnp.square(delta) * n * size / count[name]
        )
    return RunningStats(count, mean, m2)


def weights_of(config: RewardConfig) -> dict[str, float]:
    """Every weight by name, those of a custom reward too."""
    return dataclasses.asdict(config.weights) | (config.custom.weights if config.custom else {})


def check(name: str, values: Any, size: int) -> None:
    """Raises RewardError, naming the term, for another shape than [B] or another dtype than float32: a single number would
    silently broadcast, and integers would silently lose fractions."""
    if getattr(values, "shape", None) != (size,) or values.dtype != jnp.float32:
        what = f"{values.dtype}{list(values.shape)}" if hasattr(values, "dtype") else type(values).__name__
        raise RewardError(f"reward term {name} gives {what}, it must give float32[{size}]")


def raw_terms(
    batch: RewardBatch, custom: Callable[[RewardBatch], Mapping[str, Array]] | None = None,
    terms: Mapping[str, Term] = TERMS,
) -> Raw:  # fmt: skip
    """-> {name: f32[B]}, every term computed, also those of weight 0. `custom`: more of them from a user's function, which
    may not take a name that stands here. Raises RewardError (see `check`)."""
    raw = {name: term(batch) for name, term in terms.items()}
    more = custom(batch) if custom else {}
    if not isinstance(more, Mapping):
        raise RewardError(f"the custom reward gives a {type(more).__name__}, it must give a dict of name to float32[B]")
    if taken := sorted(set(raw) & set(more)):
        raise RewardError(f"the custom reward gives {', '.join(taken)}, which is a term of ours; choose another name")
    raw |= dict(more)
    for name, values in raw.items():
        check(name, values, batch.tokens.shape[0])
    return raw


def combine(
    raw: Raw, weights: Mapping[str, float], stats: RunningStats, *, standardise: bool
) -> tuple[Array, RunningStats, dict[str, Array]]:
    """-> (scores f32[B], the statistics with this batch in them, metrics).

    Metrics, for each term: reward/NAME its mean, reward_sd/NAME its standard deviation, weighted/NAME what it adds to the
    mean score, share/NAME = cov(its part of the score, score) / var(score), its share of the score's variance: the shares
    sum to 1 (all are 0 where the scores do not differ), and say which term the policy in fact follows. A name without a
    weight has weight 1. Raises RewardError where the terms are not those of the statistics.
    """
    if differing := sorted(raw.keys() ^ stats.count.keys()):
        raise RewardError(
            f"reward terms must be the same for every batch; {', '.join(differing)} is there for some only"
        )
    stats = update_stats(stats, raw)
    metrics: dict[str, Array] = {}
    parts = {}
    for name, values in raw.items():
        metrics[f"reward/{name}"], metrics[f"reward_sd/{name}"] = values.mean(), values.std()
        if standardise:
            variance = stats.m2[name] / stats.count[name]
            # A term that never changes has nothing to say, and rounding is not a change.
            flat = variance <= 1e-10 * jnp.square(stats.mean[name])
            values = jnp.where(flat, 0.0, (values - stats.mean[name]) * jax.lax.rsqrt(jnp.where(flat, 1.0, variance)))
        parts[name] = weights.get(name, 1.0) * values
        metrics[f"weighted/{name}"] = parts[name].mean()
    scores = sum(parts.values(), start=jnp.zeros_like(next(iter(raw.values()))))
    variance = scores.var()
    varies = variance > 1e-12 * sum(jnp.square(part).mean() for part in parts.values())  # else rounding is all there is
    for name, part in parts.items():
        covariance = ((part - part.mean()) * (scores - scores.mean())).mean()
        metrics[f"share/{name}"] = jnp.where(varies, covariance / jnp.where(varies, variance, 1.0), 0.0)
    return scores, stats, metrics
