"""What the frozen SFT model reads in a text, as one vector: f32[F], the "reading" that the heads and the rewards share.

    tokens -> frozen trunk -> hidden states, embeddings -> pooled over the text, beside a hashed bag of its tokens

The trunk does not learn while rewards are computed, so the reading of a text that stays is computed once.

Axes: B batch, T tokens, D width of the trunk, S width of a state, F width of a reading.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax import batching, gpt2, prompts
from therapy_jax.config import PromptConfig
from therapy_jax.dialogue import Exchange
from therapy_jax.gpt2 import Array, Params
from therapy_jax.sharding import fetch

BAG = 2048  # entries of the hashed bag of tokens, a power of two
TOKENS_AT_ONCE = 8192  # in one batch of readings


def states(params: Params, tokens: Array, mask: Array, *, model: gpt2.GPT2) -> Array:
    """Last hidden states beside token embeddings, which still say which word it is -> f32[B, T, 2D]."""
    hidden_BTD = gpt2.hidden(params, tokens, mask, model=model)[0]
    return jnp.concatenate([hidden_BTD, params["wte"][tokens]], -1)


def pool(states_BTS: Array, mask: Array) -> Array:
    """Mean, then maximum, over the tokens where mask -> f32[B, 2S]; zeros where there is none."""
    count = mask.sum(-1, keepdims=True)
    mean = jnp.where(mask[..., None], states_BTS, 0.0).sum(1) / jnp.maximum(count, 1)
    highest = jnp.where(mask[..., None], states_BTS, -jnp.inf).max(1)
    return jnp.concatenate([mean, jnp.where(count > 0, highest, 0.0)], -1)


def bag(tokens: Array, mask: Array) -> Array:
    """Which tokens stand in a text, hashed: f32[B, BAG], 1/sqrt(n) in each of the n entries that occur, so of length 1."""
    # Knuth's multiplicative hash: the upper bits of token * 2^32 / golden ratio
    entry = (tokens.astype(jnp.uint32) * jnp.uint32(2654435769)) >> (32 - BAG.bit_length() + 1)
    rows = jnp.arange(len(tokens))[:, None]
    found = jnp.zeros((len(tokens), BAG)).at[rows, entry].max(mask.astype(jnp.float32))
    return found / jnp.sqrt(jnp.maximum(found.sum(-1, keepdims=True), 1.0))


def read(params: Params, tokens: Array, mask: Array, *, model: gpt2.GPT2) -> Array:
    """The reading of a text: tokens i32[B,T], mask bool[B,T] (padding on either side) -> f32[B, F], F = 4D + BAG.

    Its first D entries are the mean of the last hidden state. A row without a token reads as zeros.
    """
    return jnp.concatenate([pool(states(params, tokens, mask, model=model), mask), bag(tokens, mask)], -1)


def read_client(params: Params, tokens: Array, mask: Array, now: Array, *, model: gpt2.GPT2) -> Array:
    """The reading of a client's utterance in its context: `now` bool[B,T] marks the utterance within a prompt ->
    f32[B, F + 4D]: the reading of the utterance, its states having seen the context, then the context pooled."""
    states_BTS = states(params, tokens, mask, model=model)
    return jnp.concatenate([pool(states_BTS, now), bag(tokens, now), pool(states_BTS, mask & ~now)], -1)


def width(name: str, n_embd: int) -> int:
    """Entries of what a head reads."""
    return BAG + 4 * n_embd * (2 if name == "client_emotion" else 1)


def of_texts(params: Params, rows: Sequence[Sequence[int]], *, model: gpt2.GPT2) -> np.ndarray:
    """`read` of many texts given as ids, of any lengths -> f32[N, F]. A text keeps its first n_positions tokens."""
    kept = [list(row[: model.config.n_positions]) for row in rows]
    return _in_batches(params, kept, [0] * len(rows), model)[:, : width("emotion", model.config.n_embd)]


def means(
    params: Params, rows: Sequence[Sequence[int]], *, model: gpt2.GPT2, at_once: int = TOKENS_AT_ONCE
) -> np.ndarray:
    """The mean of the last hidden state of many texts given as ids -> f32[N, D]: `of_texts[:, :D]`, and no more than that
    is computed and brought to the host."""
    kept = [list(row[: model.config.n_positions]) for row in rows]
    return _in_batches(params, kept, [0] * len(rows), model, _mean, model.config.n_embd, at_once)


def of_clients(
    params: Params, exchanges: Sequence[Exchange], tokenizer: Any, *, model: gpt2.GPT2, max_tokens: int,
    at_once: int = TOKENS_AT_ONCE,
) -> np.ndarray:  # fmt: skip
    """`read_client` of each exchange's client turn, its prompt at most max_tokens long -> f32[N, F + 4D]. The annotated
    emotion is not in what is read. `at_once`: tokens of a batch; 1 reads one exchange alone."""
    form = PromptConfig("context_emotion", "inferred", max_tokens)
    whole = [prompts.encode_prompt(tokenizer, e.context, e.client, form)[0] for e in exchanges]
    rows = [row[-model.config.n_positions :] for row in whole]
    lengths = [len(prompts.encode_text(tokenizer, e.client.text)) + 1 for e in exchanges]  # with <|emotion|> behind it
    starts = [max(len(r) - n, 0) for r, n in zip(rows, lengths, strict=True)]
    return _in_batches(params, rows, starts, model, at_once=at_once)


# jit keeps its programs by function: it stands here by name, so that a second call does not compile again.
@functools.partial(jax.jit, static_argnames="model")
def _read(params: Params, tokens: Array, mask: Array, starts: Array, *, model: gpt2.GPT2) -> Array:
    now = mask & (jnp.arange(tokens.shape[1]) >= starts[:, None])
    return read_client(params, tokens, mask, now, model=model)


@functools.partial(jax.jit, static_argnames="model")
def _mean(params: Params, tokens: Array, mask: Array, starts: Array, *, model: gpt2.GPT2) -> Array:
    hidden_BTD = gpt2.hidden(params, tokens, mask, model=model)[0]
    return pool(hidden_BTD, mask)[:, : model.config.n_embd]


def _in_batches(
    params: Params, rows: list[list[int]], starts: list[int], model: gpt2.GPT2, program: Any = _read, size_out: int = 0,
    at_once: int = TOKENS_AT_ONCE,
) -> np.ndarray:  # fmt: skip
    """`program` (`read_client`, or what gives size_out entries) of rows whose utterance begins at `starts`, in batches of
    one length each, a power of two: few shapes to compile."""
    lengths = np.asarray([max(32, 1 << (max(len(row), 1) - 1).bit_length()) for row in rows], int)
    out = np.zeros((len(rows), size_out or width("client_emotion", model.config.n_embd)), np.float32)
    for length in np.unique(lengths).tolist():
        where, size = np.flatnonzero(lengths == length), max(at_once // length, 1)
        for part in (where[k : k + size] for k in range(0, len(where), size)):
            filled = [*part, *[part[0]] * (size - len(part))]
            tokens, mask = batching.pad([rows[i] for i in filled], length, "right")
            found = program(params, tokens, mask, np.asarray([starts[i] for i in filled]), model=model)
            out[part] = fetch(found)[: len(part)]
    return out
