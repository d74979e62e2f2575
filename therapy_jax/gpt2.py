"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), with a KV cache, in one page.

    x = wte[token] + wpe[position]
    for each block:  x += attention(layer_norm(x));  x += mlp(layer_norm(x))
    logits = layer_norm(x) @ wte.T                      (the head is the embedding, transposed: "tied")

The parameters of the L blocks are stacked along a leading axis, so that the loop over blocks is one `lax.scan`: the block
is traced and compiled once, whatever the depth (on a GPU training may write the blocks out). The same forward serves training
(no cache), prefill (a cache and a whole prompt) and decoding (a cache and one token). Decoding has its blocks `apart`, one written
out after the other: a scan cuts each block's parameters and slots out of the stack, which for one token takes half as long
as to use them. Where only the `last` hidden states are read, those of a reply or of a prompt's end, the last block is a block of
its own, too: of the other positions it makes keys and values, and no more.

Axes: B batch, T tokens, S slots of the cache, D width, H heads, K = D/H, F = n_inner, L layers, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from therapy_jax.attention import Layout, attention, can_fuse, causal_attention, dropout, fused_attention, visible
from therapy_jax.products import dense, few_rows, on_cpu, on_gpu, product
from therapy_jax.sharding import constrain, gathered

Params = Any  # a nested dict of arrays
Array = jax.Array

WIDE = 512  # width from which on `few_rows` wins more than it costs to turn its result over
MOST_UNROLLED = 24  # blocks of which a program may hold copies: of more, compiling would take minutes

ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's: the tanh approximation
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of one model; the names are Hugging Face's."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None = 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int = 50256
    dropout: float = 0.0  # one rate for embeddings, attention and residuals; off unless a key is given
    compute_dtype: str = "float32"  # of the matrix products; parameters, softmax and losses are float32
    remat: bool = (
        False  # a backward pass computes each block again: it keeps one [B, T, D] a block, and takes a third longer
    )
    mesh: Mesh | None = None  # of the devices that arrays are split over (sharding.py); None = one device

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of wte: a multiple of 128, for TPU lanes and even sharding. The spare rows never get probability."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def split_sizes(self) -> dict[str, tuple[str, int]]:
        """What a mesh splits: size by name, and along which axis."""
        across = {"n_head": self.n_head, "n_inner": self.inner, "the padded vocabulary": self.padded_vocab_size}
        return {"n_embd": ("fsdp", self.n_embd)} | {name: ("tensor", size) for name, size in across.items()}


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; slots from `index` on are free."""

    k: Any  # [L, B, H, S, K] compute_dtype; `apart`: a tuple of L arrays [B, H, S, K]
    v: Any  # the same
    mask: Array  # bool[B, S], True = a real token sits here
    index: Array  # i32[], slots used


def init_cache(config: GPT2Config, batch: int, slots: int) -> KVCache:
    shape = (config.n_layer, batch, config.n_head, slots, config.n_embd // config.n_head)
    dtype = jnp.dtype(config.compute_dtype)
    k, v = constrain((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), "cache", config.mesh)
    return KVCache(k, v, jnp.zeros((batch, slots), bool), jnp.int32(0))


def apart(config: GPT2Config, blocks: Params, cache: KVCache) -> tuple[tuple[Params, ...], KVCache]:
    """Stacked blocks and cache -> the same for decoding, an array for each block, whole along fsdp; kernels in compute_dtype.

    Decoding reads all of it for each token, and writes into the cache in place: so it is laid out for that once. On a
    CPU wide kernels are turned over, to what `few_rows` takes: "turned" [out, in], where "kernel" was [in..., out...]."""
    dtype, mesh = jnp.dtype(config.compute_dtype), config.mesh
    turn = on_cpu(mesh) and (mesh is None or mesh.size == 1) and config.n_embd >= WIDE

    def take(i):
        block = jax.tree_util.tree_map_with_path(
            lambda path, x: x[i].astype(dtype) if path[-1].key == "kernel" else x[i], blocks
        )
        return {
            name: lay(p) if turn and "kernel" in p else p for name, p in gathered(block, mesh, stacked=True).items()
        }

    def lay(p):
        return {"turned": p["kernel"].reshape(-1, p["bias"].size).T, "bias": p["bias"]}

    numbers = range(config.n_layer)
    k, v = (tuple(constrain(x[i], "block_cache", config.mesh) for i in numbers) for x in (cache.k, cache.v))
    return tuple(map(take, numbers)), cache._replace(k=k, v=v)


def layer_norm(x: Array, params: Params, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * params["scale"] + params["bias"]


def saved(primitive, *args, **params) -> bool:
    """What a backward pass finds of a block: the results of the products with parameters, and of cuDNN's attention."""
    products = jax.checkpoint_policies.save_only_these_names("product")
    return primitive.name == "dot_product_attention_fwd_wrapper" or bool(products(primitive, *args, **params))


