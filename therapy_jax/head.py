"""The step from hidden states to token log-probs, without the logits of a whole batch ever being held.

With a vocabulary of 50,257, logits [B,T,V] are the largest array of a training step, and most of them are of no use: only
supervised tokens count, about one in seven of a dialogue's. So the positions that count are lined up, and walked in chunks
of `chunk_size`. The loss goes in with them: it is a sum over tokens of a function of their log-prob, so that the same walk can
take its gradient while a chunk's logits are at hand (three matrix products in all; to compute them again in a backward
pass would be a fourth).

    sum over counted tokens of token_loss(logprob, entropy, ...)       logprob = log softmax(hidden @ wte.T / temperature)[token]

The walk is as long as there are counted tokens, so no shape depends on how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from therapy_jax import gpt2
from therapy_jax.gpt2 import Array
from therapy_jax.products import on_gpu
from therapy_jax.sharding import constrain, gathered, row_shards

# Tokens whose logits exist at a time: enough for a matrix product to run at full speed.
CHUNK = 512
GPU_CHUNKS = 2048, 8192  # least and most


class Spec(NamedTuple):
    """What is fixed when the program is compiled."""

    config: gpt2.GPT2Config
    token_loss: Callable[..., Array] | None = None  # (logprobs, entropy, *extra) -> loss of each token; None = no loss
    temperature: float = 1.0


def chunk_size(rows: int) -> int:
    """Of `rows` positions. A GPU's products are so fast that it is the sum of wte's gradients, one more V x D array a chunk, that
    has to be rare: a chunk is a quarter of the rows, within bounds, so that where few of them count the walk still ends early."""
    least, most = GPU_CHUNKS
    return min(max(rows // 4, least), most) if on_gpu() else CHUNK


def temper(hidden: Array, temperature: float) -> Array:
    """Hidden states whose logits are those of `hidden` / temperature: the head is linear, and D is smaller than V.
    Temperature 0 (greedy) leaves them, since argmax does not care."""
    return hidden if temperature in (0.0, 1.0) else hidden / temperature


@jax.custom_vjp
def pick(logits: Array, tokens: Array) -> Array:
    """logits[..., token]. Its gradient is written as a comparison, which fuses with what else flows into the logits; that of
    a gather would be a scatter into a new array of zeros."""
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]


def _pick_forward(logits, tokens):
    return pick(logits, tokens), (tokens, logits.shape[-1])


def _pick_backward(residual, g):
    tokens, size = residual
    return jnp.where(jnp.arange(size) == tokens[..., None], g[..., None], 0.0), None


pick.defvjp(_pick_forward, _pick_backward)


def dot(weights: Array, values: Array) -> Array:
    """Sum over the vocabulary of weights * values, f32[...,V] and f32[...,V] or f32[V] -> f32[...]. On a CPU as a dot product: in a
    sum XLA would make the exponentials that the weights are anew, and there they take several times as long."""
    return jax.lax.platform_dependent(
        weights,
        values,
        cpu=lambda w, x: jnp.einsum("...v,...v->...", w, x, precision="highest"),
        default=lambda w, x: (w * x).sum(-1),
    )


def total(weights: Array) -> Array:
    """Sum over the vocabulary, f32[...,V] -> f32[...]."""
    return dot(weights, jnp.ones(weights.shape[-1]))


def logprobs_and_entropy(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """logits f32[...,V], tokens i32[...] -> log softmax(logits)[token] and -sum p log p, f32[...] nats each.

    The log-probs have the same bits whether or not somebody asks for the entropy."""
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - highest)  # one pass for both sums: softmax is weights / z
    z = total(weights)
    log_z = highest[..., 0] + jnp.log(z)
    return pick(logits, tokens) - log_z, log_z - dot(weights, logits) / z


def walk(
    spec: Spec, wte: Array, hidden: Array, tokens: Array, counted: Array, extra: tuple[Array, ...], with_grads: bool
):
    """-> (loss f32[], logprobs, entropy), and gradients of the loss for (wte, hidden) where they are wanted."""
    # Each device walks its own part; a batch that does not divide is walked as one, which gives the same, only not side by side.
    mesh, shards = spec.config.mesh, row_shards(spec.config.mesh)
    parts = shards if tokens.shape[0] % shards == 0 else 1
    rows = tokens.size // parts

    wte = gathered({"wte": wte}, mesh)["wte"]

    def split(x):
        return constrain(x.reshape(parts, rows, *x.shape[tokens.ndim :]), "rows", mesh)

    hidden_GND, counted_GN = split(hidden), split(counted)
    values = jax.tree.map(split, (tokens, *extra))
    size = min(chunk_size(rows), rows)
    steps = -(-rows // size)
    order = jnp.argsort(~counted_GN, axis=1, stable=True)  # the positions that count come first
    order = jnp.pad(order, ((0, 0), (0, steps * size - rows)))
    count = counted_GN.sum(1, keepdims=True)

    def chunk_loss(wte, hidden_ND, valid, tokens, *extra):
        logits_NV = gpt2.head(spec.config, wte, temper(hidden_ND, spec.temperature))
        logprobs, entropy = logprobs_and_entropy(logits_NV, tokens)
        # What is beyond the last counted token is 0 and, for good measure, so is all that its loss could be made of.
        logprobs, entropy, *extra = (jnp.where(valid, x, 0.0) for x in (logprobs, entropy, *extra))
        losses = jnp.zeros(()) if spec.token_loss is None else spec.token_loss(logprobs, entropy, *extra)
        return jnp.where(valid, losses, 0.0).sum(), (logprobs, entropy)

    def put(x, indices, new):  # what is beyond the last counted token adds 0 to a position that was counted before
        return jax.vmap(lambda x, i, new: x.at[i].add(new))(x, indices, new)

    def step(i, carry):
        loss, out, grads = carry
        indices = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        valid = i * size + jnp.arange(size) < count
        chunk_GCD = jnp.take_along_axis(hidden_GND, indices[..., None], 1)
        args = (chunk_GCD, valid, *(jnp.take_along_axis(x, indices, 1) for x in values))
        axes = (None, *(0 for _ in args))
        if with_grads:
            f = jax.vmap(jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True), in_axes=axes)
            (losses, found), (wte_GVD, more_GCD) = f(wte, *args)
            grads = grads[0] + wte_GVD, put(grads[1], indices, more_GCD)
        else:
            losses, found = jax.vmap(chunk_loss, in_axes=axes)(wte, *args)
        out = tuple(put(x, indices, new) for x, new in zip(out, found, strict=True))
        return loss + losses, out, grads

    zeros = jnp.zeros((parts, rows), jnp.float32)
    grads = (jnp.zeros((parts, *wte.shape), wte.dtype), jnp.zeros_like(hidden_GND)) if with_grads else None
    grads = (constrain(grads[0], "grads_GVD", mesh), constrain(grads[1], "rows", mesh)) if grads else None
    start = (*constrain((jnp.zeros(parts, jnp.float32), (zeros, zeros)), "rows", mesh), grads)
    # Of a single chunk no gradient is carried, and none added to zeros.
    loss, out, grads = jax.lax.fori_loop(0, -(-count.max() // size), step, start) if steps > 1 else step(0, start)
    sums = loss.sum(), *(x.reshape(tokens.shape) for x in out)
    return (sums, (constrain(grads[0].sum(0), "wte", mesh), grads[1].reshape(hidden.shape))) if grads else (sums, None)


def head_loss(
    spec: Spec, wte: Array, hidden: Array, tokens: Array, counted: Array, extra: tuple[Array, ...] = ()
) -> tuple[Array, Array, Array]:
    """-> (sum of the counted tokens' losses f32[], their log-probs and entropy in nats, f32[B,T] each, 0 elsewhere).

    wte f32[V,D], hidden f32[B,T,D], tokens i32[B,T], counted bool[B,T]; extra: arrays [B,T] that spec.token_loss takes after
    log-probs and entropy. Only the sum has a gradient, and only for wte and hidden; log-probs and entropy are for looking at.
    Raises TypeError where a gradient is taken without a token_loss: it would silently be 0.
    """
    found: Any = _head_loss(spec, wte, hidden, tokens, counted, extra)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(spec, wte, hidden, tokens, counted, extra):
    return walk(spec, wte, hidden, tokens, counted, extra, with_grads=False)[0]


def _forward(spec, wte, hidden, tokens, counted, extra):
    if spec.token_loss is None:
        raise TypeError(
            "head_loss without a token_loss has no gradient; put what depends on the log-probs into token_loss"
        )
    return walk(spec, wte, hidden, tokens, counted, extra, with_grads=True)


def _backward(spec, grads, g):
    return g[0] * grads[0], g[0] * grads[1], None, None, None


_head_loss.defvjp(_forward, _backward)
