"""The emotion that the model states, against the annotated one."""

from __future__ import annotations

import jax.numpy as jnp

from therapy_jax.gpt2 import Array
from therapy_jax.rewards.batch import RewardBatch


def stated(batch: RewardBatch) -> Array:
    """1 where the emotion that the reply states is the annotated one, else 0; 0 where nothing is annotated. f32[B]."""
    return ((batch.stated_emotion == batch.emotion) & (batch.emotion >= 0)).astype(jnp.float32)
