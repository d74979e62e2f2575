"""What every reward term reads: one NamedTuple of arrays, made on device from replies and references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from therapy_jax import batching, classifiers, gpt2, prompts, readings
from therapy_jax.classifiers import Frozen
from therapy_jax.dialogue import Exchange
from therapy_jax.gpt2 import Array, Params
from therapy_jax.rewards.words import Vocabulary, fold

PAD_TO = 32
CONTEXT_TOKENS = 64  # of the turns before, the newest: what a reply can be about


class References(NamedTuple):
    """What the data says about each prompt. Readings are mean hidden states of the trunk, of each text alone."""

    prompt: Array  # i32[B], which prompt it is: several replies to one prompt have the same number
    tokens: Array  # i32[B, Q], the therapist's reply text, padded on the right
    mask: Array  # bool[B, Q]
    client_tokens: Array  # i32[B, C], the client's utterance
    client_mask: Array  # bool[B, C]
    reading: Array  # f32[B, D], of the therapist's reply
    client_reading: Array  # f32[B, D]
    context_reading: Array  # f32[B, D], of the turns before as one text; 0 where there is none
    emotion: Array  # i32[B], annotated emotion of the therapist's reply (index into EMOTIONS); -1 = not annotated
    strategy: Array  # i32[B], likewise into STRATEGIES


class RewardBatch(NamedTuple):
    """Replies and references as the terms see them. Words are ids (see words.fold), packed to the left."""

    prompt: Array  # i32[B], which prompt is answered: several replies to one prompt have the same number
    tokens: Array  # i32[B, R], as generated
    text_mask: Array  # bool[B, R], the reply's text: no stated emotion, no markers, no EOS
    words: Array  # i32[B, W] of that text
    words_mask: Array  # bool[B, W]
    reference_words: Array  # i32[B, Q]
    reference_mask: Array  # bool[B, Q]
    client_words: Array  # i32[B, C]
    client_mask: Array  # bool[B, C]
    meaning: Array  # f32[B, M], what the reply says, as a point among the therapists' replies
    reference_meaning: Array  # f32[B, M]; like the next two, 0 where there is no text
    client_meaning: Array  # f32[B, M]
    context_meaning: Array  # f32[B, M]
    reading: Array  # f32[B, F], of the reply: what the classifiers see
    stated_emotion: Array  # i32[B], what the model wrote before <|text|>; -1 = nothing readable
    emotion: Array  # i32[B], annotated; -1 = not annotated
    strategy: Array  # i32[B], annotated; -1 = not annotated
    ended: Array  # bool[B], the reply has an EOS
    ends_sentence: Array  # bool[B], its last token of text ends a sentence
    frozen: Frozen  # the classifiers' parameters, shares of the labels in train


def make_references(
    exchanges: Sequence[Exchange], trunk: Params, tokenizer: Any, *, model: gpt2.GPT2,
    at_once: int = readings.TOKENS_AT_ONCE,
) -> References:  # fmt: skip
    """What the data says about each exchange, as host arrays. `at_once`: tokens that the trunk reads in one batch."""
    replies, clients, before = (
        [prompts.encode_text(tokenizer, text) for text in texts]
        for texts in (
            [e.therapist.text for e in exchanges],
            [e.client.text for e in exchanges],
            [" ".join(turn.text for turn in e.context) for e in exchanges],
        )
    )
    before = [row[-CONTEXT_TOKENS:] if e.context else [] for row, e in zip(before, exchanges, strict=True)]

    def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        return batching.pad(rows, batching.round_up(max(map(len, rows)), PAD_TO), "right")

    emotion = classifiers.label_ids("emotion", exchanges)[1::2]  # of client and therapist in turn
    arrays: list[Any] = [
        np.arange(len(exchanges), dtype=np.int32),
        *padded(replies),
        *padded(clients),
        *(readings.means(trunk, rows, model=model, at_once=at_once) for rows in (replies, clients, before)),
        *(ids.astype(np.int32) for ids in (emotion, classifiers.label_ids("strategy", exchanges))),
    ]
    return References(*arrays)


def first(hits: Array) -> Array:
    """Column of the first True of each row, bool[B,R] -> i32[B]; R where there is none."""
    return jnp.where(hits.any(1), jnp.argmax(hits, 1), hits.shape[1])


class Fixed(NamedTuple):
    """What scoring needs beside the trunk and stays the same for a whole run."""

    vocabulary: Vocabulary
    frozen: Frozen


def make(
    trunk: Params, tokens: Array, mask: Array, references: References, fixed: Fixed, *, model: gpt2.GPT2
) -> RewardBatch:
    """Generated tokens i32[B,R] and mask bool[B,R] (up to and including EOS) -> RewardBatch. `trunk`: the frozen SFT model.

    The reply's structure is [client emotion <|reply|>] emotion <|text|> text EOS; without <|text|> all of it is text.
    """
    vocabulary, frozen = fixed
    length = tokens.shape[1]
    column = jnp.arange(length)
    is_eos = (tokens == vocabulary.eos) & mask
    inside = mask & (column < first(is_eos)[:, None])
    border = first((tokens == vocabulary.text) & inside)
    has_text = border < length
    text = inside & (~has_text[:, None] | (column > border[:, None]))
    words, words_mask = fold(tokens, text, vocabulary)
    reading = readings.read(trunk, tokens, text, model=model)

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

    last = jnp.max(jnp.where(text & ~vocabulary.closing[tokens], column, -1), axis=1)
    last_token = jnp.take_along_axis(tokens, jnp.maximum(last, 0)[:, None], 1)[:, 0]
    reference_words, reference_mask = fold(references.tokens, references.mask, vocabulary)
    client_words, client_mask = fold(references.client_tokens, references.client_mask, vocabulary)
    return RewardBatch(
        prompt=references.prompt,
        tokens=tokens,
        text_mask=text,
        words=words,
        words_mask=words_mask,
        reference_words=reference_words,
        reference_mask=reference_mask,
        client_words=client_words,
        client_mask=client_mask,
        meaning=meaning_of(reading, frozen),
        reference_meaning=meaning_of(references.reading, frozen),
        client_meaning=meaning_of(references.client_reading, frozen),
        context_meaning=meaning_of(references.context_reading, frozen),
        reading=reading,
        stated_emotion=stated.astype(jnp.int32),
        emotion=references.emotion,
        strategy=references.strategy,
        ended=is_eos.any(1),
        ends_sentence=(last >= 0) & vocabulary.final[last_token],
        frozen=frozen,
    )


def meaning_of(reading: Array, frozen: Frozen) -> Array:
    """Mean hidden state (the first D entries) -> a point whose directions count alike, f32[B,M]; 0 for that of no text.

    Raw hidden states of a language model all point the same way (their cosines are near 1), so they are centred and
    whitened over the therapists' replies of train (Su et al. 2021, "Whitening Sentence Representations").
    """
    mean = reading[:, : frozen.centre.shape[0]]
    return jnp.where((mean != 0).any(-1, keepdims=True), (mean - frozen.centre) @ frozen.whiten, 0.0)
