"""What every reward term reads: one NamedTuple of arrays, made on device from replies and references."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from therapy_jax.gpt2 import Array
from therapy_jax.rewards.words import Vocabulary, fold


class References(NamedTuple):
    """What the data says about each prompt."""

    tokens: Array  # i32[B, Q], the therapist's reply text, padded on the right
    mask: Array  # bool[B, Q]
    emotion: Array  # i32[B], annotated emotion of that reply (index into dialogue.EMOTIONS); -1 = not annotated


class RewardBatch(NamedTuple):
    """Replies and references as the terms see them. Words are ids (see words.fold), packed to the left."""

    words: Array  # i32[B, W] of the reply's text
    words_mask: Array  # bool[B, W]
    reference_words: Array  # i32[B, Q]
    reference_mask: Array  # bool[B, Q]
    stated_emotion: Array  # i32[B], what the model wrote before <|text|>; -1 = nothing readable
    emotion: Array  # i32[B], annotated; -1 = not annotated
    ended: Array  # bool[B], the reply has an EOS
    ends_sentence: Array  # bool[B], its last token of text ends a sentence


def first(hits: Array) -> Array:
    """Column of the first True of each row, bool[B,R] -> i32[B]; R where there is none."""
    return jnp.where(hits.any(1), jnp.argmax(hits, 1), hits.shape[1])


def make(tokens: Array, mask: Array, references: References, vocabulary: Vocabulary) -> RewardBatch:
    """Generated tokens i32[B,R] and mask bool[B,R] (up to and including EOS) -> RewardBatch.

    The reply's structure is [client emotion <|reply|>] emotion <|text|> text EOS; without <|text|> all of it is text.
    """
    length = tokens.shape[1]
    column = jnp.arange(length)
    is_eos = (tokens == vocabulary.eos) & mask
    inside = mask & (column < first(is_eos)[:, None])
    border = first((tokens == vocabulary.text) & inside)
    has_text = border < length
    text = inside & (~has_text[:, None] | (column > border[:, None]))
    words, words_mask = fold(tokens, text, vocabulary)

    # The stated emotion: the tokens from after <|reply|> (or the start) up to <|text|>, against each emotion word.
    reply = first((tokens == vocabulary.reply) & inside & (column < border[:, None]))
    start = jnp.where(reply < length, reply + 1, 0)
    places = start[:, None] + jnp.arange(
        vocabulary.emotions.shape[1] + 1
    )  # one more than any word, to see that it ends
    written = jnp.take_along_axis(tokens, jnp.minimum(places, length - 1), 1)
    written = jnp.where(places < border[:, None], written, -1)  # [B, K+1], padded like the table
    table = jnp.pad(vocabulary.emotions, ((0, 0), (0, 1)), constant_values=-1)
    same = (written[:, None] == table).all(-1) & has_text[:, None]  # [B, E]
    stated = jnp.where(same.any(1), jnp.argmax(same, 1), -1)

    last = jnp.max(jnp.where(text, column, -1), axis=1)
    last_token = jnp.take_along_axis(tokens, jnp.maximum(last, 0)[:, None], 1)[:, 0]
    reference_words, reference_mask = fold(references.tokens, references.mask, vocabulary)
    return RewardBatch(
        words=words,
        words_mask=words_mask,
        reference_words=reference_words,
        reference_mask=reference_mask,
        stated_emotion=stated.astype(jnp.int32),
        emotion=references.emotion,
        ended=is_eos.any(1),
        ends_sentence=(last >= 0) & vocabulary.final[last_token],
    )
