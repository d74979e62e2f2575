"""Sub-words -> words, on device: what rouge-score does to text, done to tokens.

Overlap counted on sub-words rewards accidents of the tokenizer, and full stops. So replies are first folded into words as
rouge-score sees them: lower-cased, everything but a-z and 0-9 is a gap. A word's id is a hash of its letters,

    hash(w_1 .. w_n) = sum_i code(w_i) * BASE^(n-i)  mod 2^32,

which can be put together from pieces, since appending a piece x of length k is the affine map  h -> h * BASE^k + hash(x).
Affine maps compose associatively, so one `associative_scan` along a row hashes all of its words at once. What each token
contributes is looked up in tables made once from the tokenizer.

>>> hash_words("Don't") == hash_words("don t"), hash_words("ab") == [(ord("a") * BASE + ord("b")) % 2**32]
(True, True)
"""

from __future__ import annotations

import re
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax.gpt2 import Array
from therapy_jax.prompts import emotion_ids

BASE = 0x01000193  # odd, so that multiplying loses nothing modulo 2^32
RUN = re.compile(r"[a-z0-9]+")
CLOSING = "\"')]*”’»" + string.whitespace + "\ufffd"  # the last: a piece of a mark that the tokenizer cuts into bytes


class Vocabulary(NamedTuple):
    """What the reward terms need to know of each token, indexed by token id."""

    has_letters: Array  # bool[V], the token holds a piece of a word
    gap_before: Array  # bool[V], that piece does not continue the word before it
    gap_after: Array  # bool[V], the word ends with it
    power: Array  # u32[V], BASE ** number of its letters and digits
    hash: Array  # u32[V]
    final: Array  # bool[V], it ends a sentence, closing marks aside
    closing: Array  # bool[V], it is nothing but closing marks and white space
    emotions: Array  # i32[E, K], the tokens of each emotion word, padded with -1
    eos: Array  # i32[], likewise the ids that give a reply its structure
    text: Array  # i32[], <|text|>
    reply: Array  # i32[], <|reply|>


def hash_words(text: str) -> list[int]:
    """The hash of each word of a text, as `fold` computes it from tokens; on the host, for tables of words and phrases."""
    values = []
    for word in RUN.findall(text.lower()):
        value = 0
        for letter in word.encode():
            value = (value * BASE + letter) % 2**32
        values.append(value)
    return values


def make_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Tables for a tokenizer; `size` >= len(tokenizer), usually the padded vocabulary. A token with two separate runs of
    letters (none in GPT-2's pre-tokenization of ASCII text) counts with its last one."""
    special = set(tokenizer.all_special_ids)
    has, before, after, final, closing = (np.zeros(size, bool) for _ in range(5))
    power, hashes = np.ones(size, np.uint32), np.zeros(size, np.uint32)
    before[:] = after[:] = True
    for i in range(len(tokenizer)):
        text = "" if i in special else tokenizer.decode([i], clean_up_tokenization_spaces=False).lower()
        runs = RUN.findall(text)
        core = text.rstrip(CLOSING)
        final[i], closing[i] = core.endswith((".", "?", "!")), text != "" and core == ""
        if runs:
            has[i], before[i], after[i] = True, not RUN.match(text), not RUN.match(text[-1])
            before[i] |= len(runs) > 1
            hashes[i], power[i] = hash_words(runs[-1])[0], pow(BASE, len(runs[-1]), 2**32)
    words = emotion_ids(tokenizer)
    table = np.full((len(words), max(map(len, words))), -1, np.int32)
    for row, ids in zip(table, words, strict=True):
        row[: len(ids)] = ids
    ids = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|text|>", "<|reply|>"])]
    arrays = has, before, after, power, hashes, final, closing, table, *(np.int32(i) for i in ids)
    return Vocabulary(*(jnp.asarray(x) for x in arrays))


def fold(tokens: Array, mask: Array, vocabulary: Vocabulary) -> tuple[Array, Array]:
    """Tokens i32[B,R] under a mask bool[B,R] (anywhere in the row) -> word ids i32[B,R] and their mask bool[B,R], packed to
    the left: as many as the text has words, at most one per token."""
    v = vocabulary
    has = v.has_letters[tokens] & mask
    gap_after = v.gap_after[tokens] | ~has
    starts = has & (v.gap_before[tokens] | jnp.pad(gap_after, ((0, 0), (1, 0)), constant_values=True)[:, :-1])
    ends = has & (gap_after | jnp.pad(starts | ~has, ((0, 0), (0, 1)), constant_values=True)[:, 1:])

    # (power, hash) is the map h -> h * power + hash. Power 0 forgets what came before: a word starts.
    power = jnp.where(starts, jnp.uint32(0), jnp.where(has, v.power[tokens], jnp.uint32(1)))
    hashes = jnp.where(has, v.hash[tokens], jnp.uint32(0))
    _, hashes = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (power, hashes), axis=1)

    column = jnp.where(ends, jnp.cumsum(ends, 1) - 1, tokens.shape[1])  # one past the end: dropped by the scatter
    row = jnp.arange(tokens.shape[0])[:, None]
    ids = jnp.zeros(tokens.shape, jnp.uint32).at[row, column].set(hashes, mode="drop")
    return jax.lax.bitcast_convert_type(ids, jnp.int32), jnp.arange(tokens.shape[1]) < ends.sum(1, keepdims=True)
