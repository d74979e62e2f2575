"""One reply out of several sampled ones: the one most like the others (minimum Bayes risk decoding).

A sample is one thing that a therapist might say; a metric asks how close it comes to what one therapist did say. Where
u(r, s) is the closeness of r to s, the reply to give is the one of greatest expected closeness to what may be said,

    argmax_r  E_{s ~ p(. | prompt)} u(r, s)  ~  argmax_i  1 / (N - 1) sum_{j != i} u(r_i, r_j),

with the N samples as candidates and as evidence at once (Kumar & Byrne 2004; Eikema & Aziz 2020, "Is MAP decoding all you
need?"). Nothing but the model's own samples is read: neither references nor rewards. Here u is ROUGE-1 + 2 ROUGE-2 (F1), so
that shared phrases decide among replies that share their words. It costs N times the sampling, and variety, as a
lower temperature does, but for more overlap (README, MESC).

>>> most_agreed(["That is hard.", "Have you slept?", "I hear that it is hard.", "I hear you."])
2
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from therapy_jax import batching
from therapy_jax.gpt2 import Array
from therapy_jax.rewards.overlap import rouge_n
from therapy_jax.rewards.words import RUN

PAD_TO = 16  # words: few shapes, few programs


def agreement(words: Array, mask: Array) -> Array:
    """words i32[B,N,W] of N replies to each prompt, packed to the left under mask bool[B,N,W] -> f32[B,N], in [0, 3]: the
    mean of ROUGE-1 + 2 ROUGE-2 of each reply with the N - 1 others. N >= 2."""
    n = words.shape[1]

    def flat(x, by):  # reply i of a prompt meets its reply i + by
        return jnp.roll(x, -by, axis=1).reshape(-1, x.shape[2])

    def add(by, total):
        pair = flat(words, 0), flat(mask, 0), flat(words, by), flat(mask, by)
        return total + rouge_n(*pair, 1) + 2.0 * rouge_n(*pair, 2)

    return jax.lax.fori_loop(1, n, add, jnp.zeros(words.shape[0] * n)).reshape(words.shape[:2]) / (n - 1)


def most_agreed(replies: Sequence[str]) -> int:
    """Which of N >= 1 replies (texts) to one prompt agrees most with the others."""
    return choose([replies])[0]


def choose(candidates: Sequence[Sequence[str]]) -> list[int]:
    """`most_agreed` of each prompt's candidates, all prompts at once; the same number of candidates everywhere."""
    shape = (len(candidates), len(candidates[0]), -1)
    if shape[1] == 1:
        return [0] * len(candidates)
    number: defaultdict[str, int] = defaultdict(lambda: len(number))  # words as rouge-score sees them, numbered
    rows = [[number[word] for word in RUN.findall(text.lower())] for texts in candidates for text in texts]
    words, mask = batching.pad(rows, batching.round_up(max(map(len, rows)) or 1, PAD_TO), "right")
    return jax.jit(agreement)(words.reshape(shape), mask.reshape(shape)).argmax(1).tolist()