def block(
    config: GPT2Config, p: Params, x_BTD: Array, attend, key: Array | None, three: bool, last: int | None = None
) -> Array:
    """One transformer block. `attend(q, k, v)` mixes tokens, with or without a cache; three: by a product each. last: the result is
    wanted of so many positions, the last ones; of the others there are keys and values, and nothing else is computed."""
    dtype = jnp.dtype(config.compute_dtype)
    keys = (None, None) if key is None else jax.random.split(key)

    h_BTD = layer_norm(x_BTD, p["ln_1"], config.layer_norm_epsilon).astype(dtype)
    if three or last is not None:
        parts = ({name: x[..., i, :, :] for name, x in p["c_attn"].items()} for i in range(3))
        first = 0 if last is None else h_BTD.shape[1] - last
        x_BTD, inputs = x_BTD[:, first:], (h_BTD[:, first:], h_BTD, h_BTD)
        projected = (dense("btd,dhk->bthk", h, p, config.mesh) for h, p in zip(inputs, parts, strict=True))
        q_BHTK, k_BHTK, v_BHTK = (x.swapaxes(1, 2) for x in projected)
    else:
        # The axes stay in the order of the one product: asked for another one, XLA on CPU takes a product twice as slow.
        qkv_BTCHK = dense("btd,dchk->btchk", h_BTD, p["c_attn"], config.mesh)
        q_BHTK, k_BHTK, v_BHTK = jnp.moveaxis(qkv_BTCHK, (2, 3), (0, 2))
    out_BTD = dense("bhtk,hkd->btd", attend(q_BHTK, k_BHTK, v_BHTK), p["attn_proj"], config.mesh)
    x_BTD = x_BTD + dropout(out_BTD, config.dropout, keys[0])

    h_BTD = layer_norm(x_BTD, p["ln_2"], config.layer_norm_epsilon).astype(dtype)
    h_BTF = ACTIVATIONS[config.activation_function](dense("btd,df->btf", h_BTD, p["c_fc"], config.mesh))
    out_BTD = dense("btf,fd->btd", h_BTF, p["mlp_proj"], config.mesh)
    return x_BTD + dropout(out_BTD, config.dropout, keys[1])


