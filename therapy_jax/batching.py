"""Examples -> device-ready batches. The order is a pure function of (seed, epoch): a step number is a place in the data.

Training sequences are padded on the right; prompts for generation on the left, replies on the right, so that all replies
of a batch start in the same column. Every mask comes from lengths, never from comparing ids with a padding id.

>>> tokens, mask = pad([[5, 6], [7]], 3, "left")
>>> tokens.tolist(), mask.sum(1).tolist()
([[0, 5, 6], [0, 0, 7]], [2, 1])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from therapy_jax.attention import Layout
from therapy_jax.prompts import Example


class Batch(NamedTuple):
    """Sequences to train on. Token t is a target, predicted from the tokens before it, where loss_mask is True."""

    tokens: np.ndarray  # i32[B, T]
    attention_mask: np.ndarray | None  # bool[B, T], True = a real token; None = padding, if any, stands on the right
    loss_mask: np.ndarray  # bool[B, T]
    layout: Layout | None = None  # None = each row is one text, read from left to right


class Prompt(NamedTuple):
    """What generation starts from."""

    tokens: np.ndarray  # i32[B, P], padded on the left
    mask: np.ndarray  # bool[B, P]


def round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def pad(rows: Sequence[Sequence[int]], length: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> (i32[B, length], bool[B, length]). Raises ValueError where a row is longer."""
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens, more than the length {length} it is padded to")
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where] = row
        mask[i, where] = True
    return tokens, mask


def supervised(examples: Sequence[Example], batch_size: int, length: int) -> Batch:
    """Prompt + reply, loss on the reply. Missing rows (the last batch of an epoch) are empty and count for nothing."""
    rows = [e.prompt + e.reply for e in examples] + [[]] * (batch_size - len(examples))
    tokens, mask = pad(rows, length, "right")
    loss_mask = mask.copy()
    for i, e in enumerate(examples):
        loss_mask[i, : len(e.prompt)] = False
    return Batch(tokens, mask, loss_mask)


def unsupervised(blocks: np.ndarray) -> Batch:
    """Blocks of plain text, i32[B, T]: every token is a target but the first, which nothing comes before."""
    mask = np.ones(blocks.shape, bool)
    loss_mask = mask.copy()
    loss_mask[:, 0] = False
    return Batch(blocks, mask, loss_mask)


def without_mask(batch: Batch) -> Batch:
    """The same to a model that reads from left to right: padding on the right is seen by nothing that counts, and attention is
    faster where nobody has to be told so. As it was where padding stands elsewhere."""
    mask = batch.attention_mask
    if mask is None or batch.layout is not None or (mask[:, 1:] & ~mask[:, :-1]).any():
        return batch
    return batch._replace(attention_mask=None)


def prompts(rows: Sequence[Sequence[int]], length: int) -> Prompt:
    return Prompt(*pad(rows, length, "left"))


def text_blocks(documents: Iterable[Sequence[int]], eos: int, length: int) -> np.ndarray:
    """Documents -> one stream, an EOS after each -> i32[N, length]; the tail that fills no block is left out."""
    stream = [i for document in documents for i in (*document, eos)]
    n = len(stream) // length
    return np.asarray(stream[: n * length], np.int32).reshape(n, length)


def epoch_batches(
    lengths: Sequence[int], batch_size: int, pad_to: int, seed: int, epoch: int
) -> list[tuple[np.ndarray, int]]:
    """One pass over the data -> [(indices, padded length)], each index exactly once.

    Shuffled, then sorted by length within windows of 16 batches, so that a batch holds like lengths and little padding,
    then the batches are shuffled. Only the last batch of the sorted order may be smaller than batch_size.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    sizes = np.asarray(lengths)
    window = 16 * batch_size
    parts = [order[i : i + window] for i in range(0, len(order), window)]
    order = np.concatenate([part[np.argsort(sizes[part], kind="stable")] for part in parts])
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = [(chunk, round_up(int(sizes[chunk].max()), pad_to)) for chunk in chunks]
    return [batches[i] for i in random.permutation(len(batches))]


def rollout_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which prompts iteration `step` answers: passes over a permutation that changes with each pass -> i64[batch_size]."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {p: np.random.default_rng((seed, p)).permutation(n) for p in set((places // n).tolist())}
    return np.asarray([orders[p][i] for p, i in zip((places // n).tolist(), places % n, strict=True)])
