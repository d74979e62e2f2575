"""Proximal policy optimisation for a language model, as pure functions.

    prompts --generate--> replies --reward terms--> scores --KL shaping, GAE--> advantages --epochs x minibatches--> policy

Policy loss (Schulman et al. 2017, eq. 7), over reply tokens, with ratio = exp(logprob - old_logprob):

    L = -mean min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)  +  c_v * value loss  -  c_e * entropy

Policy, reference and old policy are the same function with different parameters, always without dropout. Old log-probs are
recomputed by the function that the update uses, so that the ratio is 1 before the first step; how far the sampler's own
log-probs were off is logged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from therapy_jax import gpt2, sft
from therapy_jax.advantages import gae, masked_mean, shape_rewards, whiten
from therapy_jax.batching import Prompt
from therapy_jax.config import ConfigError, PPOConfig, SamplingConfig
from therapy_jax.gpt2 import Array, Params
from therapy_jax.rewards.batch import References
from therapy_jax.sampling import Reply, generate, reply_hidden, reply_logprobs

Metrics = dict[str, Array]
ScoreFn = Callable[[Reply, References], tuple[Array, dict[str, Array]]]


class PPOState(NamedTuple):
    """All that an iteration changes, and the frozen policy that it stays near."""

    params: Params  # {"policy": GPT-2's, "value": the value head's}
    ref_params: Params  # the SFT policy; never written
    opt_state: Any
    kl_coef: Array  # f32[], beta
    step: Array  # i32[], iterations done


class Rollout(NamedTuple):
    """Replies and all that the update needs of them; f32[B,R] where nothing else is said, 0 outside the mask."""

    prompt: Prompt
    tokens: Array  # i32[B,R]
    mask: Array  # bool[B,R]
    old_logprobs: Array
    old_values: Array
    advantages: Array
    returns: Array


def optimizer(cfg: PPOConfig) -> optax.GradientTransformation:
    steps = cfg.iterations * cfg.epochs * cfg.minibatches
    rate = sft.schedule(cfg.learning_rate, cfg.warmup_steps, steps, final=0.1)
    adamw = optax.adamw(rate, weight_decay=cfg.weight_decay, mask=sft.decayed)
    return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), adamw)


def init_state(policy: Params, config: gpt2.GPT2Config, tx: optax.GradientTransformation, cfg: PPOConfig) -> PPOState:
    """Policy and reference start equal, as two copies: the step donates its state, and donated memory has one owner."""
    value = gpt2.ValueHead().init(jax.random.key(0), jnp.zeros(config.n_embd))["params"]
    params = {"policy": policy, "value": value}
    return PPOState(params, jax.tree.map(jnp.copy, policy), tx.init(params), jnp.float32(cfg.kl_coef), jnp.int32(0))


def read(
    params: Params, prompt: Prompt, tokens: Array, mask: Array, *, model: gpt2.GPT2, temperature: float
) -> tuple[Array, Array, Array]:
    """One forward -> (logprobs, entropy, values) of the reply tokens, f32[B,R] each. The value of a token is the critic's
    guess before it is written: it reads the same hidden state that predicts the token."""
    hidden_BRD = reply_hidden(params["policy"], prompt, tokens, mask, model=model)
    logprobs, entropy = reply_logprobs(params["policy"], hidden_BRD, tokens, mask, model=model, temperature=temperature)
    values = jnp.asarray(gpt2.ValueHead().apply({"params": params["value"]}, hidden_BRD))
    return logprobs, entropy, jnp.where(mask, values, 0.0)


def make_rollout(
    state: PPOState,
    prompt: Prompt,
    reply: Reply,
    scores: Array,
    *,
    model: gpt2.GPT2,
    cfg: PPOConfig,
    temperature: float,
) -> tuple[Rollout, Metrics]:
    """Replies and their scores f32[B] -> Rollout, and what it says about the policy so far.

    KL to the reference, per token: k1 = logprob - ref_logprob shapes the rewards (its sum over a reply is an unbiased
    estimate of the KL of whole replies); k3 = exp(-k1) - 1 + k1 (never negative; Schulman 2020, "Approximating KL
    Divergence") is logged beside it. Equal weights give exactly 0 in both.
    """
    mask = reply.mask
    logprobs, entropy, values = read(state.params, prompt, reply.tokens, mask, model=model, temperature=temperature)
    ref_hidden = reply_hidden(state.ref_params, prompt, reply.tokens, mask, model=model)
    ref_logprobs, _ = reply_logprobs(
        state.ref_params, ref_hidden, reply.tokens, mask, model=model, temperature=temperature
    )

    kl = jnp.where(mask, logprobs - ref_logprobs, 0.0)
    rewards = shape_rewards(scores, kl, mask, kl_coef=state.kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
    residual = masked_mean(jnp.square(returns - values), mask)
    spread = masked_mean(jnp.square(returns - masked_mean(returns, mask)), mask)
    metrics = {
        "score": scores.mean(),
        "shaped_reward": rewards.sum(1).mean(),
        "kl": kl.sum(1).mean(),
        "kl_k3": jnp.where(mask, jnp.exp(-kl) - 1 + kl, 0.0).sum(1).mean(),
        "kl_coef": state.kl_coef,
        "entropy": masked_mean(entropy, mask),
        "reply_tokens": mask.sum(1).mean(),
        "stop_rate": ((reply.tokens == model.config.eos_token_id) & mask).any(1).mean(),
        "explained_variance": 1.0 - residual / jnp.maximum(spread, 1e-8),
        "sampler_gap": masked_mean(jnp.abs(reply.logprobs - logprobs), mask),
    }
    advantages = whiten(advantages, mask) if cfg.whiten else advantages
    return Rollout(prompt, reply.tokens, mask, logprobs, values, advantages, returns), metrics


def ppo_loss(
    params: Params, rollout: Rollout, *, model: gpt2.GPT2, cfg: PPOConfig, temperature: float
) -> tuple[Array, Metrics]:
    """-> (loss f32[], metrics) of a minibatch; means are over reply tokens."""
    mask = rollout.mask
    logprobs, entropy, values = read(params, rollout.prompt, rollout.tokens, mask, model=model, temperature=temperature)
    log_ratio = jnp.where(mask, logprobs - rollout.old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - cfg.clip, 1 + cfg.clip)
    policy_loss = -masked_mean(jnp.minimum(ratio * rollout.advantages, clipped * rollout.advantages), mask)

    # The value may move by value_clip from where it was, else it pays the larger of both errors.
    near = rollout.old_values + jnp.clip(values - rollout.old_values, -cfg.value_clip, cfg.value_clip)
    errors = jnp.maximum(jnp.square(values - rollout.returns), jnp.square(near - rollout.returns))
    value_loss = 0.5 * masked_mean(errors, mask)

    mean_entropy = masked_mean(entropy, mask)
    loss = policy_loss + cfg.value_coef * value_loss - cfg.entropy_coef * mean_entropy
    metrics = {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clip_fraction": masked_mean((jnp.abs(ratio - 1) > cfg.clip).astype(jnp.float32), mask),
        "update_kl": masked_mean(ratio - 1 - log_ratio, mask),
        "ratio_gap": jnp.abs(ratio - 1).max(),
    }
    return loss, metrics


def ppo_update(
    state: PPOState,
    rollout: Rollout,
    key: Array,
    *,
    model: gpt2.GPT2,
    tx: optax.GradientTransformation,
    cfg: PPOConfig,
    temperature: float = 1.0,
) -> tuple[PPOState, Metrics]:
    """cfg.epochs passes over the rollout in cfg.minibatches random parts: a scan within a scan.

    Once the policy has moved by more than cfg.max_update_kl, the rest of the update leaves it as it is (no early exit: the
    program has one shape). Metrics are means over the steps that were taken; ratio_gap_start is the largest |ratio - 1| of
    the first one, before anything has moved; skipped counts the steps left out.
    """
    size = rollout.tokens.shape[0]
    value_and_grad = jax.value_and_grad(ppo_loss, has_aux=True)

    def minibatch_step(carry, indices):
        params, opt_state, stopped = carry
        part = jax.tree.map(lambda x: x[indices], rollout)
        (_, metrics), grads = value_and_grad(params, part, model=model, cfg=cfg, temperature=temperature)
        if cfg.max_update_kl is not None:
            stopped = stopped | (metrics["update_kl"] > cfg.max_update_kl)
        updates, new_opt_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), (params, opt_state), new)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "skipped": stopped.astype(jnp.float32)}
        return (params, opt_state, stopped), metrics

    def epoch(carry, epoch_key):
        order = jax.random.permutation(epoch_key, size).reshape(cfg.minibatches, -1)
        return jax.lax.scan(minibatch_step, carry, order)

    start = (state.params, state.opt_state, jnp.bool_(False))
    (params, opt_state, _), steps = jax.lax.scan(epoch, start, jax.random.split(key, cfg.epochs))
    taken = 1.0 - steps.pop("skipped")
    gap = steps.pop("ratio_gap")
    metrics = {name: (x * taken).sum() / jnp.maximum(taken.sum(), 1.0) for name, x in steps.items()}
    metrics |= {"ratio_gap_start": gap[0, 0], "ratio_gap": gap.max(), "skipped": (1.0 - taken).sum()}
    return state._replace(params=params, opt_state=opt_state), metrics


def adapt_kl_coef(kl_coef: Array, kl: Array, replies: int, *, cfg: PPOConfig) -> Array:
    """Ziegler et al. 2019, section 2.2: beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * replies / horizon), with the
    KL per reply, summed over its tokens. Fixed where cfg.kl_target is None."""
    if cfg.kl_target is None:
        return kl_coef
    error = jnp.clip(kl / cfg.kl_target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * replies / cfg.kl_horizon)


def check(sampling: SamplingConfig) -> None:
    """Raises ConfigError for a rollout whose log-probs could not be those of the policy that is trained."""
    if sampling.top_k or sampling.top_p < 1.0:
        raise ConfigError(
            "sampling.top_k and top_p cannot be used in PPO rollouts: the ratio compares log-probs of the whole "
            "distribution, not of the part that was kept; use sampling.temperature, or set them under evaluate"
        )
    if sampling.temperature == 0.0:
        raise ConfigError("sampling.temperature 0 (greedy) cannot be used in PPO rollouts: there is nothing to explore")


def ppo_iteration(
    state: PPOState,
    prompt: Prompt,
    references: References,
    key: Array,
    *,
    model: gpt2.GPT2,
    tx: optax.GradientTransformation,
    score_fn: ScoreFn,
    sampling: SamplingConfig,
    cfg: PPOConfig,
) -> tuple[PPOState, Metrics]:
    """Rollout, rewards, advantages and all updates: one compiled program, nothing leaves the device in between.

    score_fn(reply, references) -> (scores f32[B], {term: raw f32[B]}). The keys of iteration k derive from (key, k).
    """
    sample_key, update_key = jax.random.split(jax.random.fold_in(key, state.step))
    reply = generate(state.params["policy"], prompt, sample_key, model=model, cfg=sampling)
    scores, raw = score_fn(reply, references)
    rollout, seen = make_rollout(state, prompt, reply, scores, model=model, cfg=cfg, temperature=sampling.temperature)
    state, update = ppo_update(
        state, rollout, update_key, model=model, tx=tx, cfg=cfg, temperature=sampling.temperature
    )
    kl_coef = adapt_kl_coef(state.kl_coef, seen["kl"], reply.tokens.shape[0], cfg=cfg)
    terms = {f"reward/{name}": values.mean() for name, values in raw.items()}
    return state._replace(kl_coef=kl_coef, step=state.step + 1), {**seen, **terms, **update}
