"""GPT-2 against torch's, on folders that torch wrote: logits, gradients, cache, padding, precision, dropout."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from therapy_jax import gpt2, sft, weights
from therapy_jax.attention import QUERIES, attention, causal_attention
from therapy_jax.batching import Batch
from therapy_jax.head import logprobs_and_entropy, softmax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "vocabulary a multiple of 128": {"vocab_size": 384, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "n_inner set, vocabulary not": {
        "vocab_size": 300,
        "n_positions": 24,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 80,
    },
    "one layer, relu, large epsilon": {
        **{"vocab_size": 129, "n_positions": 20, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_inner": 33},
        **{"activation_function": "relu", "layer_norm_epsilon": 0.05},
    },
}
SMALL = CONFIGS["n_inner set, vocabulary not"]


def torch_model(sizes):
    """All weights moved at random, biases and layer norms too: a zero or a one would hide whether it is read at all."""
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits, for minutes where cores are busy
    torch.manual_seed(0)
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def load(model, folder):
    model.save_pretrained(folder)
    return weights.load_pretrained(folder)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens, mask, key=None):
    return gpt2.GPT2(config).apply({"params": params}, tokens, mask, rngs=None if key is None else {"dropout": key})


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params, tokens, mask, cache=None):
    return gpt2.GPT2(config).apply({"params": params}, tokens, mask, cache, method="hidden")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load(torch_model(SMALL), tmp_path_factory.mktemp("gpt2"))


def tokens_of(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (batch, length)).astype(np.int32)


def padded(length, *paddings):
    return np.asarray([[t >= k for t in range(length)] for k in paddings])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_torchs(name, tmp_path):
    sizes = CONFIGS[name]
    length = sizes["n_positions"]
    oracle = torch_model(sizes)
    config, params = load(oracle, tmp_path / "model")
    tokens = np.random.default_rng(1).integers(0, sizes["vocab_size"], (3, length)).astype(np.int32)
    mask = padded(length, 0, 3, length // 2)  # left padding by three different amounts
    counted = (
        mask & np.roll(mask, 1, axis=1) & (np.arange(length) > 0)
    )  # a first token has nothing to be predicted from

    out = oracle(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        labels=torch.tensor(np.where(counted, tokens, -100)).long(),
    )
    logits = np.asarray(apply(config, params, tokens, mask))
    theirs = out.logits.detach().numpy()
    assert logits.dtype == np.float32 and logits.shape == (3, length, sizes["vocab_size"])
    # Two float32 programs differ by rounding, some 1e-6 of the largest logit; a wrong epsilon or gelu by 1e-3 and more.
    assert np.abs(logits - theirs)[mask].max() < 1e-4 * np.abs(theirs[mask]).max()

    def mean_loss(params):
        loss, count = sft.sft_loss(params, Batch(tokens, mask, counted), None, model=gpt2.GPT2(config))
        return loss / count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(jax.tree.map(jnp.asarray, params))
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    out.loss.backward()
    with torch.no_grad():  # torch's gradients, saved as if they were weights, come back in our layout
        for p in oracle.parameters():
            p.copy_(p.grad)
    _, expected = load(oracle, tmp_path / "gradients")
    # Relative to the global norm: the gradient of a key bias is zero but for rounding, so it has no scale of its own.
    norm = optax.tree.norm(expected)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-4 * norm


def test_causal_by_gradients(small):
    """Row p of wpe enters at position p alone, so d(output t)/d(wpe[p]) is exactly 0 for p > t, and only there."""
    config, params = small
    tokens = tokens_of(1, 12)
    weigh = np.random.default_rng(1).normal(size=config.vocab_size)

    def outputs(wpe):
        return (
            gpt2.GPT2(config).apply({"params": {**params, "wpe": wpe}}, tokens, np.ones_like(tokens, bool))[0] @ weigh
        )

    size = np.abs(jax.jit(jax.jacrev(outputs))(jnp.asarray(params["wpe"]))).sum(-1)[:, :12]  # [output, position]
    assert (size[np.triu_indices(12, 1)] == 0).all()
    assert (size[np.tril_indices(12)] > 1e-6 * size.max()).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(small, side):
    config, params = small
    tokens, garbage = tokens_of(2, 12), tokens_of(2, 7, seed=5)
    plain = apply(config, params, tokens, np.ones((2, 12), bool))
    both = np.concatenate([garbage, tokens] if side == "left" else [tokens, garbage], 1)
    real = slice(7, None) if side == "left" else slice(None, 12)
    mask = np.zeros((2, 19), bool)
    mask[:, real] = True
    got = apply(config, params, both, mask)[:, real]
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("pieces", [[6] + [1] * 6, [1, 5, 6]])
def test_cached_is_uncached(small, pieces):
    config, params = small
    tokens, mask = tokens_of(2, 12), padded(12, 0, 4)
    whole, none = hidden(config, params, tokens, mask)
    assert none is None
    cache, parts = gpt2.init_cache(config, 2, 15), []  # three slots stay free
    for start, n in zip(np.cumsum([0, *pieces[:-1]]), pieces, strict=True):
        part, cache = hidden(config, params, tokens[:, start : start + n], mask[:, start : start + n], cache)
        parts.append(part)
    assert int(cache.index) == 12 and not cache.mask[:, 12:].any()
    np.testing.assert_allclose(np.concatenate(parts, 1)[mask], whole[mask], rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(("layers", "length", "last"), [(1, 12, 5), (2, 12, 1), (2, 12, 12), (1, 300, 280)])
def test_the_last_positions_alone_are_as_among_all(layers, length, last):
    """Values, the gradients of every parameter, and the cache; more queries than one stretch has, too."""
    config = gpt2.GPT2Config(vocab_size=300, n_positions=512, n_embd=48, n_layer=layers, n_head=4)
    params = gpt2.init(config, jax.random.key(1))
    tokens, mask = tokens_of(2, length), padded(length, 0, 4)
    weights = jax.random.normal(jax.random.key(2), (2, last, 48)) * mask[:, -last:, None]

    def seen(params, last, cache):
        found, cache = gpt2.hidden(params, tokens, mask, cache, last=last, model=gpt2.GPT2(config))
        return (found[:, -weights.shape[1] :] * weights).sum(), (found, cache)

    @functools.partial(jax.jit, static_argnums=0)
    def of(last, params, cache):
        return jax.value_and_grad(seen, has_aux=True)(params, last, cache)

    for cache in (None, gpt2.init_cache(config, 2, length + 3)):
        (_, (all_of_them, wanted)), grads = of(None, params, cache)
        (_, (alone, found)), found_grads = of(last, params, cache)
        assert alone.shape == (2, last, 48)
        real = mask[:, -last:]
        np.testing.assert_allclose(alone[real], all_of_them[:, -last:][real], rtol=1e-5, atol=1e-5)
        for tree, other in ((grads, found_grads), (wanted, found)):
            assert jax.tree.structure(tree) == jax.tree.structure(other)
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
                a = np.asarray(a, np.float32)
                np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * (np.abs(a).max() + 1e-6))


def test_spare_vocabulary_never_gets_probability(small):
    config, params = small
    assert config.padded_vocab_size == 384 and params["wte"].shape == (384, 48)
    loud = params["wte"].copy()
    loud[300:] = 100.0  # whatever training or sharding may leave there
    states = jax.random.normal(jax.random.key(0), (5, 48))
    logits = gpt2.head(config, jnp.asarray(loud), states)
    probabilities = jax.nn.softmax(logits)
    assert logits.shape == (5, 384) and (probabilities[:, 300:] == 0).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(logits[:, :300], gpt2.head(config, jnp.asarray(params["wte"]), states)[:, :300])
    chosen, entropy = logprobs_and_entropy(logits, jnp.arange(5), softmax(logits))
    np.testing.assert_allclose(chosen, np.log(probabilities[np.arange(5), np.arange(5)]), rtol=1e-5)
    p = np.asarray(probabilities[:, :300], np.float64)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    sizes = {gpt2.GPT2Config(vocab_size=n).padded_vocab_size for n in (1, 128)} | {gpt2.GPT2Config().padded_vocab_size}
    assert sizes == {128, 50304}


def test_bfloat16_stays_near_float32(small):
    config, params = small
    tokens, mask = tokens_of(2, 12), padded(12, 0, 4)
    exact = np.asarray(apply(config, params, tokens, mask))[mask]
    rough = np.asarray(apply(dataclasses.replace(config, compute_dtype="bfloat16"), params, tokens, mask))[mask]
    # bfloat16 keeps 8 bits, 0.4 % a rounding; some ten of them on the way to a logit: at most 2 % of the spread.
    error = np.sqrt(np.square(rough - exact).mean()) / exact.std()
    assert rough.dtype == np.float32 and 1e-4 < error < 0.02
    assert (
        rough != rough.astype(jnp.bfloat16)
    ).mean() > 0.9  # summed and kept in float32, not rounded to bfloat16 on the way
    cache = gpt2.init_cache(dataclasses.replace(config, compute_dtype="bfloat16"), 2, 4)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16


def test_dropout_only_with_a_key(small):
    config, params = small
    tokens, mask = tokens_of(2, 12), np.ones((2, 12), bool)
    on = dataclasses.replace(config, dropout=0.3)
    keyed = [np.asarray(apply(on, params, tokens, mask, jax.random.key(i))) for i in (0, 0, 1)]
    plain = np.asarray(apply(on, params, tokens, mask))
    np.testing.assert_array_equal(plain, apply(config, params, tokens, mask))
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert min(np.abs(keyed[0] - plain).max(), np.abs(keyed[0] - keyed[2]).max()) > 0.1

    ones = np.asarray(gpt2.dropout(jnp.ones(100_000), 0.3, jax.random.key(0)))
    assert set(np.unique(ones)) == {0, np.float32(1 / 0.7)}
    assert abs((ones == 0).mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 100_000)  # four standard errors; the mean stays 1


def test_new_model(small):
    """Section 2.3 of the paper: N(0, 0.02), residual projections smaller by 1/sqrt(2L); log V nats at the start."""
    config = dataclasses.replace(small[0], n_layer=4)
    params = gpt2.init(config, jax.random.key(0))
    shapes = jax.tree.map(np.shape, params)
    assert shapes["wte"] == (384, 48) and shapes["blocks"]["c_attn"]["kernel"] == (4, 48, 3, 3, 16)
    assert params["wte"].std() == pytest.approx(0.02, rel=0.05)
    assert params["blocks"]["mlp_proj"]["kernel"].std() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    d, f = 48, 80
    per_block = 4 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * f + (f + 1) * d
    assert gpt2.count(params) == 384 * d + 24 * d + 4 * per_block + 2 * d
    logits = apply(config, params, tokens_of(4, 24), np.ones((4, 24), bool))
    logs = jax.nn.log_softmax(logits)
    assert -float((jnp.exp(logs) * logs).sum(-1).mean()) == pytest.approx(math.log(300), rel=0.01)

    head = gpt2.ValueHead()
    values = np.asarray(head.apply(head.init(jax.random.key(0), jnp.ones((1, 48))), jnp.ones((2, 3, 48))))
    np.testing.assert_array_equal(values, np.zeros((2, 3)))


def test_attention_drops_weights_after_the_softmax():
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 3, 40, 8))
    v, seen = jnp.broadcast_to(jnp.eye(40), (2, 3, 40, 40)), np.tril(np.ones((40, 40), bool))  # v = I shows the weights
    scores = np.einsum("bhtk,bhsk->bhts", *(np.asarray(x, float) for x in (q, k))) / np.sqrt(8)
    z = np.where(seen, np.exp(scores), 0)
    weights = z / z.sum(-1, keepdims=True)
    visible = jnp.broadcast_to(seen, (2, 40, 40))
    np.testing.assert_allclose(attention(q, k, v, visible, 0.0, None), weights, rtol=1e-4, atol=1e-6)
    got = np.asarray(attention(q, k, v, visible, 0.25, jax.random.key(1)))
    np.testing.assert_allclose(got[got != 0], (weights / 0.75)[got != 0], rtol=1e-4)
    n = (weights > 0).sum()
    assert abs((got[weights > 0] == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("length", [QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES + 40])
def test_a_long_row_mixes_as_jaxs_attention_does_and_has_its_gradients(length):
    """jax.nn.dot_product_attention, which is not ours, with the same mask: causal, and the first row has padding on its left."""
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, 2, 3, length, 8))
    visible = np.tril(np.ones((length, length), bool)) & (np.arange(length) >= [[[7]], [[0]]])
    real = (np.arange(length) >= [[7], [0]])[:, None, :, None]  # what a padding query gives is of no use

    def oracle(q, k, v):
        turned = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(*turned, mask=visible[:, None]).swapaxes(1, 2)

    def both(f):
        return jax.value_and_grad(lambda *x: (jnp.where(real, f(*x), 0.0) * g).sum(), argnums=(0, 1, 2))(q, k, v)

    ours, theirs = both(lambda q, k, v: causal_attention(q, k, v, jnp.asarray(visible), 0.0, None)), both(oracle)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)  # sums of up to 552 products in another order


def test_stretches_of_a_row_drop_other_weights():
    length = 2 * QUERIES
    q = k = jnp.zeros((1, 1, length, 8))  # all weights are alike: what differs is what was dropped
    v, seen = jnp.eye(length)[None, None], jnp.tril(jnp.ones((1, length, length), bool))
    dropped = np.asarray(causal_attention(q, k, v, seen, 0.5, jax.random.key(0))[0, 0] == 0)
    # By one key, rows 0, 2, 4, ... of the first stretch would lose what rows 0, 1, 2, ... of the second, twice as wide, lose.
    first, second = dropped[:QUERIES:2, :QUERIES], dropped[QUERIES : QUERIES + QUERIES // 2, :QUERIES]
    seen = np.tril(np.ones((QUERIES, QUERIES), bool))[::2]
    assert abs((first[seen] == second[seen]).mean() - 0.5) < 0.02
