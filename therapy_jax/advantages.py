"""From one score per reply to one advantage per token.

rewards_t = -beta * kl_t on every reply token, + score on the last one (Ziegler et al. 2019, eq. 2), so that a reply's
rewards sum to score - beta * KL. Then one of three baselines: a critic (generalised advantage estimation), or the other
replies to the same prompt (RLOO, GRPO), whose advantage is the same on every token of a reply.
All arrays are f32[B, R]; mask bool[B, R] is True on reply tokens. Nothing under a False mask ever counts.

>>> gae(jnp.array([[0.0, 0.0, 1.0]]), jnp.zeros((1, 3)), jnp.ones((1, 3), bool), gamma=1.0, lam=0.5)[0].tolist()
[[0.25, 0.5, 1.0]]
>>> rloo(jnp.array([1.0, 0.0, 0.5]), group=3).tolist()
[0.75, -0.75, 0.0]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from therapy_jax.gpt2 import Array


def shape_rewards(scores: Array, kl: Array, mask: Array, *, kl_coef: Array | float) -> Array:
    """scores f32[B], kl f32[B,R] per token (nats) -> rewards f32[B,R]. The score lands on the last token of the reply: EOS
    where it has one, else the last token that the length limit allowed."""
    scores = scores.astype(jnp.float32)  # a score keeps its fraction whatever it is added to
    columns = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, columns, -1), axis=1, keepdims=True)
    return jnp.where(mask, -kl_coef * kl, 0.0) + jnp.where(columns == last, scores[:, None], 0.0)


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float) -> tuple[Array, Array]:
    """Generalised advantage estimation -> (advantages, returns), f32[B,R] each, 0 where mask is False.

        delta_t = r_t + gamma * V_{t+1} - V_t          (V = 0 after the last reply token)
        A_t = delta_t + gamma * lam * A_{t+1},          returns_t = A_t + V_t

    (Schulman et al. 2016, eq. 11, 12, 16.) t+1 is the next token that counts: one under a False mask is stepped over.
    """

    def step(carry, column):
        next_value, next_advantage = carry
        reward, value, counts = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage)
        return carry, jnp.where(counts, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    columns = (rewards.astype(jnp.float32).T, values.astype(jnp.float32).T, mask.T)
    _, advantages = jax.lax.scan(step, (zeros, zeros), columns, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0.0)


def rloo(returns: Array, group: int) -> Array:
    """REINFORCE leave-one-out: returns f32[B] of whole replies, `group` to a prompt, in a row -> advantages f32[B].

        A_i = R_i - mean over the other replies j to the same prompt of R_j

    (Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics", eq. 8.) The baseline never looks at the reply it is for, so
    the gradient stays unbiased.
    """
    rows = returns.astype(jnp.float32).reshape(-1, group)
    others = (rows.sum(1, keepdims=True) - rows) / (group - 1)
    return (rows - others).reshape(-1)


def grpo(returns: Array, group: int) -> Array:
    """Group-relative: returns f32[B], `group` to a prompt, in a row -> advantages f32[B].

        A_i = (R_i - mean R) / sd R        over the replies to the same prompt

    (Shao et al. 2024, "DeepSeekMath", section 4.1.2.) Prompts on which replies differ little count as much as others. A
    group whose replies all earn the same has nothing to teach: 0.
    """
    rows = returns.astype(jnp.float32).reshape(-1, group)
    mean, sd = rows.mean(1, keepdims=True), rows.std(1, keepdims=True)
    flat = sd <= 1e-5 * (1.0 + jnp.abs(mean))  # rounding is not a difference
    return jnp.where(flat, 0.0, (rows - mean) / jnp.where(flat, 1.0, sd)).reshape(-1)


def over_tokens(advantages: Array, mask: Array) -> Array:
    """One advantage per reply, f32[B] -> the same on each of its tokens, f32[B,R]; 0 where mask is False."""
    return jnp.where(mask, advantages[:, None], 0.0)


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean of x over True places of the mask, f32[]."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def whiten(x: Array, mask: Array) -> Array:
    """(x - mean) / sd over True places of the mask; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean(jnp.square(x - mean), mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)
