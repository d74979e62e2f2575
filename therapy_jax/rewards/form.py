"""Form: a reply should not repeat itself, be about as long as a therapist's, and come to an end."""

from __future__ import annotations

import jax.numpy as jnp

from therapy_jax.gpt2 import Array
from therapy_jax.rewards.batch import RewardBatch
from therapy_jax.rewards.overlap import ngrams


def repetition(batch: RewardBatch) -> Array:
    """Minus the share of word bigrams that occurred before in the same reply: f32[B] in [-1, 0]."""
    grams, valid = ngrams(batch.words, batch.words_mask, 2)
    same = (grams[:, :, None] == grams[:, None]).all(-1) & valid[:, None] & valid[:, :, None]
    repeated = jnp.tril(same, -1).any(-1)
    return -(repeated.sum(-1) / jnp.maximum(valid.sum(-1), 1)).astype(jnp.float32)


def length(batch: RewardBatch) -> Array:
    """Minus the gap in words to the therapist's reply, relative to the longer of the two: f32[B] in [-1, 0]."""
    words, wanted = batch.words_mask.sum(-1), batch.reference_mask.sum(-1)
    return -(jnp.abs(words - wanted) / jnp.maximum(jnp.maximum(words, wanted), 1)).astype(jnp.float32)


def ending(batch: RewardBatch) -> Array:
    """1 for a reply that stops (EOS) at the end of a sentence, 0.5 for one that merely stops, 0 for one that was cut."""
    return jnp.where(batch.ended, jnp.where(batch.ends_sentence, 1.0, 0.5), 0.0)
