"""The step from hidden states to token log-probs, without the logits of a whole batch ever being held.

With a vocabulary of 50,257, logits [B,T,V] are the largest array of a training step, and most of them are of no use: only
supervised tokens count, about one in seven of a dialogue's. So the positions that count are lined up, and walked in chunks
of `chunk_size`. The loss goes in with them: it is a sum over tokens of a function of their log-prob, so that the same walk can
take its gradient while a chunk's logits are at hand (three matrix products in all; to compute them again in a backward
pass would be a fourth).

    sum over counted tokens of token_loss(logprob, entropy, ...)       logprob = log softmax(hidden @ wte.T / temperature)[token]

Its gradient is written out, with p the softmax, H the entropy, a and b the token_loss's own derivatives by logprob and entropy:

    d loss / d logits = a onehot(token) - p (a + b (log p + H))

The first term touches one row of wte a token. Where b is 0 the second is p itself, times a number that each row's D hidden numbers
can carry: nothing of V columns is then written but logits and exponentials.

The walk is as long as there are counted tokens, so no shape depends on how many there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from therapy_jax import gpt2
from therapy_jax.gpt2 import Array
from therapy_jax.products import on_gpu, product
from therapy_jax.sharding import constrain, gathered, row_shards

# Tokens whose logits exist at a time: enough for a matrix product to run at full speed.
CHUNK = 512
GPU_CHUNKS = 2048, 8192  # least and most


class Spec(NamedTuple):
    """What is fixed when the program is compiled."""

    config: gpt2.GPT2Config
    token_loss: Callable[..., Array] | None = None  # (logprobs, entropy, *extra) -> loss of each token; None = no loss
    temperature: float = 1.0
    with_entropy: bool = True  # token_loss needs the entropy; False: it gets None, and a pass over all logits is spared


def chunk_size(rows: int) -> int:
    """Of `rows` positions. A GPU's products are so fast that it is the sum of wte's gradients, one more V x D array a chunk, that
    has to be rare: a chunk is a quarter of the rows, within bounds, so that where few of them count the walk still ends early."""
    least, most = GPU_CHUNKS
    return min(max(rows // 4, least), most) if on_gpu() else CHUNK


def temper(hidden: Array, temperature: float) -> Array:
    """Hidden states whose logits are those of `hidden` / temperature: the head is linear, and D is smaller than V.
    Temperature 0 (greedy) leaves them, since argmax does not care."""
    return hidden if temperature in (0.0, 1.0) else hidden / temperature


def pick(logits: Array, tokens: Array) -> Array:
    """logits[..., token]."""
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]


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


def highest(logits: Array) -> Array:
    """Maximum over the vocabulary, f32[...,V] -> f32[...,1]. A CPU takes that of blocks first: of whole rows it uses one core."""

    def by_blocks(logits):
        blocks = logits.reshape(*logits.shape[:-1], -1, math.gcd(logits.shape[-1], 128))
        return jax.lax.optimization_barrier(blocks.max(-1)).max(-1, keepdims=True)

    return jax.lax.platform_dependent(logits, cpu=by_blocks, default=lambda x: x.max(-1, keepdims=True))


class Softmax(NamedTuple):
    """softmax = weights / z: one pass of exponentials serves log-probs, entropy and gradient."""

    weights: Array  # f32[...,V]: exp(logits - highest)
    z: Array  # f32[...]
    log_z: Array  # f32[...] nats, of the logits as they are


def softmax(logits: Array) -> Softmax:
    """Over the vocabulary, f32[...,V]."""
    top = highest(logits)
    weights = jnp.exp(logits - top)
    z = total(weights)
    return Softmax(weights, z, top[..., 0] + jnp.log(z))


def logprobs_and_entropy(logits: Array, tokens: Array, over: Softmax) -> tuple[Array, Array]:
    """logits f32[...,V], tokens i32[...] -> log softmax(logits)[token] and -sum p log p, f32[...] nats each.

    The log-probs have the same bits whether or not somebody asks for the entropy."""
    return pick(logits, tokens) - over.log_z, over.log_z - dot(over.weights, logits) / over.z


def walk(
    spec: Spec, wte: Array, hidden: Array, tokens: Array, counted: Array, extra: tuple[Array, ...], with_grads: bool
):
    """-> (loss f32[], logprobs, entropy), and gradients of the loss for (wte, hidden) where they are wanted."""
    # Each device walks its own part; a batch that does not divide is walked as one, which gives the same, only not side by side.
    mesh, shards = spec.config.mesh, row_shards(spec.config.mesh)
    parts = shards if tokens.shape[0] % shards == 0 else 1
    rows = tokens.size // parts

    wte = jnp.asarray(gathered({"wte": wte}, mesh)["wte"])

    def split(x):
        return constrain(x.reshape(parts, rows, *x.shape[tokens.ndim :]), "rows", mesh)

    hidden_GND, counted_GN = split(hidden), split(counted)
    values = jax.tree.map(split, (tokens, *extra))
    size = min(chunk_size(rows), rows)
    steps = -(-rows // size)
    order = jnp.argsort(~counted_GN, axis=1, stable=True)  # the positions that count come first
    order = jnp.pad(order, ((0, 0), (0, steps * size - rows)))
    count = counted_GN.sum(1, keepdims=True)

    def read(hidden_GCD, valid, tokens, *extra):
        """A chunk of each part -> losses f32[G], (log-probs, entropy) f32[G,C], and where they are wanted what the losses add to
        the gradients: to those of all of wte, to that of each token's own row of wte, and to those of the hidden states."""
        hidden_GCD = temper(hidden_GCD, spec.temperature)
        logits_GCV = gpt2.head(spec.config, wte, hidden_GCD)
        over = softmax(logits_GCV)
        found = logprobs_and_entropy(logits_GCV, tokens, over)
        # What is beyond the last counted token is 0 and, for good measure, so is all that its loss could be made of.
        logprobs, entropy, *others = (jnp.where(valid, x, 0.0) for x in (*found, *extra))

        def losses(logprobs, entropy):
            given = logprobs, entropy if spec.with_entropy else None, *others
            return jnp.where(valid, spec.token_loss(*given) if spec.token_loss else 0.0, 0.0)

        each, pull = jax.vjp(losses, logprobs, entropy)
        result = each.sum(1), (logprobs, entropy)
        if not with_grads:
            return *result, None
        a_GC1, b_GC1, z_GC1 = (x[..., None] for x in (*pull(jnp.ones_like(each)), over.z))
        weights_GCV, scale_GC1 = over.weights, -a_GC1 / z_GC1
        if spec.with_entropy:
            factor_GCV = a_GC1 + b_GC1 * (logits_GCV - (over.log_z - entropy)[..., None])
            weights_GCV = jnp.where(weights_GCV > 0, weights_GCV * factor_GCV, 0.0)  # a spare word's logit may overflow
            scale_GC1 = -1.0 / z_GC1
        # Rows of D numbers are scaled, not those of V. No spare word has weight, so these gradients need not know of them.
        as_logits = functools.partial(product, "nd,vd->nv", jnp.dtype(spec.config.compute_dtype))
        pull_part = jax.vmap(lambda hidden_CD, weights_CV: jax.vjp(as_logits, hidden_CD, wte)[1](weights_CV))
        to_hidden_GCD, to_wte_GVD = pull_part(hidden_GCD * scale_GC1, weights_GCV)
        to_hidden_GCD = to_hidden_GCD * scale_GC1 + a_GC1 * wte[tokens]
        return *result, (to_wte_GVD, a_GC1 * hidden_GCD, temper(to_hidden_GCD, spec.temperature))

    def put(x, indices, new):  # what is beyond the last counted token adds 0 to a position that was counted before
        return jax.vmap(lambda x, i, new: x.at[i].add(new))(x, indices, new)

    def step(i, carry):
        loss, out, grads = carry
        indices = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        valid = i * size + jnp.arange(size) < count
        chunk_GCD = jnp.take_along_axis(hidden_GND, indices[..., None], 1)
        tokens, *extra = (jnp.take_along_axis(x, indices, 1) for x in values)
        losses, found, more = read(chunk_GCD, valid, tokens, *extra)
        if more:
            to_wte_GVD, to_rows_GCD, to_hidden_GCD = more
            grads = put(grads[0] + to_wte_GVD, tokens, to_rows_GCD), put(grads[1], indices, to_hidden_GCD)
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
