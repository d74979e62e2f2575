"""The batches of the benchmark's `conversations` rows: the same exchanges for both sides, each side's way.

Theirs: one example an exchange, shuffled, padded to the longest of its batch. Ours: whole conversations in rows that share
their context (therapy_jax/packing.py). Both take as many optimizer steps for all of them as whole rows allow, and supervise the very same
tokens after the same context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from therapy_jax import batching, packing, prompts
from therapy_jax.config import PromptConfig
from therapy_jax.dialogue import FRACTIONS, DataError, Report, exchanges, read_dialogues

CONVERSATIONS = 48
EXCHANGES_A_STEP = 16
ROW_TOKENS = 768
LONGEST = 1024  # GPT-2's positions


class Counts(NamedTuple):
    """Of all conversations together."""

    supervised: int  # tokens that a loss is taken of
    ours: int  # real tokens that we read
    theirs: int
    our_pairs: int  # of a token and one that it sees
    their_pairs: int


def write(path: Path, source: str | None, tokenizer_folder: str | None, vocabulary: int) -> Counts:
    """path = an .npz with both sides' batches. source: FORMAT:FILE as data.format and data.path, None = the built-in
    sample; without a tokenizer's folder one is trained on the conversations."""
    form, _, file = (source or "jsonl:").partition(":")
    if form not in FRACTIONS or (source and not file):
        raise DataError(f"--conversations {source} is not FORMAT:FILE, such as mesc:MESC.csv")
    splits = "official" if form == "mesc" else None
    dialogues = read_dialogues(file or None, form, splits, True, "error", 0, Report())["train"][:CONVERSATIONS]
    if not dialogues:
        raise DataError(f"--conversations {source}: no conversation of it is for training")
    if tokenizer_folder:
        tokenizer = prompts.load_tokenizer(tokenizer_folder)
    else:
        tokenizer = prompts.train_tokenizer((prompts.plain_text(d.turns) for d in dialogues), min(vocabulary, 8192))
    prompts.add_special_tokens(tokenizer)
    asked = PromptConfig("context_emotion", "given", LONGEST // 2)
    encoded = [[prompts.encode(tokenizer, e, asked, ROW_TOKENS) for e in exchanges(d)] for d in dialogues]
    # GPT-2's own vocabulary leaves no room for the six markers: they take the ids of its rarest tokens, on both sides.
    encoded = [
        [e._replace(prompt=fold(e.prompt, vocabulary), reply=fold(e.reply, vocabulary)) for e in c] for c in encoded
    ]

    arrays: dict[str, Any] = {}
    alone = [e for conversation in encoded for e in conversation]
    order = np.random.default_rng(0).permutation(len(alone))
    for i in range(0, len(alone), EXCHANGES_A_STEP):
        part = [alone[j] for j in order[i : i + EXCHANGES_A_STEP]]
        batch = batching.supervised(part, len(part), max(len(e.prompt) + len(e.reply) for e in part))
        labels = np.where(batch.loss_mask, batch.tokens, -100)
        number = i // EXCHANGES_A_STEP
        arrays |= {f"tokens_{number}": batch.tokens, f"labels_{number}": labels}
        arrays |= {f"attention_mask_{number}": batch.attention_mask}

    steps = -(-len(alone) // EXCHANGES_A_STEP)
    rows = packing.pack([t for c in encoded for t in packing.trees(c, ROW_TOKENS)], ROW_TOKENS, seed=0)
    size = -(-len(rows) // steps)
    packed = [packing.packed(rows[i : i + size], size, ROW_TOKENS) for i in range(0, len(rows), size)]
    for name in ("tokens", "attention_mask", "loss_mask"):
        arrays[f"packed_{name}"] = np.stack([getattr(batch, name) for batch in packed])
    for name in packing.Layout._fields:
        arrays[f"packed_{name}"] = np.stack([getattr(batch.layout, name) for batch in packed])
    np.savez(path, **arrays)

    trees = [tree for row in rows for tree in row]
    lengths = np.array([len(e.prompt) + len(e.reply) for e in alone])
    branches = [(len(e.prompt) + len(e.reply) - e.context_tokens, e.context_tokens) for t in trees for e in t.branches]
    return Counts(
        supervised=sum(len(e.reply) for e in alone),
        ours=sum(t.size() for t in trees),
        theirs=int(lengths.sum()),
        our_pairs=sum(len(t.trunk) ** 2 for t in trees) + sum(n * (n + context) for n, context in branches),
        their_pairs=int(np.square(lengths).sum()),
    )


def fold(ids: list[int], vocabulary: int) -> list[int]:
    return [i if i < vocabulary else vocabulary - 1 - (i - vocabulary) - 8 for i in ids]
