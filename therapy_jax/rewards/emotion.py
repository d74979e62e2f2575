"""Emotion: what the model states, and what a classifier reads in its words, against the annotation.

Two traps stand here. Exact match is 0 or 1, so a policy that is nearly right learns nothing from it: near misses earn a
share, by Plutchik's wheel. And where nine of ten annotations are "neutral", always saying "neutral" is nearly perfect: so
every gold class weighs the same in sum, and what a constant answer would earn is taken off. With likeness G and shares of
the gold classes in train prior_g,

    reward(said c, gold g) = (rho / prior_g) * (G[c, g] - mean over classes of G[c, .]),     rho = the smallest prior,

    sum_g prior_g * reward(c, g) = rho * sum_g (G[c, g] - mean G[c, .]) = 0     for every constant c.

>>> table = balanced(likeness(), jnp.full(len(EMOTIONS), 1 / 7))  # [said, gold]
>>> said, gold = EMOTIONS.index("depression"), EMOTIONS.index("sadness")
>>> bool(table[gold, gold] > table[said, gold] > table[EMOTIONS.index("joy"), gold])
True
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from therapy_jax.classifiers import Head
from therapy_jax.dialogue import EMOTIONS
from therapy_jax.gpt2 import Array, Params
from therapy_jax.rewards.batch import RewardBatch

RARE = 0.01  # share of annotated turns below which a class is left out: its weight would drown all others

# Plutchik (1980), "A general psychoevolutionary theory of emotion": angle on the wheel in degrees, and intensity.
WHEEL = {
    "neutral": (0.0, 0.0),
    "joy": (0.0, 1.0),
    "fear": (90.0, 1.0),
    "sadness": (180.0, 0.7),
    "depression": (180.0, 1.0),  # the wheel's "grief": sadness, more of it
    "disgust": (225.0, 1.0),
    "anger": (270.0, 1.0),
}


def likeness() -> Array:
    """1 - distance / 2 on the wheel, f32[E,E] in [0, 1]: 1 for the same emotion, 0.5 for neutral against any full one, 0 for
    opposites."""
    angle, radius = jnp.asarray([WHEEL[name] for name in EMOTIONS]).T
    points = radius[:, None] * jnp.stack([jnp.cos(jnp.radians(angle)), jnp.sin(jnp.radians(angle))], -1)
    difference = points[:, None] - points
    return 1.0 - jnp.sqrt(jnp.square(difference).sum(-1)) / 2.0


def balanced(likeness: Array, prior: Array) -> Array:
    """The equation above: likeness f32[C,C] in [0, 1] (said, gold), prior f32[C] -> reward table f32[C,C] in [-1, 1].

    A gold class rarer than RARE is too rare to be made up for, and earns nothing; with fewer than two others there is
    nothing to tell apart, and all is 0 (so it is on MESC, where 98 % of the therapist's turns are neutral).
    """
    present = prior >= RARE
    mean = jnp.where(present, likeness, 0.0).sum(-1, keepdims=True) / jnp.maximum(present.sum(), 1)
    rarest = jnp.where(present, prior, jnp.inf).min()
    weight = jnp.where(present, rarest / jnp.where(present, prior, 1.0), 0.0)
    return jnp.where(present.sum() > 1, weight * (likeness - mean), 0.0)


def of_gold(table: Array, gold: Array) -> Array:
    """Columns of a reward table: f32[C,C], i32[B] -> f32[B,C]; 0 where nothing is annotated (-1)."""
    return jnp.where((gold >= 0)[:, None], table.T[jnp.maximum(gold, 0)], 0.0)


def stated(batch: RewardBatch) -> Array:
    """Of the emotion that the reply states: f32[B] in [-1, 1]. Nothing readable earns what the worst emotion would."""
    rewards = of_gold(balanced(likeness(), batch.frozen.emotion_prior), batch.emotion)  # [B, E]
    said = jnp.take_along_axis(rewards, jnp.maximum(batch.stated_emotion, 0)[:, None], 1)[:, 0]
    return jnp.where(batch.stated_emotion >= 0, said, rewards.min(-1))


def probabilities(head: Params, reading: Array) -> Array:
    """A frozen classifier's answer: parameters of a classifiers.Head, reading f32[B,F] -> f32[B,C]."""
    kernel, member = head["member"]["classes"]["kernel"], head["member"]
    hidden = member["hidden"]["kernel"].shape[-1] if "hidden" in member else 0
    module = Head(classes=kernel.shape[-1], hidden=hidden, members=kernel.shape[0])
    return jax.nn.softmax(jnp.asarray(module.apply({"params": head}, reading)), -1)


def expressed(batch: RewardBatch) -> Array:
    """Of the emotion that the frozen classifier reads in the words: the mean under its probabilities, f32[B] in [-1, 1]."""
    rewards = of_gold(balanced(likeness(), batch.frozen.emotion_prior), batch.emotion)
    return (probabilities(batch.frozen.emotion, batch.reading) * rewards).sum(-1)
