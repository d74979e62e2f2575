"""Overlap with the therapist's reply: ROUGE and BLEU on arrays of word ids, a whole batch at once.

All take hyp i32[B,W], hyp_mask bool[B,W], ref i32[B,Q], ref_mask bool[B,Q], words packed to the left, and give f32[B] in
[0, 1]. They equal rouge-score (without stemming) and nltk on the same words.

One comparison of every word with every other is all that they read (each asks for it; XLA merges the equal ones of a
program), kept as bits: `places` says of each word where it stands in the other text, one bit a place. Counting is then a
population count, an n-gram is an AND of shifted bits, and a whole row of the table of the longest common subsequence is one
addition. The batch is the last axis throughout, so that replies, not bits, lie side by side in a vector register.

>>> hyp, ref = jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 2, 5, 4]])  # words, numbered
>>> mask = jnp.ones((1, 4), bool)
>>> [rouge_n(hyp, mask, ref, mask, n=1).tolist(), rouge_l(hyp, mask, ref, mask).tolist(), recall(hyp, mask, ref, mask).tolist()]
[[0.75], [0.75], [0.75]]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax.gpt2 import Array

BITS = 32  # of one limb; a text has as many limbs as it needs


def ngrams(words: Array, mask: Array, n: int) -> tuple[Array, Array]:
    """i32[B,W] -> [B,W,n] with the n-gram that starts at each place, and bool[B,W]: it lies within the words."""
    width = words.shape[1]
    padded = jnp.pad(words, ((0, 0), (0, n - 1)))
    valid = jnp.pad(mask, ((0, 0), (0, n - 1)))
    grams = jnp.stack([padded[:, i : i + width] for i in range(n)], -1)
    return grams, jnp.stack([valid[:, i : i + width] for i in range(n)], -1).all(-1)


def places(words: Array, mask: Array, others: Array, others_mask: Array) -> Array:
    """u32[L,W,B]: bit q of limb l is set where word w of a row is its other text's word 32 l + q; none beyond the masks."""
    limbs = -(-others.shape[1] // BITS)

    def by_limb(x):  # [B,Q] -> [L,32,1,B]
        return jnp.pad(x, ((0, 0), (0, limbs * BITS - x.shape[1]))).T.reshape(limbs, BITS, 1, -1)

    bit = (jnp.uint32(1) << jnp.arange(BITS, dtype=jnp.uint32))[:, None, None]
    inside = jnp.where(by_limb(others_mask), bit, jnp.uint32(0)).sum(1, dtype=jnp.uint32)
    equal = jnp.where(by_limb(others) == words.T, bit, jnp.uint32(0)).sum(1, dtype=jnp.uint32)
    return jnp.where(mask.T, equal & inside, jnp.uint32(0))


def places_of_ngrams(bits: Array, n: int) -> Array:
    """`places` -> the same for the n-grams that start at each word: word w + i must stand at place q + i, for all i < n."""
    limbs, found = bits.shape[0], bits
    for i in range(1, n):
        later = jnp.pad(bits[:, i:], ((0, 1), (0, min(i, bits.shape[1])), (0, 0)))
        found &= (later[:limbs] >> i) | (later[1:] << (BITS - i))  # what leaves one limb enters the one before
    return found


def matches(hyp: Array, hyp_mask: Array, ref: Array, ref_mask: Array, n: int) -> tuple[Array, Array, Array]:
    """Clipped n-gram matches, n-grams in hyp, n-grams in ref, f32[B] each.

    sum over distinct n-grams of min(count in hyp, count in ref), counted without sets: the k-th occurrence in hyp (k from
    0) is a match if ref holds the n-gram more than k times.
    """
    in_ref = places_of_ngrams(places(hyp, hyp_mask, ref, ref_mask), n)
    in_hyp = places_of_ngrams(places(hyp, hyp_mask, hyp, hyp_mask), n)
    limbs, width, _ = in_hyp.shape
    before = np.tril(np.ones((width, limbs * BITS), np.uint32), -1).reshape(width, limbs, BITS)
    before = (before << np.arange(BITS, dtype=np.uint32)).sum(-1, dtype=np.uint32).T[..., None]  # bits of places < w
    earlier, there = (jax.lax.population_count(x).sum(0) for x in (in_hyp & before, in_ref))
    total = (jnp.maximum(mask.sum(1) - n + 1, 0) for mask in (hyp_mask, ref_mask))
    hits, in_hyp, in_ref = (x.astype(jnp.float32) for x in ((earlier < there).sum(0), *total))
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

    A row of the classic table never falls and rises by at most 1, so it is kept as bits V: 0 where it rises. With M the
    places of the next word of hyp, the next row is (V + (V & M)) | (V & ~M) (Hyyro 2004, "Bit-parallel LCS-length
    computation revisited"): the carry of the addition moves each rise down to the first match after the rise before it.
    """

    def next_row(rows, found):
        moved, carry = [], jnp.zeros(rows.shape[1:], jnp.uint32)
        for row, match in zip(rows, found, strict=True):
            summed = row + (row & match)
            with_carry = summed + carry
            carry = ((summed < row) | (with_carry < summed)).astype(jnp.uint32)
            moved.append(with_carry | (row & ~match))
        return jnp.stack(moved), None

    bits = places(hyp, hyp_mask, ref, ref_mask).swapaxes(0, 1)
    rows, _ = jax.lax.scan(next_row, jnp.full(bits.shape[1:], 2**BITS - 1, jnp.uint32), bits, unroll=8)
    return jax.lax.population_count(~rows).sum(0).astype(jnp.float32)


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
