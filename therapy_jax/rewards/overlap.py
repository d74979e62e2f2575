"""Overlap with the therapist's reply: ROUGE and BLEU on arrays of word ids, a whole batch at once.

All take hyp i32[B,W], hyp_mask bool[B,W], ref i32[B,Q], ref_mask bool[B,Q], words packed to the left, and give f32[B] in
[0, 1]. They equal rouge-score (without stemming) and nltk on the same words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from therapy_jax.gpt2 import Array


def ngrams(words: Array, mask: Array, n: int) -> tuple[Array, Array]:
    """i32[B,W] -> [B,W,n] with the n-gram that starts at each place, and bool[B,W]: it lies within the words."""
    width = words.shape[1]
    padded = jnp.pad(words, ((0, 0), (0, n - 1)))
    valid = jnp.pad(mask, ((0, 0), (0, n - 1)))
    grams = jnp.stack([padded[:, i : i + width] for i in range(n)], -1)
    return grams, jnp.stack([valid[:, i : i + width] for i in range(n)], -1).all(-1)


def matches(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array, n: int) -> tuple[Array, Array, Array]:
    """Clipped n-gram matches, n-grams in hyp, n-grams in ref, f32[B] each.

    sum over distinct n-grams of min(count in hyp, count in ref), counted without sets: the k-th occurrence in hyp (k from
    0) is a match if ref holds the n-gram more than k times.
    """
    hyp, hyp_mask = ngrams(hyp, hyp_mask, n)
    ref, ref_mask = ngrams(ref, ref_mask, n)
    in_hyp = (hyp[:, :, None] == hyp[:, None]).all(-1) & hyp_mask[:, None]
    earlier = jnp.tril(in_hyp, -1).sum(-1)
    in_ref = ((hyp[:, :, None] == ref[:, None]).all(-1) & ref_mask[:, None]).sum(-1)
    hits, in_hyp, in_ref = (x.sum(-1).astype(jnp.float32) for x in (hyp_mask & (earlier < in_ref), hyp_mask, ref_mask))
    return hits, in_hyp, in_ref


def f1(hits: Array, in_hyp: Array, in_ref: Array) -> Array:
    """2PR / (P + R) with P = hits / in_hyp and R = hits / in_ref, which is 2 hits / (in_hyp + in_ref); 0 of 0 is 0."""
    return 2.0 * hits / jnp.maximum(in_hyp + in_ref, 1.0)


def rouge_n(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array, n: int) -> Array:
    """ROUGE-N F1 (Lin 2004, section 2)."""
    return f1(*matches(hyp, hyp_mask, ref, ref_mask, n))


def recall(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array) -> Array:
    """ROUGE-1 recall: the share of the reference's words that hyp says. F1 forgives a short reply what it leaves unsaid."""
    hits, _, in_ref = matches(hyp, hyp_mask, ref, ref_mask, 1)
    return hits / jnp.maximum(in_ref, 1.0)


def common_subsequence(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array) -> Array:
    """Length of the longest common subsequence in words, f32[B].

    One row of the classic table per word of hyp: new[j] = max(old[j], new[j-1], old[j-1] + 1 if the words are equal). Rows
    never fall, so the dependence on new[j-1] is a running maximum, and a row is one vector operation.
    """

    def next_row(row, word_and_mask):
        word, counts = word_and_mask
        equal = (word[:, None] == ref) & ref_mask & counts[:, None]
        diagonal = jnp.where(equal, jnp.pad(row, ((0, 0), (1, 0)))[:, :-1] + 1, 0)
        return jax.lax.cummax(jnp.maximum(row, diagonal), axis=1), None

    row, _ = jax.lax.scan(next_row, jnp.zeros(ref.shape, jnp.int32), (hyp.T, hyp_mask.T))
    return row[:, -1].astype(jnp.float32)


def rouge_l(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array) -> Array:
    """ROUGE-L F1 (Lin 2004, section 3): F1 of the longest common subsequence."""
    return f1(common_subsequence(hyp, hyp_mask, ref, ref_mask), hyp_mask.sum(-1), ref_mask.sum(-1))


def bleu(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array) -> Array:
    """Sentence BLEU-4 (Papineni et al. 2002) with nltk's smoothing method 1: an order without a match counts as 0.1 match
    (Chen & Cherry 2014). brevity penalty * exp(mean log precision); 0 where not even a word matches."""
    logs = []
    for n in range(1, 5):
        hits, total, _ = matches(hyp, hyp_mask, ref, ref_mask, n)
        logs.append(jnp.log(jnp.where(hits == 0, 0.1, hits) / jnp.maximum(total, 1.0)))
        if n == 1:
            none = hits == 0
    hyp_length, ref_length = hyp_mask.sum(-1), ref_mask.sum(-1)
    brevity = jnp.minimum(1.0 - ref_length / jnp.maximum(hyp_length, 1), 0.0)
    return jnp.where(none, 0.0, jnp.exp(brevity + sum(logs) / 4))
