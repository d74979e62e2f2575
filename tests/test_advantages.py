"""GAE and reward shaping against hand-worked tables and a loop that anyone can check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from therapy_jax.advantages import gae, masked_mean, shape_rewards, whiten


def brute_force(rewards, values, mask, gamma, lam):
    """Schulman et al. 2016, eq. 16, as a double sum over the tokens that count."""
    advantages = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        places = np.flatnonzero(mask[b])
        for i, t in enumerate(places):
            for k, s in enumerate(places[i:]):
                after = places[i + k + 1] if i + k + 1 < len(places) else None
                delta = rewards[b, s] + (gamma * values[b, after] if after is not None else 0.0) - values[b, s]
                advantages[b, t] += (gamma * lam) ** k * delta
    return advantages


MASKS = {
    "right": lambda rng: np.arange(9) < rng.integers(0, 10, (16, 1)),
    "left": lambda rng: np.arange(9) >= rng.integers(0, 10, (16, 1)),
    "holes": lambda rng: rng.random((16, 9)) < 0.6,
}


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_brute_force(pattern, gamma, lam, rng):
    mask = MASKS[pattern](rng)
    rewards, values = rng.normal(size=(2, 16, 9)).astype(np.float32)
    rewards, values = np.where(mask, rewards, 1e6), np.where(mask, values, -1e6)  # garbage must not count
    advantages, returns = jax.jit(lambda *a: gae(*a, gamma=gamma, lam=lam))(rewards, values, mask)
    expected = brute_force(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)  # sums of nine float32 terms
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0.0), rtol=1e-4, atol=1e-5)
    assert (np.asarray(advantages)[~mask] == 0).all() and (np.asarray(returns)[~mask] == 0).all()


def test_hand_worked_gae():
    # gamma 0.5, lambda 0.5; delta_3 = 4 - 2 = 2, delta_2 = 1 + 0.5*2 - 1 = 1, delta_1 = 0 + 0.5*1 - 1 = -0.5
    # A_3 = 2, A_2 = 1 + 0.25*2 = 1.5, A_1 = -0.5 + 0.25*1.5 = -0.125
    advantages, returns = gae(
        jnp.array([[0.0, 1.0, 4.0, 7.0]]),
        jnp.array([[1.0, 1.0, 2.0, 7.0]]),
        jnp.array([[True, True, True, False]]),
        gamma=0.5,
        lam=0.5,
    )
    np.testing.assert_allclose(advantages, [[-0.125, 1.5, 2.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.875, 2.5, 4.0, 0.0]], rtol=1e-6)


def test_lambda_one_is_reward_to_go_minus_value(rng):
    rewards, values = rng.normal(size=(2, 3, 6)).astype(np.float32)
    mask = np.ones((3, 6), bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = np.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    np.testing.assert_allclose(returns, to_go, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(advantages, to_go - values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.05, 1.7])
def test_shaped_rewards_sum_to_score_minus_beta_kl(beta, rng):
    """With fractional scores, with and without room behind the reply, and with ids around that must not lend their dtype."""
    mask = np.arange(7) < rng.integers(1, 8, (32, 1))
    scores = rng.uniform(-2, 2, 32).astype(np.float32)
    kl = rng.normal(size=(32, 7)).astype(np.float32)
    rewards = shape_rewards(jnp.asarray(scores), jnp.asarray(kl), jnp.asarray(mask), kl_coef=beta)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards.sum(1), scores - beta * np.where(mask, kl, 0).sum(1), rtol=1e-5, atol=1e-6)
    last = mask.sum(1) - 1
    without = np.where(mask, -beta * kl, 0.0)
    landed = np.asarray(rewards) - without
    np.testing.assert_allclose(landed[np.arange(32), last], scores, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(np.abs(landed) > 1e-6) == 32  # the score lands once, on the last token
    assert (np.asarray(rewards)[~mask] == 0).all()


def test_whiten_is_masked(rng):
    x = rng.normal(3, 5, (8, 10)).astype(np.float32)
    mask = rng.random((8, 10)) < 0.5
    white = np.asarray(whiten(jnp.where(mask, x, 1e6), jnp.asarray(mask)))
    np.testing.assert_allclose([white[mask].mean(), white[mask].std()], [0, 1], atol=1e-5)
    assert (white[~mask] == 0).all()
    assert float(masked_mean(jnp.asarray(x), jnp.zeros((8, 10), bool))) == 0.0
