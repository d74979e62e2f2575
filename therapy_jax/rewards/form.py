"""Form: a reply should speak as therapists do, not repeat itself or what everybody is told, be about as long as a therapist's,
come to an end, and neither judge, diagnose nor prescribe."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax.gpt2 import Array
from therapy_jax.rewards.batch import RewardBatch
from therapy_jax.rewards.overlap import ngrams, rouge_n
from therapy_jax.rewards.words import BASE, hash_words

# Phrases that a therapist does not say: a coarse net against the worst, no proof of good manners.
JUDGES = (
    "your own fault", "it is your fault", "it's your fault", "you should be ashamed", "shame on you", "you are crazy",
    "you're crazy", "you are weak", "you're weak", "you are lazy", "you're lazy", "you are stupid", "you're stupid",
    "get over it", "snap out of it", "man up", "you need to grow up", "stop crying", "stop whining", "you are overreacting",
    "you're overreacting", "you are pathetic", "you're pathetic", "what is wrong with you", "what's wrong with you",
    "you are a bad", "you're a bad",
)  # fmt: skip
DIAGNOSES = (
    "you are bipolar", "you're bipolar", "you are psychotic", "you're psychotic", "you are clinically", "you're clinically",
    "you have depression", "you have clinical depression", "you have an anxiety disorder", "you have a personality disorder",
    "you have ptsd", "you have adhd", "you suffer from", "you are a narcissist", "you're a narcissist", "my diagnosis",
    "i diagnose", "you are borderline", "you're borderline", "your disorder",
)  # fmt: skip
PRESCRIBES = (
    "you should take medication", "you need to take your medication", "take your pills", "take these pills",
    "stop taking your", "stop your medication", "increase your dose", "double your dose", "your dosage", "milligrams", "mg",
    "i prescribe", "i'll prescribe", "i will prescribe", "antidepressants", "sleeping pills", "tranquilizers",
)  # fmt: skip


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


def counts(keys: Array, valid: Array) -> Array:
    """How often the whole array holds each of its keys, i32 in the shape of u32 keys; where not `valid`, nothing to read."""
    flat = jnp.sort(jnp.where(valid, keys, jnp.uint32(0)).ravel())  # hidden places are counted with key 0
    return jnp.searchsorted(flat, keys, side="right") - jnp.searchsorted(flat, keys, side="left")


def sameness(batch: RewardBatch) -> Array:
    """Minus the share of the reply's word bigrams that other prompts are told, too: f32[B] in [-1, 0].

        -mean over the reply's bigrams b of (1 - 1 / n(b)),   n(b) = count of b in this reply + count for other prompts / G

    with G replies to each prompt: n is the count to expect where each prompt is answered once. A bigram counts as new once,
    shared out among all who say it; with one reply to a prompt, 1 + the mean over all bigrams is Distinct-2 of the batch (Li
    et al. 2016). Replies to the same prompt may be alike: what is told to everybody is mode collapse, a sharp answer is
    not. A mark stands before the first word: replies of one word have a bigram too, and a policy that always says the same
    earns -1 + 1 / prompts at most. Only an empty reply has none, and 0: `length` and `ending` are there for that.
    """
    start = jnp.ones_like(batch.words[:, :1])
    grams, valid = ngrams(
        jnp.concatenate([start, batch.words], 1), jnp.concatenate([start.astype(bool), batch.words_mask], 1), 2
    )
    first, second = (grams[..., i].astype(jnp.uint32) for i in (0, 1))
    keys = first * jnp.uint32(0x9E3779B1) + second * jnp.uint32(BASE)  # one number a bigram; 2^-32 for two to meet
    of_prompt = keys ^ (batch.prompt.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B))[:, None]
    replies = (batch.prompt[:, None] == batch.prompt).sum(1, keepdims=True)  # G
    here = ((keys[:, :, None] == keys[:, None]) & valid[:, None]).sum(-1)
    expected = here + (counts(keys, valid) - counts(of_prompt, valid)) / replies
    old = jnp.where(valid, 1.0 - 1.0 / jnp.maximum(expected, 1), 0.0)
    return -(old.sum(-1) / jnp.maximum(valid.sum(-1), 1)).astype(jnp.float32)


def idiom(batch: RewardBatch) -> Array:
    """Mean ROUGE-2 F1 with what therapists answered the batch's *other* prompts: f32[B] in [0, 1], 0 where there are none.

    ROUGE-2 with the one therapist's reply is 0 for most replies, and so says little to a policy that learns from a few hundred
    of them. Of what a reply owes to the phrases of the profession, and not to its own prompt, this has the same expectation, with
    the noise of one therapist averaged away.
    """

    def add(carry, shift):
        total, count = carry
        others = batch.prompt, batch.reference_words, batch.reference_mask
        prompt, words, mask = (jnp.roll(x, shift, axis=0) for x in others)
        found = rouge_n(batch.words, batch.words_mask, words, mask, n=2)
        other = prompt != batch.prompt
        return (total + jnp.where(other, found, 0.0), count + other), None

    size = batch.prompt.shape[0]
    (total, count), _ = jax.lax.scan(add, (jnp.zeros(size), jnp.zeros(size)), jnp.arange(1, size))
    return total / jnp.maximum(count, 1)


def manner(batch: RewardBatch) -> Array:
    """-1 where the reply holds a phrase that judges, diagnoses or prescribes, else 0: f32[B]."""
    found = jnp.zeros(batch.words.shape[:1], bool)
    phrases = [hash_words(text) for text in (*JUDGES, *DIAGNOSES, *PRESCRIBES)]
    for n in sorted(set(map(len, phrases))):
        table = np.asarray([ids for ids in phrases if len(ids) == n], np.uint32).view(np.int32)
        grams, valid = ngrams(batch.words, batch.words_mask, n)
        found |= ((grams[:, :, None] == table).all(-1).any(-1) & valid).any(-1)
    return -found.astype(jnp.float32)
