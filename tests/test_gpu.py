"""On a GPU: cuDNN's attention against the plain one, bfloat16 against float32, and the GPU's replies against the CPU's.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py

Skipped where there is none. Relative errors are those of bfloat16, which keeps 8 bits (4e-3): 1e-2 of the norm.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from therapy_jax import attention, gpt2, sft
from therapy_jax.batching import Batch, Prompt, without_mask
from therapy_jax.config import SamplingConfig
from therapy_jax.sampling import generate, reply_hidden, reply_logprobs

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py"
)
CONFIG = gpt2.GPT2Config(vocab_size=500, n_positions=256, n_embd=128, n_layer=2, n_head=4, eos_token_id=499)
BFLOAT16 = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
needs_kernel = pytest.mark.skipif(
    not attention.can_fuse(jnp.zeros((1, 1, 2, 8), jnp.bfloat16), None), reason="this GPU has no attention by cuDNN"
)
B, T = 3, 96


def distance(ours, oracle):
    a, b = (np.asarray(x, np.float64) for x in (ours, oracle))
    assert np.isfinite(a).all()
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def rows(kind):
    """-> (attention_mask bool[B,T], layout)."""
    place = np.arange(T)
    lengths = np.array([[T], [50], [7]])
    if kind == "left padded":
        return place >= T - lengths, None
    if kind == "right padded":
        return place < lengths, None
    if kind == "full":
        return np.ones((B, T), bool), None
    # Two texts in a row, the second of which continues the first's tokens before place 20; then padding.
    stretch = np.broadcast_to(np.where(place < 40, 0, np.where(place < 80, 1, -1)), (B, T))
    parent = np.where(stretch == 1, 0, -1)
    start = np.where(stretch == 1, 20, 0)
    position = np.where(stretch == 1, place - 20, place)
    return stretch >= 0, attention.Layout(*(x.astype(np.int32) for x in (position, stretch, parent, start)))


@needs_kernel
@pytest.mark.parametrize("kind", ["full", "left padded", "right padded", "packed", "causal alone"])
def test_fused_attention_is_attention_and_so_are_its_gradients(kind):
    mask, layout = rows("full" if kind == "causal alone" else kind)
    seen = jnp.asarray(mask)[:, None, :] if layout is None else attention.visible(layout)
    visible = jnp.tril(jnp.ones((T, T), bool)) & seen
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, B, 4, T, 32))
    g = jnp.where(jnp.asarray(mask)[:, None, :, None], g, 0.0)  # nothing comes back for padding

    def both(attend, dtype):
        def f(q, k, v):
            seen = None if kind == "causal alone" and dtype == jnp.bfloat16 else visible
            out = attend(*(x.astype(dtype) for x in (q, k, v)), seen).astype(jnp.float32)
            return (out * g).sum(), jnp.where(g == 0, 0.0, out)

        (_, out), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    with jax.default_matmul_precision("highest"):
        oracle = both(lambda *x: attention.attention(*x, 0.0, None), jnp.float32)
    for name, a, b in zip(("out", "q", "k", "v"), both(attention.fused_attention, jnp.bfloat16), oracle, strict=True):
        assert distance(a, b) < 1e-2, name


@needs_kernel
@pytest.mark.parametrize("kind", ["left padded", "right padded", "packed"])
def test_a_bfloat16_gradient_uses_cudnn_and_is_that_of_float32(kind):
    mask, layout = rows(kind)
    tokens = np.random.default_rng(0).integers(0, 500, (B, T)).astype(np.int32)
    first = ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    batch = without_mask(Batch(tokens, mask, mask & ~first, layout))
    params = gpt2.init(CONFIG, jax.random.key(0))

    def gradient(config):
        f = jax.value_and_grad(
            functools.partial(sft.sft_loss, batch=batch, key=None, model=gpt2.GPT2(config)), has_aux=True
        )
        return jax.jit(f).lower(params).compile()

    fused = gradient(BFLOAT16)
    assert "__cudnn$fmha" in fused.as_text()
    with jax.default_matmul_precision("highest"):
        oracle = gradient(CONFIG)
    assert "__cudnn$fmha" not in oracle.as_text()
    ((loss, _), grads), ((loss_32, _), grads_32) = fused(params), oracle(params)
    assert abs(float(loss) / float(loss_32) - 1) < 1e-3
    flat, flat_32 = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (grads, grads_32))
    assert distance(flat, flat_32) < 2e-2  # products of products


def test_greedy_replies_are_those_of_the_cpu():
    params = gpt2.init(CONFIG, jax.random.key(0))
    blocks = jax.tree.map(lambda x: 3.0 * x, params["blocks"])  # else the embedding alone decides
    params = {**params, "blocks": blocks}
    tokens = np.random.default_rng(0).integers(0, 499, (4, 16)).astype(np.int32)
    mask = np.arange(16) >= np.array([[0], [3], [9], [15]])
    model, cfg = gpt2.GPT2(CONFIG), SamplingConfig(max_new_tokens=24, temperature=0.0)
    found = []
    for platform in ("gpu", "cpu"):
        with jax.default_device(jax.devices(platform)[0]), jax.default_matmul_precision("highest"):
            here = jax.device_put((params, Prompt(tokens, mask)), jax.devices(platform)[0])
            found.append(jax.device_get(generate(*here, jax.random.key(0), model=model, cfg=cfg)))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].logprobs, found[1].logprobs, atol=1e-4)


def test_sampler_and_recomputed_logprobs_agree_in_bfloat16():
    params = gpt2.init(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 499, (4, 16)).astype(np.int32)
    prompt = Prompt(tokens, np.arange(16) >= np.array([[0], [3], [9], [15]]))
    model, cfg = gpt2.GPT2(BFLOAT16), SamplingConfig(max_new_tokens=24, temperature=1.0)
    reply = jax.jit(functools.partial(generate, model=model, cfg=cfg))(params, prompt, jax.random.key(0))
    hidden = reply_hidden(params, prompt, reply.tokens, reply.mask, model=model)
    again, _ = reply_logprobs(params, hidden, reply.tokens, reply.mask, model=model, temperature=1.0)
    assert float(jnp.abs(reply.logprobs - again).mean()) < 1e-2  # nats; log-probs of -6 in eight bits
