"""Log-probs and losses walked in chunks: what torch gives for all logits at once, without ever holding them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from therapy_jax import gpt2, head, sharding
from therapy_jax.config import MeshConfig

CONFIG = gpt2.GPT2Config(vocab_size=300, n_embd=16, n_head=2, n_layer=1)  # padded to 384
B, T, D = 4, 23, 16


def squared(logprobs, entropy, weight):
    """A loss that is nobody's: not linear in the log-prob, with the entropy and an array of its own in it."""
    return weight * jnp.square(logprobs) - 1.5 * entropy


def make(seed=0, share=0.4):
    random = np.random.default_rng(seed)
    wte, hidden = random.normal(0, 0.5, (384, D)), random.normal(0, 1, (B, T, D))
    tokens, counted = random.integers(0, 300, (B, T)), random.random((B, T)) < share
    weight = random.normal(0, 1, (B, T))
    return *(x.astype(np.float32) for x in (wte, hidden)), tokens, counted, weight.astype(np.float32)


def torchs(wte, hidden, tokens, counted, weight, temperature, bonus=1.5):
    """All logits at once, float64 -> loss, log-probs, entropy, gradients."""
    wte, hidden = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (wte, hidden))
    logs = torch.log_softmax(hidden @ wte[:300].T / temperature, -1)
    chosen = logs.gather(-1, torch.tensor(tokens)[..., None])[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    mask = torch.tensor(counted)
    loss = ((torch.tensor(weight) * chosen**2 - bonus * entropy) * mask).sum()
    loss.backward()
    assert wte.grad is not None and hidden.grad is not None
    return loss.item(), *((x * mask).detach().numpy() for x in (chosen, entropy)), wte.grad.numpy(), hidden.grad.numpy()


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])  # more chunks than one, a last one that is not full, one for all
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_logprobs_and_gradients_are_torchs(chunk, shards, share, monkeypatch):
    monkeypatch.setattr(head, "chunk_size", lambda rows: chunk)
    config = dataclasses.replace(CONFIG, mesh=sharding.make_mesh(MeshConfig(data=shards)))
    wte, hidden, tokens, counted, weight = make(share=share)
    hidden[~counted] = 50.0  # what stands where nothing counts must not matter
    spec = head.Spec(config, squared, temperature=0.7)

    def ours(wte, hidden):
        total, *rest = head.head_loss(spec, wte, hidden, tokens, counted, (weight,))
        return total, rest

    (loss, (logprobs, entropy)), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(wte, hidden)
    expected = torchs(wte, hidden, tokens, counted, weight, 0.7)
    for name, found, wanted in zip(
        ("loss", "log-probs", "entropy", "wte", "hidden"), (loss, logprobs, entropy, *grads), expected, strict=True
    ):  # float32 against float64: sums of up to 300 terms of size 10
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(wanted).max()), err_msg=name)
    plain = head.head_loss(spec, wte, hidden, tokens, counted, (weight,))[
        0
    ]  # not differentiated: no gradient is walked
    np.testing.assert_allclose(plain, loss, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_without_the_entropy_is_not_given_it_and_has_torchs_gradients(dtype, monkeypatch):
    monkeypatch.setattr(head, "chunk_size", lambda rows: 32)
    wte, hidden, tokens, counted, weight = make(1)

    def by_logprob(logprobs, entropy, weight):
        assert entropy is None
        return weight * jnp.square(logprobs)

    spec = head.Spec(dataclasses.replace(CONFIG, compute_dtype=dtype), by_logprob, 0.7, with_entropy=False)

    def ours(wte, hidden):
        total, *rest = head.head_loss(spec, wte, hidden, tokens, counted, (weight,))
        return total, rest

    (loss, (logprobs, entropy)), grads = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(wte, hidden)
    loss_wanted, *wanted = torchs(wte, hidden, tokens, counted, weight, 0.7, bonus=0.0)
    # bfloat16 keeps 8 bits: sums of 300 products of two of them, each 0.4 % off at most, most of it averaged away.
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert loss == pytest.approx(loss_wanted, rel=tolerance)
    for found, right in zip((logprobs, entropy, *grads), wanted, strict=True):
        np.testing.assert_allclose(found, right, atol=tolerance * np.abs(right).max(), rtol=0)


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    """No array of the compiled program holds more rows of the vocabulary's width than a chunk."""
    monkeypatch.setattr(head, "chunk_size", lambda rows: 8)
    wte, hidden, tokens, counted, weight = make()

    def loss(wte, hidden):
        return head.head_loss(head.Spec(CONFIG, squared), wte, hidden, tokens, counted, (weight,))[0]

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(wte, hidden).compile().as_text()
    widths = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    rows = {np.prod(shape) // 384 for shape in widths if 384 in shape and D not in shape}
    assert rows and max(rows) <= 8


def test_logprobs_without_a_loss_refuse_to_be_differentiated():
    """Their gradient would silently be 0."""
    wte, hidden, tokens, counted, _ = make()

    def sum_of_logprobs(hidden):
        return head.head_loss(head.Spec(CONFIG), wte, hidden, tokens, counted)[1].sum()

    with pytest.raises(TypeError, match="token_loss"):
        jax.grad(sum_of_logprobs)(hidden)


def test_the_gradient_scales_with_what_comes_after():
    wte, hidden, tokens, counted, weight = make()

    def total(hidden):
        return head.head_loss(head.Spec(CONFIG, squared), wte, hidden, tokens, counted, (weight,))[0]

    one, six = jax.grad(total)(hidden), jax.grad(lambda h: -6.0 * total(h))(hidden)
    np.testing.assert_allclose(six, -6 * one, rtol=1e-6)
    assert np.abs(one)[counted].max() > 0.1 and not np.asarray(one)[~counted].any()


def test_chunks_on_a_gpu_are_a_quarter_of_the_rows_within_bounds(monkeypatch):
    monkeypatch.setattr(head, "on_gpu", lambda: True)
    assert [head.chunk_size(n) for n in (1000, 16384, 65536)] == [2048, 4096, 8192]
