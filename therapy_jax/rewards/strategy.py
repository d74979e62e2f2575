"""Strategy: the therapeutic logic. Each therapist turn of the data is annotated with what it does (asks openly, restates,
interprets, ...); a frozen classifier says how well the reply does that."""

from __future__ import annotations

import jax.numpy as jnp

from therapy_jax.gpt2 import Array
from therapy_jax.rewards.batch import RewardBatch
from therapy_jax.rewards.emotion import balanced, of_gold, probabilities


def strategy(batch: RewardBatch) -> Array:
    """The classifier's probability of the annotated strategy, balanced as emotion is (likeness: the same or not), so that
    doing one thing always earns nothing: f32[B] in [-1, 1], 0 where nothing is annotated."""
    prior = batch.frozen.strategy_prior
    rewards = of_gold(balanced(jnp.eye(prior.shape[0]), prior), batch.strategy)
    return (probabilities(batch.frozen.strategy, batch.reading) * rewards).sum(-1)
