"""Generation as one compiled program: prefill the cache with the prompts, then decode token by token until all have ended.

A prompt that is answered several times is read once. Prompts are padded on the left, so all replies start in the same
column; positions come from the mask, so a reply is the same alone, in a batch, and behind any amount of padding. Each row
draws from a key of its own, so that holds for sampled replies too. `stream` runs the same two halves, a token at a time.

The log-probs of replies come from head.head_loss alone, for rollout, reference policy and PPO update, with the sampling
temperature inside, so that the ratio of a fresh policy to itself is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from therapy_jax import gpt2
from therapy_jax.batching import Prompt
from therapy_jax.config import SamplingConfig
from therapy_jax.gpt2 import Array, Params, hidden
from therapy_jax.head import Spec, head_loss, pick, temper, total
from therapy_jax.sharding import constrain, gathered

BLOCK = 64  # of the vocabulary, whose padded size is a multiple of 128


class Reply(NamedTuple):
    """Generated tokens. `mask` is True up to and including EOS (or the length limit); the rest is 0 and counts for nothing."""

    tokens: Array  # i32[B, R], padded on the right
    mask: Array  # bool[B, R]
    logprobs: Array  # f32[B, R] nats, of the sampled tokens under softmax(logits / temperature); 0 outside the mask


def keep_likely(logits: Array, top_k: int, top_p: float) -> Array:
    """Mask all but the k likeliest tokens and/or the smallest set that holds top_p of the probability (Holtzman et al.
    2020, "The Curious Case of Neural Text Degeneration"): logits f32[B,V] -> f32[B,V]. The likeliest token always stays,
    and so do tokens that are as likely as the last one kept."""
    lowest = jnp.finfo(jnp.float32).min
    if top_k:
        logits = jnp.where(logits >= kth_largest(logits, min(top_k, logits.shape[-1])), logits, lowest)
    if top_p < 1.0:
        mass = jax.nn.softmax(logits, axis=-1)
        enough = cutoff(logits, lambda kept: jnp.where(kept, mass, 0.0).sum(-1, keepdims=True) >= top_p)
        logits = jnp.where(logits >= enough, logits, lowest)
    return logits


def cutoff(values: Array, enough: Callable[[Array], Array]) -> Array:
    """f32[B,N] -> f32[B,1], the largest number such that keeping values >= it is enough (bool[B,N] -> bool[B,1]); where
    nothing is, as rounding may have it, the lowest value, which keeps all.

    No sort: the number is found bit by bit from the top, 32 passes (radix select). A float's bits order as the float does
    once the negative ones are turned over.
    """

    def turn(bits):  # i32 <-> i32, its own inverse
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    top = jnp.uint32(1 << 31)  # and the sign's bit turned over, so that unsigned order is the order of the floats
    keys = jax.lax.bitcast_convert_type(turn(jax.lax.bitcast_convert_type(values, jnp.int32)), jnp.uint32) ^ top

    def next_bit(i, found):
        higher = found | (top >> i.astype(jnp.uint32))
        return jnp.where(enough(keys >= higher), higher, found)

    found = jax.lax.fori_loop(0, 32, next_bit, jnp.zeros_like(keys[:, :1]))
    number = jax.lax.bitcast_convert_type(turn(jax.lax.bitcast_convert_type(found ^ top, jnp.int32)), jnp.float32)
    return jnp.where(found == 0, values.min(-1, keepdims=True), number)


def blocks(logits: Array) -> Array:
    """f32[B,V] -> f32[B,V/64,64]. One pass over the vocabulary says what each block holds; after that only blocks that
    matter are looked into, which takes next to no time."""
    return logits.reshape(logits.shape[0], -1, BLOCK)


def likely_blocks(logits: Array, k: int) -> tuple[Array, Array]:
    """The k blocks with the largest maxima, in which the k largest lie: f32[B,V] -> (f32[B,K*64], which blocks i32[B,K], in their
    order), K = k or as many blocks as there are."""
    maxima = blocks(logits).max(-1)
    batch, count = maxima.shape
    if k >= count:
        return logits, jnp.broadcast_to(jnp.arange(count), maxima.shape)
    which = jnp.sort(jax.lax.top_k(maxima, k)[1], -1)
    return jnp.take_along_axis(blocks(logits), which[..., None], 1).reshape(batch, -1), which


def kth_largest(logits: Array, k: int) -> Array:
    """f32[B,V] -> f32[B,1]."""
    return cutoff(likely_blocks(logits, k)[0], lambda kept: kept.sum(-1, keepdims=True, dtype=jnp.float32) >= k)


def likeliest(logits: Array) -> Array:
    """argmax over the vocabulary, the first of equals: f32[B,V] -> i32[B]."""
    block = jnp.argmax(blocks(logits).max(-1), -1)
    inside = jnp.take_along_axis(blocks(logits), block[:, None, None], 1)[:, 0]
    return (block * BLOCK + jnp.argmax(inside, -1)).astype(jnp.int32)


def masses(logits: Array) -> tuple[Array, Array]:
    """-> exp(logits - highest) summed over each block f32[B,V/64], and highest f32[B,1]."""
    highest = blocks(logits).max(-1).max(-1, keepdims=True)
    return total(jnp.exp(blocks(logits) - highest[..., None])), highest


def log_normaliser(logits: Array) -> Array:
    """log sum exp over the vocabulary: f32[B,V] -> f32[B]."""
    sums, highest = masses(logits)
    return highest[:, 0] + jnp.log(sums.sum(-1))


def draw(logits: Array, uniform: Array) -> Array:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds uniform f32[B] in [0,1) -> i32[B].

    In two levels, so that no cumulative sum over the whole vocabulary is needed: first the block in which the target falls,
    then the token within it. One uniform per row, against one per token for the Gumbel trick.
    """

    def first_above(weights, target):  # f32[B,N], f32[B] -> index i32[B], mass before it f32[B]
        cumulative, some = jnp.cumsum(weights, -1), weights > 0
        # Rounding may lift the target to the total, push it below 0, or make the sums creep where nothing is added.
        target = jnp.minimum(target, jnp.nextafter(jnp.where(some, cumulative, 0.0).max(-1), jnp.float32(0)))
        index = jnp.argmax(some & (cumulative > target[:, None]), -1)  # so weight 0 is never picked
        picked = jnp.take_along_axis(cumulative - weights, index[:, None], -1)[:, 0]
        return index, target - picked

    sums, highest = masses(logits)
    block, rest = first_above(sums, uniform * sums.sum(-1))
    inside = jnp.take_along_axis(blocks(logits), block[:, None, None], 1)[:, 0]
    token, _ = first_above(jnp.exp(inside - highest), rest)
    return (block * BLOCK + token).astype(jnp.int32)


