"""A conversation's exchanges share their context. Read once for each exchange, five exchanges of a conversation cost its
first turns five times; here they are read once, as a trunk, and each exchange is a branch of it:

    trunk     <|client|> She left. <|therapist|> When was that? <|client|> On Sunday. <|therapist|> That is recent. ...
                                                               │                                                  │
    branches  ▲ <|utterance|> She left. ... reply EOS          └ <|utterance|> On Sunday. ... reply EOS           └ ...

Trunk and branches stand one after the other in a row, and other conversations' after them. A token of a branch sees the
branch up to itself and the trunk up to where the branch leaves it, at the positions that they would have alone: what it
reads is what it would read in a sequence of its own, whatever the prompt's format, so every loss is the same
(tests/test_packing.py). Where prompt.max_tokens has cut the oldest turns off, the context is no longer the trunk's
beginning, and such an exchange gets a trunk of its own: nothing is shared, nothing differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from therapy_jax.attention import Layout
from therapy_jax.batching import Batch
from therapy_jax.dialogue import DataError
from therapy_jax.prompts import Example


class Tree(NamedTuple):
    """Exchanges whose contexts are all the beginning of one trunk."""

    trunk: list[int]
    branches: list[Example]

    def size(self) -> int:
        return len(self.trunk) + sum(len(e.prompt) - e.context_tokens + len(e.reply) for e in self.branches)


def trees(conversation: Iterable[Example], longest: int) -> list[Tree]:
    """One conversation's examples, in order -> trees of at most `longest` tokens. Raises DataError where a single one has
    more."""
    found: list[Tree] = []
    for example in conversation:
        context = example.prompt[: example.context_tokens]
        if found:
            tree = found[-1]
            trunk = max(tree.trunk, context, key=len)
            grown = Tree(trunk, [*tree.branches, example])
            if trunk[: len(tree.trunk)] == tree.trunk and trunk[: len(context)] == context and grown.size() <= longest:
                found[-1] = grown
                continue
        found.append(Tree(context, [example]))
        if found[-1].size() > longest:
            raise DataError(
                f"an exchange has {found[-1].size()} tokens, more than sft.row_tokens ({longest}); raise it"
            )
    return found


def pack(trees: Sequence[Tree], row_tokens: int, seed: int) -> list[list[Tree]]:
    """Trees, in random order, each into the first row that has room for it -> rows of at most row_tokens tokens."""
    rows: list[list[Tree]] = []
    room: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(trees)):
        size = trees[i].size()
        place = next((r for r, left in enumerate(room) if left >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[place].append(trees[i])
        room[place] -= size
    return rows


def packed(rows: Sequence[Sequence[Tree]], batch_size: int, row_tokens: int) -> Batch:
    """Rows of trees -> Batch of [batch_size, row_tokens], loss on every reply. Missing rows are empty and count for nothing."""
    shape = (batch_size, row_tokens)
    tokens, loss_mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    position, start = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    stretch, parent = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    for r, row in enumerate(rows):
        end = number = 0

        def add(ids: list[int], begins: int, belongs_to: int, reply: int, r: int = r) -> int:
            nonlocal end, number
            here = slice(end, end + len(ids))
            tokens[r, here], stretch[r, here], parent[r, here] = ids, number, belongs_to
            position[r, here], start[r, here] = begins + np.arange(len(ids)), begins
            end, number = here.stop, number + 1
            loss_mask[r, end - reply : end] = True
            return number - 1

        for tree in row:
            trunk = add(tree.trunk, 0, -1, 0)
            for e in tree.branches:
                add(e.prompt[e.context_tokens :] + e.reply, e.context_tokens, trunk, len(e.reply))
    return Batch(tokens, stretch >= 0, loss_mask, Layout(position, stretch, parent, start))