class GPT2(nn.Module):
    """`GPT2(config).apply({"params": params}, tokens, attention_mask) -> logits_BTV`, a pure function of its arguments."""

    config: GPT2Config

    def setup(self):
        c = self.config
        heads, k = c.n_head, c.n_embd // c.n_head
        normal = nn.initializers.normal
        # GPT-2 section 2.3: projections into the residual stream start smaller, by 1/sqrt of their number (2 a block).
        small = normal(0.02 / math.sqrt(2 * c.n_layer))

        def init_blocks(key):
            keys = jax.random.split(key, 4)
            ones, zeros = (lambda *s: jnp.ones((c.n_layer, *s))), (lambda *s: jnp.zeros((c.n_layer, *s)))
            return {
                "ln_1": {"scale": ones(c.n_embd), "bias": zeros(c.n_embd)},
                "c_attn": {  # axis 1 of the kernel: query, key, value
                    "kernel": normal(0.02)(keys[0], (c.n_layer, c.n_embd, 3, heads, k)),
                    "bias": zeros(3, heads, k),
                },
                "attn_proj": {"kernel": small(keys[1], (c.n_layer, heads, k, c.n_embd)), "bias": zeros(c.n_embd)},
                "ln_2": {"scale": ones(c.n_embd), "bias": zeros(c.n_embd)},
                "c_fc": {"kernel": normal(0.02)(keys[2], (c.n_layer, c.n_embd, c.inner)), "bias": zeros(c.inner)},
                "mlp_proj": {"kernel": small(keys[3], (c.n_layer, c.inner, c.n_embd)), "bias": zeros(c.n_embd)},
            }

        self.wte = self.param("wte", normal(0.02), (c.padded_vocab_size, c.n_embd))
        self.wpe = self.param("wpe", normal(0.01), (c.n_positions, c.n_embd))
        self.blocks = self.param("blocks", init_blocks)
        self.ln_f = self.param("ln_f", lambda _: {"scale": jnp.ones(c.n_embd), "bias": jnp.zeros(c.n_embd)})

    def hidden(
        self,
        tokens: Array,
        attention_mask: Array | None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
        blocks: tuple[Params, ...] | None = None,
        last: int | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Last hidden state, after the final layer norm, before the head.

        tokens i32[B,T], attention_mask bool[B,T] (True = a real token; padding may stand left or right), cache: the tokens
        before these, if any -> f32[B,T,D] and the cache with these tokens added. Positions count real tokens only, so
        padding never moves them; with a layout (and no cache) they, and who sees whom, are as it says. attention_mask None (and no
        cache): what padding there is stands on the right, where no real token sees it. blocks: read instead of
        those in the parameters; they and the cache are `apart`. last: of so many positions, the last ones, the states are wanted, and come
        alone. Dropout is on where apply() is given rngs={"dropout": key}.
        """
        c = self.config
        length = tokens.shape[1]
        if layout is not None:
            positions = layout.position
        elif attention_mask is None:
            positions = jnp.arange(length)[None]
        else:
            before = 0 if cache is None else cache.mask.sum(-1, keepdims=True)
            positions = before + jnp.cumsum(attention_mask, -1) - 1
        positions = jnp.clip(positions, 0, c.n_positions - 1)
        noisy = self.has_rng("dropout") and c.dropout > 0
        embedding_key, key = jax.random.split(self.make_rng("dropout")) if noisy else (None, None)
        own = gathered({"wte": self.wte, "wpe": self.wpe}, c.mesh)
        x_BTD = dropout(own["wte"][tokens] + own["wpe"][positions], c.dropout, embedding_key)
        x_BTD = constrain(x_BTD, "rows", c.mesh)

        start, seen, slots = jnp.int32(0), attention_mask, length
        if cache is not None:
            assert attention_mask is not None
            start, slots = cache.index, cache.mask.shape[1]
            seen = jax.lax.dynamic_update_slice(cache.mask, attention_mask, (0, start))
        visible_BTS = (jnp.arange(slots) <= start + jnp.arange(length)[:, None])[None]
        causal_only = layout is None and seen is None
        # What one product gives is cut in three for attention, and put together again in a backward pass, if there is one. (On a
        # TPU three would send half as many messages again under fsdp.)
        three = cache is None and (on_cpu(c.mesh) or on_gpu())
        if layout is not None:
            visible_BTS &= visible(layout)
        elif seen is not None:
            visible_BTS &= seen[:, None, :]

        def step(x_BTD, layer, last=None):
            p, i, kv = layer
            p = p if blocks else gathered(p, c.mesh, jnp.dtype(c.compute_dtype), stacked=True)
            block_key, attention_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, i))

            def attend(q_BHTK, k_BHTK, v_BHTK):
                nonlocal kv
                seen_by = visible_BTS[:, -q_BHTK.shape[2] :]
                if kv is not None:
                    old_new = zip(kv, (k_BHTK, v_BHTK), strict=True)
                    kv = tuple(jax.lax.dynamic_update_slice(old, new, (0, 0, start, 0)) for old, new in old_new)
                    k_BHTK, v_BHTK = kv
                    return attention(q_BHTK, k_BHTK, v_BHTK, seen_by, c.dropout, attention_key)
                if key is None and last is None and can_fuse(q_BHTK, c.mesh):
                    return fused_attention(q_BHTK, k_BHTK, v_BHTK, None if causal_only else visible_BTS)
                return causal_attention(q_BHTK, k_BHTK, v_BHTK, seen_by, c.dropout, attention_key)

            return constrain(block(c, p, x_BTD, attend, block_key, three, last), "rows", c.mesh), kv

        if blocks is not None:
            assert cache is not None
            kvs = []
            for i, (p, *kv) in enumerate(zip(blocks, cache.k, cache.v, strict=True)):
                x_BTD, kv = step(x_BTD, (p, i, kv))
                kvs.append(kv)
            kvs = tuple(zip(*kvs, strict=True))
        else:
            # Of each block a backward pass finds what the products with parameters gave, and makes the rest anew, which is cheaper
            # than to keep it: normed inputs, activations, attention, and under fsdp the gathered parameters. A step of 124M
            # parameters on 8 x 512 tokens needs 2.3 GB beside its state, not 4.0 and more, and is no slower.
            def remade(step):
                if cache is not None and not c.remat:
                    return step
                return jax.checkpoint(step, policy=None if c.remat else saved, prevent_cse=False)

            # A GPU writes the blocks out one after the other: what a loop keeps for the backward pass it copies into stacks. But
            # outside a loop XLA may see that a block made anew is the block as it was, and keep it, gathered parameters too.
            anew = c.remat or (c.mesh is not None and c.mesh.shape["fsdp"] > 1)
            unroll = cache is None and on_gpu() and not anew and c.n_layer <= MOST_UNROLLED
            layers = self.blocks, jnp.arange(c.n_layer), None if cache is None else (cache.k, cache.v)
            if last is None:
                x_BTD, kvs = jax.lax.scan(remade(step), x_BTD, layers, unroll=unroll)
            else:
                early, final = (jax.tree.map(take, layers) for take in (lambda x: x[:-1], lambda x: x[-1]))
                x_BTD, kvs = jax.lax.scan(remade(step), x_BTD, early, unroll=unroll)
                # Its backward pass comes first: should XLA keep it and not make it anew, that is no more at the peak than it makes then.
                x_BTD, kv = remade(functools.partial(step, last=last))(x_BTD, final)
                kvs = jax.tree.map(lambda stack, one: jnp.concatenate([stack, one[None]]), kvs, kv)
        if cache is not None:
            cache = cache._replace(k=kvs[0], v=kvs[1], mask=seen, index=start + length)
        return layer_norm(x_BTD, self.ln_f, c.layer_norm_epsilon), cache

    def __call__(self, tokens: Array, attention_mask: Array) -> Array:
        """Next-token logits f32[B,T,V] over the real vocabulary; for people and tests. The hot paths call `hidden`."""
        return head(self.config, self.wte, self.hidden(tokens, attention_mask)[0])[..., : self.config.vocab_size]


def hidden(
    params: Params,
    tokens: Array | np.ndarray,
    attention_mask: Array | np.ndarray | None,
    cache: KVCache | None = None,
    layout: Layout | None = None,
    key: Array | None = None,  # of the dropout; None = no dropout
    blocks: tuple[Params, ...] | None = None,
    last: int | None = None,
    *,
    model: GPT2,
) -> tuple[Array, KVCache | None]:
    """GPT2.hidden as a function of its parameters: what the hot paths call."""
    rngs = None if key is None else {"dropout": key}
    found: Any = model.apply(
        {"params": params}, tokens, attention_mask, cache, layout, blocks, last, rngs=rngs, method="hidden"
    )
    return found


def head(config: GPT2Config, wte: Array, hidden: Array, few: bool = False) -> Array:
    """hidden [..., D] -> logits f32[..., padded vocabulary], the spare rows at the float minimum. few: hidden is [B, D] with a
    small B, as in decoding."""
    dtype = jnp.dtype(config.compute_dtype)
    if few and hidden.shape[-1] >= WIDE:
        logits = few_rows(hidden.astype(dtype), wte.astype(dtype))
    else:
        rows = "bt"[: hidden.ndim - 1]
        logits = jnp.asarray(product(f"{rows}d,vd->{rows}v", dtype, hidden, wte))
    spare, lowest = config.padded_vocab_size - config.vocab_size, jnp.finfo(jnp.float32).min
    if config.mesh is not None and config.mesh.size > 1:  # written where each device has them
        return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, lowest) if spare else logits
    # Written in place, into the two axes that the product has: a choice in every column would be one more pass over all of them.
    rows = logits.reshape(-1, config.padded_vocab_size)
    rows = jax.lax.dynamic_update_slice(rows, jnp.full((len(rows), spare), lowest), (0, config.vocab_size))
    return rows.reshape(logits.shape)


class ValueHead(nn.Module):
    """A scalar from each hidden state: hidden f32[...,D] -> values f32[...]. Zero at the start, so the first advantages
    are those of the rewards alone, and no random critic wrecks the policy that it shares a trunk with."""

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        return nn.Dense(1, kernel_init=nn.initializers.zeros, dtype=jnp.float32, name="value")(hidden)[..., 0]


def init(config: GPT2Config, key: Array) -> Params:
    """Random parameters of a new model (float32)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(GPT2(config).init)(key, tokens, jnp.ones((1, 1), bool))["params"]


def count(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
