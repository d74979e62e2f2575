"""Generation: torch's tokens when greedy, the right distribution when drawn, and the same reply in any company."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from therapy_jax import batching, gpt2, sampling, weights
from therapy_jax.config import SamplingConfig

LOWEST = np.finfo(np.float32).min
CONFIG = gpt2.GPT2Config(vocab_size=200, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=3)
PROMPTS = [[11, 12, 13, 14, 15], [21], [31, 32, 33], [41, 42]]


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(functools.partial(gpt2.init, CONFIG), jax.random.key(0))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


@functools.cache
def sampler(**knobs):
    return jax.jit(functools.partial(sampling.generate, model=gpt2.GPT2(CONFIG), cfg=SamplingConfig(**knobs)))


@pytest.mark.parametrize("width", [32, 512])  # a wide model decodes with its kernels turned over
def test_greedy_is_torchs(width, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits, for minutes where cores are busy
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 80, "n_embd": width, "n_layer": 2, "n_head": 4}
    oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=299)).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(0.3 * torch.randn_like(p))
    prompt = batching.prompts([[5, 6, 7, 8, 9, 10], [100], [50, 60, 70], [200, 201]], 6)

    def torchs(eos):
        inputs = {"input_ids": torch.tensor(prompt.tokens).long(), "attention_mask": torch.tensor(prompt.mask).long()}
        length = {"max_new_tokens": 64, "pad_token_id": 0, "eos_token_id": eos}
        with torch.no_grad():
            out = oracle.generate(**inputs, **length, do_sample=False)[:, 6:].numpy()
        return np.pad(out, ((0, 0), (0, 64 - out.shape[1])))

    free = torchs(-1)  # never ends; a token that some rows write after a while, and some never, then plays EOS
    written = [{t: list(row).index(t) for t in row} for row in free]
    eos = next(
        t for row in written for t, i in row.items() if 5 < i < 60 and sum(t in other for other in written) in (1, 2, 3)
    )
    oracle.config.eos_token_id = int(eos)
    oracle.save_pretrained(tmp_path)
    config, params = weights.load_pretrained(tmp_path)
    cfg = SamplingConfig(max_new_tokens=64, temperature=0.0)
    reply = jax.jit(functools.partial(sampling.generate, model=gpt2.GPT2(config), cfg=cfg))(
        params, prompt, jax.random.key(0)
    )
    np.testing.assert_array_equal(reply.tokens, torchs(int(eos)))
    assert len(np.unique(free)) > 20  # no constant babble
    ends = [row.get(eos, 63) for row in written]
    assert min(ends) < 60 and max(ends) == 63
    np.testing.assert_array_equal(reply.mask, np.arange(64) <= np.asarray(ends)[:, None])


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 20, "top_p": 0.9}])
def test_a_stream_is_the_reply_token_by_token(params, knobs):
    """For the same key: the same draws, so the same tokens, EOS the last one where it comes."""
    cfg, asked = SamplingConfig(max_new_tokens=12, **knobs), [batching.prompts([row], 8) for row in PROMPTS[::2]]
    free = sampler(max_new_tokens=12, **knobs)(params, asked[0], jax.random.key(0))
    ended = set()
    for eos in (CONFIG.eos_token_id, int(free.tokens[0, 6])):  # one that hardly comes, and one that does
        model = gpt2.GPT2(dataclasses.replace(CONFIG, eos_token_id=eos))
        generate = jax.jit(functools.partial(sampling.generate, model=model, cfg=cfg))
        for prompt, seed in itertools.product(asked, range(2)):
            streamed = list(sampling.stream(params, prompt, jax.random.key(seed), model=model, cfg=cfg))
            reply = generate(params, prompt, jax.random.key(seed))
            assert streamed == np.asarray(reply.tokens)[np.asarray(reply.mask)].tolist()
            ended.add(streamed[-1] == eos)
    assert ended == {True, False}  # both ways to stop were met


def test_a_stream_too_long_for_the_model_is_refused(params):
    cfg = SamplingConfig(max_new_tokens=60)
    with pytest.raises(ValueError, match="64 positions"):
        next(sampling.stream(params, batching.prompts([[1]], 8), jax.random.key(0), model=gpt2.GPT2(CONFIG), cfg=cfg))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_reply_is_the_same_in_any_company(params, temperature):
    """Alone or in a batch, padded by 0 or by 30: the same tokens, and log-probs within rounding."""
    generate = sampler(max_new_tokens=12, temperature=temperature)
    keys = jax.random.split(jax.random.key(7), 4)
    together = generate(params, batching.prompts(PROMPTS, 5), keys)
    if temperature:
        assert len({tuple(row) for row in np.asarray(together.tokens)}) == 4
    further = generate(params, batching.prompts(PROMPTS, 35), keys)
    alone = [
        (generate(params, batching.prompts([PROMPTS[i]], n), keys[i : i + 1]), slice(i, i + 1))
        for i in (0, 1)
        for n in (5, 35)
    ]
    for other, rows in [(further, slice(None)), *alone]:
        np.testing.assert_array_equal(other.tokens, together.tokens[rows])
        np.testing.assert_array_equal(other.mask, together.mask[rows])
        np.testing.assert_allclose(other.logprobs, together.logprobs[rows], atol=1e-5)
    if temperature:  # one key for the batch is a key per row, folded in; and another key is another reply
        folded = jnp.stack([jax.random.fold_in(jax.random.key(7), i) for i in range(4)])
        keys = (jax.random.key(7), folded, jax.random.key(8))
        one, same, other = (generate(params, batching.prompts(PROMPTS, 5), k).tokens for k in keys)
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


def test_logprobs_are_those_of_the_one_function(params):
    """Temperature inside, 200 real tokens of 256; the cached decode and the full forward agree within rounding."""
    prompt = batching.prompts(PROMPTS, 5)
    model = gpt2.GPT2(CONFIG)
    states = jax.jit(functools.partial(sampling.reply_hidden, model=model))
    for temperature in (0.6, 1.7):
        reply = sampler(max_new_tokens=12, temperature=temperature)(params, prompt, jax.random.key(1))
        hidden = states(params, prompt, reply.tokens, reply.mask)
        logprobs, entropy = sampling.reply_logprobs(
            params, hidden, reply.tokens, reply.mask, model=model, temperature=temperature
        )
        np.testing.assert_allclose(reply.logprobs, logprobs, atol=1e-5)
        logits = np.asarray(gpt2.head(CONFIG, params["wte"], hidden), np.float64)[..., :200] / temperature
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = np.take_along_axis(p, np.asarray(reply.tokens)[..., None], -1)[..., 0]
        np.testing.assert_allclose(logprobs, np.where(reply.mask, np.log(chosen), 0), atol=1e-4)
        np.testing.assert_allclose(entropy, np.where(reply.mask, -(p * np.log(p)).sum(-1), 0), atol=1e-4)


def test_a_prompt_read_once_gives_what_each_reply_behind_its_own_copy_gives(params):
    """Three replies to each of four prompts, of mixed lengths: hidden states and gradients equal those of twelve rows
    prompt + reply, one forward without a cache, in other words other programs on other shapes (hence the tolerance)."""
    model, times = gpt2.GPT2(CONFIG), 3
    prompt = batching.prompts(PROMPTS, 5)
    reply = jax.jit(functools.partial(sampling.generate, model=model, cfg=SamplingConfig(12, 1.0), times=times))(
        params, prompt, jax.random.key(2)
    )
    assert len({tuple(row) for row in np.asarray(reply.tokens).tolist()}) == 12
    mask = np.arange(12) < np.random.default_rng(0).integers(0, 13, (12, 1))  # as if they had ended there

    def once(params):
        return sampling.reply_hidden(params, prompt, reply.tokens, mask, model=model)

    def copied(params):
        rows = [jnp.repeat(jnp.asarray(x), times, 0) for x in prompt]
        both = [jnp.concatenate(pair, 1) for pair in ((rows[0], reply.tokens), (rows[1], mask))]
        return model.apply({"params": params}, *both, method="hidden")[0][:, 4:-1]

    def pulled(states):  # any function of the reply's states, and its gradient
        weights = jnp.cos(jnp.arange(12 * 12 * CONFIG.n_embd)).reshape(12, 12, -1) * mask[..., None]
        return jax.jit(jax.value_and_grad(lambda p: (states(p) * weights).sum()))(params)

    np.testing.assert_allclose(once(params)[mask], copied(params)[mask], atol=2e-5)
    (value, grads), (expected, expected_grads) = pulled(once), pulled(copied)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-3)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


class Counting:
    """A model that says the next number, and counts how often it is run: makes every token and step predictable."""

    def __init__(self, eos):
        self.config = gpt2.GPT2Config(vocab_size=128, n_positions=64, n_embd=128, n_layer=1, n_head=1, eos_token_id=eos)
        self.runs = 0

    def apply(self, variables, tokens, mask, cache, layout, blocks, last, *, rngs, method):
        jax.debug.callback(lambda: setattr(self, "runs", self.runs + 1))
        return 50.0 * jax.nn.one_hot((tokens + 1) % 128, 128), cache


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("last", "steps", "replies"),
    [
        ([99, 99], 1, [[100], [100]]),
        ([96, 99], 4, [[97, 98, 99, 100], [100]]),
        ([97, 10], 6, [[98, 99, 100], [11, 12, 13, 14, 15, 16]]),
        (
            [127, 100],
            6,
            [[0, 1, 2, 3, 4, 5], [101, 102, 103, 104, 105, 106]],
        ),  # token 0 and an EOS in the prompt are no end
    ],
)
def test_stops_when_all_have_ended(last, steps, replies, temperature):
    model: Any = Counting(eos=100)
    cfg = SamplingConfig(max_new_tokens=6, temperature=temperature)
    generate = jax.jit(functools.partial(sampling.generate, model=model, cfg=cfg))
    reply = generate(
        {"wte": jnp.eye(128), "blocks": {}}, batching.prompts([[5, last[0]], [last[1]]], 2), jax.random.key(0)
    )
    jax.effects_barrier()
    assert model.runs == 1 + steps  # the prefill, then one run a token of the longest reply
    tokens, mask = batching.pad(replies, 6, "right")
    np.testing.assert_array_equal(reply.tokens, tokens)
    np.testing.assert_array_equal(reply.mask, mask)
    assert (np.asarray(reply.logprobs)[~mask] == 0).all() and np.abs(reply.logprobs).max() < 1e-6
    assert ((tokens == 100) & mask).sum(1).tolist() == [row.count(100) for row in replies]


def test_positions_are_limited(params):
    prompt = batching.prompts([[1]], 53)
    with pytest.raises(ValueError, match=r"prompt \(53\) \+ max_new_tokens \(12\) exceed the model's 64 positions"):
        sampler(max_new_tokens=12)(params, prompt, jax.random.key(0))
    assert sampler(max_new_tokens=12)(params, batching.prompts([[1]], 52), jax.random.key(0)).tokens.shape == (1, 12)


def test_draw_follows_the_distribution():
    logits = np.random.default_rng(0).normal(0, 2, 384).astype(np.float32)
    logits[np.random.default_rng(1).random(384) < 0.5] = LOWEST
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    n = 20_000
    draw = jax.jit(lambda uniform: sampling.draw(jnp.broadcast_to(jnp.asarray(logits), (n, 384)), uniform))
    # An even grid of uniforms gives each token its share to a draw or two; rounding may move a border by one.
    grid = np.bincount(draw(jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)), minlength=384)
    assert np.abs(grid - n * p).max() <= 2.5
    random = np.bincount(draw(jax.random.uniform(jax.random.key(0), (n,))), minlength=384)
    assert random[p == 0].sum() == 0
    often = n * p > 5
    observed, expected = ([*x[often], x[~often].sum()] for x in (random, n * p))
    assert stats.chisquare(observed, expected).pvalue > 1e-3  # fixed seed: passes always, or never


_draw = jax.jit(sampling.draw)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.3, 0.97]), st.sampled_from([0.1, 2.0, 20.0]))
def test_draw_never_picks_weight_zero(seed, alive, spread):
    """Not at 0, not just below 1, and not on the borders between tokens, where float sums differ in the last bit."""
    random = np.random.default_rng(seed)
    logits = np.where(random.random((256, 640)) < alive, random.normal(0, spread, (256, 640)), LOWEST).astype(
        np.float32
    )
    logits[:, random.integers(640)] = 0.0
    weights = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float64)
    borders = (weights.cumsum(-1) / weights.sum(-1, keepdims=True))[np.arange(256), random.integers(0, 640, 256)]
    uniform = np.minimum(borders, 1 - 2.0**-24).astype(np.float32)
    uniform[:2] = 0, 1 - 2.0**-24
    tokens = np.asarray(_draw(logits, uniform))
    assert tokens.min() >= 0 and tokens.max() < 640
    assert (weights[np.arange(256), tokens] > 0).all()


def by_loop(row, top_k, top_p):
    order = sorted(range(len(row)), key=lambda i: -row[i])
    order = order[: top_k or len(row)]
    p = np.exp(row[order].astype(np.float64) - row.max())
    kept, mass = set(), 0.0
    for i, share in zip(order, p / p.sum(), strict=True):
        if mass >= top_p and top_p < 1:
            break
        kept.add(i)
        mass += share
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (999, 1.0), (0, 0.5), (0, 0.95), (0, 1e-6), (7, 0.8)]
)
def test_top_k_and_top_p_keep_the_right_set(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (6, 256)).astype(np.float32)
    logits[:, 200:] = LOWEST  # the spare vocabulary
    got = np.asarray(sampling.keep_likely(jnp.asarray(logits), top_k, top_p))
    kept = got > LOWEST
    for have, row in zip(kept, logits, strict=True):
        assert set(np.flatnonzero(have)) == by_loop(row[:200], top_k, top_p)
    np.testing.assert_array_equal(got[kept], logits[kept])  # what stays, stays as it was
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = torch.tensor(logits)
    if top_k:
        theirs = transformers.TopKLogitsWarper(min(top_k, 256))(None, theirs)
    if top_p < 1:
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
    np.testing.assert_array_equal(kept[:, :200], np.isfinite(theirs.numpy())[:, :200])


@pytest.mark.parametrize("top_p", [0.9999999, 1 - 1e-9])
@pytest.mark.parametrize("top_k", [0, 50])
def test_all_stay_where_rounding_keeps_the_sum_below_top_p(top_k, top_p):
    """The masses of a row, summed in float32, may never reach it; then nothing is cut, and no spare column is ever drawn."""
    rows, lowest = 512, np.finfo(np.float32).min
    logits = np.full((rows, 384), lowest, np.float32)
    logits[:, :300] = np.random.default_rng(0).normal(0, 3, (rows, 300))
    kept = sampling.keep_likely(jnp.asarray(logits), top_k, top_p)
    whole = sampling.keep_likely(jnp.asarray(logits), top_k, 1.0)
    assert np.asarray(kept > lowest).any(1).all()
    uniform = jax.random.uniform(jax.random.key(0), (rows,))
    np.testing.assert_array_equal(sampling.draw(kept, uniform), sampling.draw(whole, uniform))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (0, 0.9), (1, 1.0), (2, 1.0), (15, 1.0), (15, 0.7), (19, 1.0), (999, 0.9)]
)
def test_a_sample_is_of_what_top_k_and_top_p_keep(top_k, top_p):
    """20 blocks, of which top-k looks into some or all: each kept token has its share of an even grid of uniforms, and in the order of
    the vocabulary, as if all of it had been looked into."""
    logits = np.random.default_rng(3).normal(0, 2, 1280).astype(np.float32)
    kept = sorted(by_loop(logits, top_k, top_p))
    p = np.exp(logits[kept].astype(np.float64) - logits.max())
    n = 4000
    uniform = jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)
    sample = jax.jit(functools.partial(sampling.sample, top_k=top_k, top_p=top_p))
    tokens = np.asarray(sample(jnp.broadcast_to(jnp.asarray(logits), (n, 1280)), uniform))
    assert (np.diff(tokens) >= 0).all()
    counts = np.bincount(tokens, minlength=1280)
    assert counts[kept].sum() == n
    assert np.abs(counts[kept] - n * p / p.sum()).max() <= 2.5


@pytest.mark.parametrize("k", [1, 3, 10, 11, 200, 1280])
def test_kth_largest_and_likeliest_are_numpys(k):
    """Ten blocks of 128: the largest spread over all, all in one, and equal ones at the border."""
    random = np.random.default_rng(k)
    spread = random.normal(0, 1, (4, 1280))
    clustered = np.where(np.arange(1280) // 128 == 7, spread + 50, spread)
    tied = np.round(spread)
    for logits in (spread, clustered, tied, np.full((4, 1280), LOWEST)):
        logits = logits.astype(np.float32)
        found = sampling.kth_largest(jnp.asarray(logits), k)
        np.testing.assert_array_equal(found, -np.sort(-logits, axis=-1)[:, k - 1 : k])
        np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits)), logits.argmax(-1))


def test_top_k_and_temperature_reach_the_samples(params):
    """2,000 first tokens after one prompt: their shares are softmax(logits / T), or its best three, renormalised."""
    prompt = batching.prompts([PROMPTS[0]] * 2000, 5)
    logits = np.asarray(jax.jit(gpt2.GPT2(CONFIG).apply)({"params": params}, prompt.tokens[:1], prompt.mask[:1]))[
        0, -1
    ].astype(np.float64)
    for top_k in (0, 3):
        reply = sampler(max_new_tokens=1, temperature=2.5, top_k=top_k)(params, prompt, jax.random.key(3))
        p = np.exp((logits - logits.max()) / 2.5)
        p[np.argsort(-p)[top_k or 200 :]] = 0
        counts, expected = np.bincount(reply.tokens[:, 0], minlength=200), 2000 * p / p.sum()
        often = expected > 5
        observed, hoped = ([*x[often], x[~often].sum() + 1e-9] for x in (counts, expected))
        assert stats.chisquare(observed, np.asarray(hoped) * np.sum(observed) / np.sum(hoped)).pvalue > 1e-3


@pytest.mark.parametrize("times", [1, 4])
def test_remat_saves_memory_and_changes_no_gradient(times):
    """In training without a cache (one reply to a prompt) and with one (several)."""
    if jax.default_backend() != "cpu":
        pytest.skip("the bound is that of the CPU's compiler")
    deep = dataclasses.replace(CONFIG, n_embd=64, n_layer=8)
    params = gpt2.init(deep, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompt = batching.Prompt(rng.integers(0, 200, (4, 24)).astype(np.int32), np.ones((4, 24), bool))
    tokens, mask = rng.integers(0, 200, (4 * times, 32)).astype(np.int32), np.ones((4 * times, 32), bool)

    def compiled(remat):
        model = gpt2.GPT2(dataclasses.replace(deep, remat=remat))

        def loss(params):
            return jnp.square(sampling.reply_hidden(params, prompt, tokens, mask, model=model)).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    kept, anew = compiled(False), compiled(True)
    memory: Any = [program.memory_analysis() for program in (kept, anew)]
    assert memory[1].temp_size_in_bytes < 0.7 * memory[0].temp_size_in_bytes
    for a, b in zip(jax.tree.leaves(kept(params)), jax.tree.leaves(anew(params)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))  # sums in another order


def test_each_token_is_drawn_anew():
    """A model without any opinion: what is drawn next does not depend on what was drawn before."""
    model = gpt2.GPT2(gpt2.GPT2Config(vocab_size=8, n_positions=8, n_embd=2, n_layer=1, n_head=1, eos_token_id=9))
    flat = jax.tree.map(jnp.zeros_like, gpt2.init(model.config, jax.random.key(0)))
    generate = jax.jit(functools.partial(sampling.generate, model=model, cfg=SamplingConfig(max_new_tokens=3)))
    tokens = np.asarray(generate(flat, batching.prompts([[1]] * 4000, 1), jax.random.key(0)).tokens)
    for a, b in itertools.combinations(range(3), 2):
        table = np.histogram2d(tokens[:, a], tokens[:, b], bins=np.arange(9))[0]
        assert stats.chi2_contingency(table).pvalue > 1e-3  # fixed seed: passes always, or never
