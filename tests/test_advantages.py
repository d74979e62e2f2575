"""Advantages and reward shaping against hand-worked tables, loops that anyone can check, and one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from therapy_jax.advantages import gae, grpo, masked_mean, over_tokens, rloo, shape_rewards, whiten


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


RETURNS = st.sampled_from([(3, 2), (2, 3), (3, 5)]).flatmap(  # prompts, and replies to each
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32, allow_subnormal=False))
)
ROUNDING = 1e-4  # of sums of five float32 numbers up to 100: 5 * 100 * 2^-24 * a few


def test_hand_worked_rloo():
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2; then 0 - (0+3)/2 twice and 3 - 0
    found = rloo(jnp.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    np.testing.assert_allclose(found, [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], rtol=1e-6)


def test_hand_worked_grpo():
    # mean 2, sd 1; then mean 2, sd sqrt((3*4 + 36)/4) = sqrt(12): -2/sqrt(12) = -1/sqrt(3), 6/sqrt(12) = sqrt(3)
    found = grpo(jnp.array([1.0, 1.0, 3.0, 3.0, 0.0, 0.0, 0.0, 8.0]), 4)
    third = 3**-0.5
    np.testing.assert_allclose(found, [-1, -1, 1, 1, -third, -third, -third, 3**0.5], rtol=1e-5)
    # Five times 1.3785217 have a float32 mean one rounding away: that must not become a difference of one sd.
    assert not grpo(jnp.full(5, 1.3785217), 5).any()
    assert not grpo(jnp.array([1.3785217, 1.3785218, 1.3785217]), 3).any()  # nor one rounding in a reward


@settings(deadline=None, max_examples=100)
@given(RETURNS)
def test_rloo_equals_brute_force(rows):
    group = rows.shape[1]
    expected = [
        r - np.mean([o for j, o in enumerate(row) if j != i]) for row in rows.astype(float) for i, r in enumerate(row)
    ]
    found = np.asarray(rloo(jnp.asarray(rows.ravel()), group))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    centred = rows - rows.mean(1, keepdims=True, dtype=float)
    np.testing.assert_allclose(found.reshape(rows.shape), group / (group - 1) * centred, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found.reshape(rows.shape).sum(1), 0, atol=10 * ROUNDING)


@settings(deadline=None, max_examples=100)
@given(RETURNS, st.floats(0.1, 10), st.floats(-10, 10))
def test_grpo_is_the_z_score_whatever_the_scale_of_the_rewards(rows, scale, shift):
    rows = np.where(rows.std(1, keepdims=True) < 0.5, rows[:, :1], rows)  # groups that differ, and groups that do not
    flat = np.ptp(rows, 1) == 0
    found = np.asarray(grpo(jnp.asarray(rows.ravel()), rows.shape[1])).reshape(rows.shape)
    # Rewards up to 100 round by 100 * 2^-24 * a few = 3e-5, against a standard deviation of at least 0.5.
    np.testing.assert_allclose(found[~flat], scipy.stats.zscore(rows[~flat].astype(float), axis=1), atol=1e-3)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-3)
    assert (found[flat] == 0).all()  # exactly: rounding is not a difference between replies
    other = np.asarray(grpo(jnp.asarray((scale * rows + shift).ravel()), rows.shape[1])).reshape(rows.shape)
    np.testing.assert_allclose(other[~flat], found[~flat], atol=1e-2)  # a shift of 10 against a sd of 0.05


def test_of_two_replies_rloo_is_the_difference_and_grpo_its_sign():
    returns = jnp.array([1.5, 4.0, -2.0, -7.0])
    np.testing.assert_allclose(rloo(returns, 2), [-2.5, 2.5, 5.0, -5.0], rtol=1e-6)
    np.testing.assert_allclose(grpo(returns, 2), [-1, 1, 1, -1], rtol=1e-5)


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("group", [2, 4, 8])
def test_rloo_is_gae_with_a_critic_that_says_the_leave_one_out_mean(pattern, group, rng):
    """With gamma = lambda = 1 and the reward at the end, every token's advantage is the return less the critic's guess."""
    mask = MASKS[pattern](rng)
    mask[:, 4] = True  # no empty reply: it has no token for its reward to land on
    returns = rng.normal(size=16).astype(np.float32)
    others = [np.mean(np.delete(row, i)) for row in returns.reshape(-1, group) for i in range(group)]
    values = np.where(mask, np.asarray(others, np.float32)[:, None], -1e6)
    rewards = shape_rewards(jnp.asarray(returns), jnp.zeros((16, 9)), jnp.asarray(mask), kl_coef=0.0)
    expected, _ = gae(rewards, jnp.asarray(values), jnp.asarray(mask), gamma=1.0, lam=1.0)
    found = over_tokens(rloo(rewards.sum(1), group), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(found)[~mask] == 0).all() and np.abs(found).max() > 0.5