def sample(logits: Array, uniform: Array, top_k: int, top_p: float) -> Array:
    """A token of those that top-k and top-p keep: f32[B,V], uniform f32[B] in [0,1) -> i32[B].

    With top-k only the k likeliest blocks are looked into (were more than k to hold logits equal to the last one kept, the others
    would be left out); they stay in their order, so a uniform draws what it would draw from the whole vocabulary."""
    if not top_k:
        return draw(keep_likely(logits, 0, top_p), uniform)
    inside, which = likely_blocks(logits, top_k)
    place = draw(keep_likely(inside, top_k, top_p), uniform)
    block = jnp.take_along_axis(which, place[:, None] // BLOCK, 1)[:, 0]
    return block * BLOCK + place % BLOCK


def prefill(params: Params, prompt: Prompt, times: int, room: int, *, model: gpt2.GPT2) -> tuple[Array, gpt2.KVCache]:
    """Each of N prompts is read once, however many replies follow -> the hidden state at its end, f32[N * times, D], and a
    cache with room for more tokens; the copies of a prompt stand side by side."""
    batch, length = prompt.tokens.shape
    cache = gpt2.init_cache(model.config, batch, length + room)
    hidden_N1D, cache = hidden(params, prompt.tokens, prompt.mask, cache, last=1, model=model)
    assert cache is not None
    mesh = model.config.mesh
    k, v = (constrain(jnp.repeat(x, times, 1), "cache", mesh) for x in (cache.k, cache.v))
    mask, end_BD = (constrain(jnp.repeat(x, times, 0), "rows", mesh) for x in (cache.mask, hidden_N1D[:, -1]))
    return end_BD, gpt2.KVCache(k, v, mask, cache.index)


class Decoding(NamedTuple):
    """Between two tokens."""

    step: Array  # i32[], tokens drawn so far
    reply: Reply
    cache: gpt2.KVCache
    alive: Array  # bool[B], which replies go on
    logits: Array  # f32[B, V] / temperature, of the token to come


Blocks = tuple[Params, ...]  # of the model, laid out for decoding (gpt2.apart)


def begin(
    params: Params, prompt: Prompt, *, model: gpt2.GPT2, cfg: SamplingConfig, times: int = 1
) -> tuple[Blocks, Decoding]:
    """The prompts are read, nothing is written yet. Raises ValueError as `generate` does."""
    batch, length = prompt.tokens.shape[0] * times, prompt.tokens.shape[1]
    limit, config = cfg.max_new_tokens, model.config
    if length + limit > config.n_positions:
        raise ValueError(
            f"prompt ({length}) + max_new_tokens ({limit}) exceed the model's {config.n_positions} positions"
        )
    hidden_BD, cache = prefill(params, prompt, times, limit, model=model)
    empty = Reply(
        jnp.zeros((batch, limit), jnp.int32), jnp.zeros((batch, limit), bool), jnp.zeros((batch, limit), jnp.float32)
    )
    empty = constrain(empty, "rows", config.mesh)
    logits = gpt2.head(config, params["wte"], temper(hidden_BD, cfg.temperature), few=True)
    blocks, cache = gpt2.apart(config, params["blocks"], cache)
    return blocks, Decoding(jnp.int32(0), empty, cache, jnp.ones(batch, bool), logits)


def advance(
    params: Params, blocks: Blocks, state: Decoding, row_keys: Array, *, model: gpt2.GPT2, cfg: SamplingConfig
) -> Decoding:
    """One token more for every reply that goes on."""
    step, reply, cache, alive, logits = state
    if cfg.temperature == 0.0:
        token = likeliest(logits)
    else:
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step)))(row_keys)
        token = sample(logits, uniform, cfg.top_k, cfg.top_p)
    token = jnp.where(alive, token, 0)
    logprob = jnp.where(alive, pick(logits, token) - log_normaliser(logits), 0.0)
    reply = Reply(*(x.at[:, step].set(new) for x, new in zip(reply, (token, alive, logprob), strict=True)))
    going_on = alive & (token != model.config.eos_token_id)
    hidden_B1D, cache = hidden(params, token[:, None], alive[:, None], cache, blocks=blocks, model=model)
    assert cache is not None
    logits = gpt2.head(model.config, params["wte"], temper(hidden_B1D[:, 0], cfg.temperature), few=True)
    return Decoding(step + 1, reply, cache, going_on, logits)


