"""How tokens see one another: which ones, and the forms of attention that mix them.

    attention = softmax(q k^T / sqrt(K) where visible) v                   (Vaswani et al. 2017, eq. 1)

`attention` writes all scores out and runs anywhere; `causal_attention` leaves most of those out that nobody sees;
`fused_attention` is the same by a kernel of cuDNN's that never writes any. Axes: B batch, T tokens, S slots (of the same row or
of a cache), H heads, K width of a head.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from therapy_jax.products import on_gpu

Array = jax.Array

QUERIES = 256  # of `causal_attention` at a time: fewer gained no more, and make a longer program


class Layout(NamedTuple):
    """Rows that hold several stretches of text, i32[B, T] each. A token sees its own stretch up to itself, and of the
    stretch that its own continues the tokens before its own began (see packing.py)."""

    position: Array | np.ndarray  # where the token would stand in a sequence of its own
    stretch: Array | np.ndarray  # number of its stretch within the row; -1 = padding
    parent: Array | np.ndarray  # number of the stretch that it continues; -1 = none
    start: Array | np.ndarray  # position at which its stretch begins


def visible(layout: Layout) -> Array:
    """Which tokens s a token t may see in rows of several stretches, beside the order in the row: bool[B,T,S]."""
    _, stretch, parent, start = (jnp.asarray(x)[:, :, None] for x in layout)
    other_stretch, other_position = (jnp.asarray(x)[:, None, :] for x in (layout.stretch, layout.position))
    own = (other_stretch == stretch) & (stretch >= 0)
    return own | ((other_stretch == parent) & (parent >= 0) & (other_position < start))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero a share `rate` of x and scale the rest up; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def attention(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, visible_BTS: Array, rate: float, key: Array | None) -> Array:
    """softmax(q k^T / sqrt(K)) v over the visible slots (Vaswani et al. 2017, eq. 1) -> [B, H, T, K].

    The softmax's division by its sum comes after v, on [B, H, T, K] and not on the [B, H, T, S] weights: the largest array of a
    block is then written once less."""
    q_BHTK = q_BHTK / math.sqrt(q_BHTK.shape[-1])
    scores_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    # A finite minimum, not -inf: a padding query sees no slot at all, and must give garbage, not NaN.
    scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min)
    weights_BHTS = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True)))
    sums_BHT1 = weights_BHTS.sum(-1, keepdims=True)
    weights_BHTS = dropout(weights_BHTS, rate, key).astype(v_BHSK.dtype)
    mixed_BHTK = jnp.einsum("bhts,bhsk->bhtk", weights_BHTS, v_BHSK, preferred_element_type=jnp.float32)
    return (mixed_BHTK / sums_BHT1).astype(v_BHSK.dtype)


def causal_attention(
    q_BHTK: Array, k_BHTK: Array, v_BHTK: Array, visible_BTT: Array, rate: float, key: Array | None
) -> Array:
    """`attention` of a row with itself -> [B, H, T, K], a stretch of queries after the other. Nobody sees what comes later in the
    row: a stretch takes the keys up to its own end, and of a long row nearly half of the scores are never made. Queries may be those
    of the row's last tokens alone."""
    length = q_BHTK.shape[2]
    earlier = k_BHTK.shape[2] - length
    mixed = []
    for start, end in itertools.pairwise([*range(0, length, QUERIES), length]):
        keys = slice(earlier + end)
        own = q_BHTK[:, :, start:end], k_BHTK[:, :, keys], v_BHTK[:, :, keys], visible_BTT[:, start:end, keys]
        mixed.append(attention(*own, rate, None if key is None else jax.random.fold_in(key, start)))
    return jnp.concatenate(mixed, 2)


def fused_attention(q_BHTK: Array, k_BHTK: Array, v_BHTK: Array, visible_BTT: Array | None) -> Array:
    """`attention` of a row with itself by cuDNN's kernel (FlashAttention-2, Dao 2023): bfloat16 on a GPU, no dropout. Nobody sees
    what comes later in the row, so that half of the work is skipped; None: nothing else is hidden, which is faster again."""
    q_BTHK, k_BTHK, v_BTHK = (x.swapaxes(1, 2) for x in (q_BHTK, k_BHTK, v_BHTK))
    mask_B1TT = None if visible_BTT is None else visible_BTT[:, None]
    mixed_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, mask=mask_B1TT, is_causal=True, implementation="cudnn"
    )
    return mixed_BTHK.swapaxes(1, 2)


def can_fuse(q_BHTK: Array, mesh: Mesh | None) -> bool:
    """Whether `fused_attention` is to be had for such queries, on the safe side of what cuDNN asks for: an Ampere or later, even
    lengths, heads of up to 128; on one device."""
    if not on_gpu() or q_BHTK.dtype != jnp.bfloat16 or (mesh is not None and mesh.size > 1):
        return False
    device = jax.local_devices()[0]
    has_kernel = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0
    length, width = q_BHTK.shape[-2:]
    return has_kernel and length % 2 == 0 and width % 8 == 0 and width <= 128
