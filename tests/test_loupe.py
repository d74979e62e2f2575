"""The loupe against plain numpy: everything recomputed from the models' logits, token by token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from therapy_jax import gpt2, loupe, ppo
from therapy_jax.batching import Prompt
from therapy_jax.config import PPOConfig, SamplingConfig
from therapy_jax.rewards.combine import init_stats
from therapy_jax.sampling import generate

B, P, R, TEMPERATURE = 6, 5, 7, 0.8
CONFIG = gpt2.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
MODEL = gpt2.GPT2(CONFIG)
CFG = PPOConfig(batch_size=B, replies_per_prompt=2, minibatches=1, kl_coef=0.3, gamma=0.9, lam=0.7)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def read(params: Any, head: Any, prompt: np.ndarray, reply: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One prompt and reply without any padding -> (log-probs of the reply's tokens, values)."""
    tokens = np.concatenate([prompt, reply])[None]
    hidden = np.asarray(gpt2.hidden(params, jnp.asarray(tokens), jnp.ones(tokens.shape, bool), model=MODEL)[0])[0]
    states = hidden[len(prompt) - 1 : -1].astype(np.float64)
    logits = states @ np.asarray(params["wte"], np.float64)[: CONFIG.vocab_size].T / TEMPERATURE
    values = states @ np.asarray(head["kernel"], np.float64)[:, 0] + float(head["bias"][0])
    return log_softmax(logits)[np.arange(len(reply)), reply], values


def shaken(params: Any, seed: int, size: float) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def seen():
    """A policy that has left its reference, a critic with an opinion, and both after some update."""
    policy = jax.tree.map(lambda x: 4 * x, gpt2.init(CONFIG, jax.random.key(0)))
    tx = ppo.optimizer(CFG)
    before = ppo.init_state(policy, CONFIG, tx, CFG, init_stats(["term"]))
    before = before._replace(params=shaken(before.params, 1, 0.1), kl_coef=jnp.float32(0.25))
    after = before._replace(params=shaken(before.params, 2, 0.02))
    lengths = np.asarray([[5], [3], [4]])
    mask = np.arange(P) >= P - lengths
    tokens = np.where(mask, np.random.default_rng(0).integers(1, 30, (3, P)), 0).astype(np.int32)
    prompt = Prompt(jnp.asarray(tokens), jnp.asarray(mask))  # type: ignore[arg-type]
    sampling = SamplingConfig(max_new_tokens=R, temperature=TEMPERATURE)
    reply = generate(before.params["policy"], prompt, jax.random.key(3), model=MODEL, cfg=sampling, times=2)
    cut = np.asarray(reply.mask) & (np.arange(R) < np.asarray([[7], [2], [5], [7], [1], [6]]))  # of several lengths
    reply = reply._replace(mask=jnp.asarray(cut), tokens=jnp.where(cut, reply.tokens, 0))
    scores = jnp.asarray([0.5, -1.0, 2.0, 0.0, 1.5, -0.3], jnp.float32)
    found = loupe.look(before, after, prompt, reply, scores, model=MODEL, cfg=CFG, temperature=TEMPERATURE)
    return before, after, prompt, reply, np.asarray(scores), found


def test_every_column_is_what_numpy_makes_of_the_logits(seen):
    before, after, prompt, reply, scores, found = seen
    rows, flat = [], []
    for row in range(B):
        counts = np.asarray(prompt.mask[row // 2])
        asked = np.asarray(prompt.tokens[row // 2])[counts]
        said = np.asarray(reply.tokens[row])[np.asarray(reply.mask[row])]
        head = before.params["value"]["head"]["value"]
        logprobs, values = read(before.params["policy"], head, asked, said)
        ref_logprobs, _ = read(before.ref_params, head, asked, said)
        new_logprobs, _ = read(after.params["policy"], head, asked, said)
        rewards = [-0.25 * (a - b) for a, b in zip(logprobs, ref_logprobs, strict=True)]
        rewards[-1] += scores[row]
        advantages = [0.0] * len(said)
        for t in range(len(said)):  # the definition: a discounted sum of what is to come
            for k in range(t, len(said)):
                following = values[k + 1] if k + 1 < len(said) else 0.0
                advantages[t] += (0.9 * 0.7) ** (k - t) * (rewards[k] + 0.9 * following - values[k])
        flat += advantages
        ratio = np.exp(new_logprobs - logprobs)
        rows.append([logprobs, ref_logprobs, logprobs - ref_logprobs, rewards, values, advantages, ratio])
    mean, sd = np.mean(flat), np.std(flat)
    for row, columns in enumerate(rows):
        columns[5] = (np.asarray(columns[5]) - mean) / sd
        one = loupe.of_reply(found, reply.mask, row)
        for name, got, wanted in zip(one._fields, one, columns, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5, err_msg=f"{name} of reply {row}")
    assert max(abs(x) for columns in rows for x in columns[2]) > 0.05, "the policy has left its reference"
    assert max(abs(x - 1) for columns in rows for x in columns[6]) > 0.01, "the update has moved something"


def test_rewards_sum_to_the_score_less_beta_times_kl(seen):
    before, _, _, reply, scores, found = seen
    for row in range(B):
        one = loupe.of_reply(found, reply.mask, row)
        wanted = scores[row] - float(before.kl_coef) * one.kl.sum()
        np.testing.assert_allclose(one.rewards.sum(), wanted, rtol=1e-5, atol=1e-6)


def test_it_shows_what_the_update_takes(seen):
    """Bit for bit the arrays of ppo.judge; with no update at all every ratio is 1."""
    before, _, prompt, reply, scores, found = seen
    how: dict[str, Any] = {"model": MODEL, "cfg": CFG, "temperature": TEMPERATURE}
    rollout, _ = ppo.judge(before, prompt, reply, jnp.asarray(scores), **how)
    for got, wanted in (
        (found.logprobs, rollout.old_logprobs),
        (found.values, rollout.old_values),
        (found.advantages, rollout.advantages),
    ):
        np.testing.assert_array_equal(got, wanted)
    same = loupe.look(before, before, prompt, reply, jnp.asarray(scores), **how)
    np.testing.assert_array_equal(same.ratio, np.ones((B, R)))
    assert all((np.asarray(x)[~np.asarray(reply.mask)] == 0).all() for x in found[:-1])


@pytest.mark.parametrize(("estimator", "of_two"), [("rloo", lambda gap: gap), ("grpo", np.sign)])
def test_without_a_critic_values_are_0_and_a_reply_has_one_advantage(seen, estimator, of_two):
    before, after, prompt, reply, scores, _ = seen
    cfg = dataclasses.replace(CFG, estimator=estimator, whiten=False)
    found = loupe.look(before, after, prompt, reply, jnp.asarray(scores), model=MODEL, cfg=cfg, temperature=TEMPERATURE)
    sums = np.asarray(found.rewards).sum(1)
    for row in range(B):
        one = loupe.of_reply(found, reply.mask, row)
        np.testing.assert_array_equal(one.values, 0 * one.values)
        np.testing.assert_allclose(one.advantages, of_two(sums[row] - sums[row ^ 1]), rtol=1e-4, atol=1e-5)