def keys_of_rows(key: Array, batch: int) -> Array:
    """One key for the batch (row i draws from fold_in(key, i)), or one per row already."""
    return key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))


def generate(
    params: Params, prompt: Prompt, key: Array, *, model: gpt2.GPT2, cfg: SamplingConfig, times: int = 1
) -> Reply:
    """N prompts -> B = N * times replies. key: one for the batch (row i draws from fold_in(key, i)), or one per row, [B].

    Stops when every reply has ended, at the latest after cfg.max_new_tokens. P + max_new_tokens must not exceed the
    model's positions (ValueError): beyond them GPT-2 has never learnt anything.
    """
    # Once, and not for every token again: that would be the whole embedding over the links for one token of each row.
    own = {name: x for name, x in params.items() if name != "blocks"}  # each block is gathered by who reads it
    params = {**gathered(own, model.config.mesh), "blocks": params["blocks"]}
    row_keys = keys_of_rows(key, prompt.tokens.shape[0] * times)

    def unfinished(state: Decoding):
        return (state.step < cfg.max_new_tokens) & state.alive.any()

    def decode(state: Decoding):
        return advance(params, blocks, state, row_keys, model=model, cfg=cfg)

    blocks, start = begin(params, prompt, model=model, cfg=cfg, times=times)
    return jax.lax.while_loop(unfinished, decode, start).reply


# jit keeps its programs by function: they stand here by name, so that a second reply does not compile again.
_begin = jax.jit(begin, static_argnames=("model", "cfg"))
_advance = jax.jit(advance, static_argnames=("model", "cfg"), donate_argnames="state")


def stream(params: Params, prompt: Prompt, key: Array, *, model: gpt2.GPT2, cfg: SamplingConfig) -> Iterator[int]:
    """The tokens that `generate` gives one prompt (N = 1) for the same key, each as soon as it is drawn."""
    (blocks, state), row_keys = _begin(params, prompt, model=model, cfg=cfg), keys_of_rows(key, 1)
    for step in range(cfg.max_new_tokens):
        state = _advance(params, blocks, state, row_keys, model=model, cfg=cfg)
        token = int(state.reply.tokens[0, step])
        yield token
        if token == model.config.eos_token_id:
            return


def reply_hidden(params: Params, prompt: Prompt, tokens: Array, mask: Array, *, model: gpt2.GPT2) -> Array:
    """Hidden states from which each reply token is predicted: f32[B,R,D] (the end of the prompt predicts the first).

    tokens i32[B,R], mask bool[B,R]: the replies to N prompts, B / N to each, side by side. A prompt is read once for all its
    replies, forward and backward: N * P + B * R tokens, where prompt + reply of every reply would be B * (P + R). One reply
    to a prompt is read together with it.
    """
    room = tokens.shape[1] - 1  # nothing is predicted from the last token
    times = tokens.shape[0] // prompt.tokens.shape[0]
    if times == 1:
        whole, counts = (jnp.concatenate([a, b[:, :-1]], 1) for a, b in zip(prompt, (tokens, mask), strict=True))
        return hidden(params, whole, counts, last=room + 1, model=model)[0]
    end_BD, cache = prefill(params, prompt, times, room, model=model)
    if room == 0:
        return end_BD[:, None]
    hidden_BRD, _ = hidden(params, tokens[:, :-1], mask[:, :-1], cache, model=model)
    return jnp.concatenate([end_BD[:, None], hidden_BRD], 1)


def reply_logprobs(
    params: Params, hidden_BRD: Array, tokens: Array, mask: Array, *, model: gpt2.GPT2, temperature: float
) -> tuple[Array, Array]:
    """-> (log-probs, entropy), f32[B,R] each, nats, of softmax(logits / temperature); 0 outside the mask. They have no
    gradient: a loss goes into head.head_loss, which takes them as it walks."""
    spec = Spec(model.config, temperature=temperature)
    return head_loss(spec, params["wte"], hidden_BRD, tokens, mask)[1:]
