"""Meaning: like the therapist's reply in what it says, and about what the client said, without repeating it."""

from __future__ import annotations

import jax.numpy as jnp

from therapy_jax.gpt2 import Array
from therapy_jax.rewards.batch import RewardBatch
from therapy_jax.rewards.overlap import common_subsequence


def cosine(a: Array, b: Array) -> Array:
    """a . b / (|a| |b|) over the last axis, in [-1, 1]; 0 where either is 0."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.where(norms > 0, (a * b).sum(-1) / jnp.where(norms > 0, norms, 1.0), 0.0)


def semantic(batch: RewardBatch) -> Array:
    """Cosine of the reply's meaning and that of the therapist's reply: f32[B] in [-1, 1]."""
    return cosine(batch.meaning, batch.reference_meaning)


def copied(batch: RewardBatch) -> Array:
    """Share of the reply's words that stand in the client's utterance in the same order: f32[B] in [0, 1]."""
    common = common_subsequence(batch.words, batch.words_mask, batch.client_words, batch.client_mask)
    return common / jnp.maximum(batch.words_mask.sum(-1), 1)


def context(batch: RewardBatch) -> Array:
    """Relevance to what was said, less what was merely said back: f32[B] in [0, 1].

        max(0, mean cosine to the client's utterance and, where there are any, to the turns before) * (1 - copied)

    An echo is as like the client as can be, and earns nothing.
    """
    to_client = cosine(batch.meaning, batch.client_meaning)
    to_context = cosine(batch.meaning, batch.context_meaning)
    has_context = (batch.context_meaning != 0).any(-1)
    relevance = jnp.where(has_context, (to_client + to_context) / 2, to_client)
    return jnp.maximum(relevance, 0.0) * (1.0 - copied(batch))
