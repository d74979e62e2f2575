"""Proximal policy optimisation for a language model, as pure functions.

    prompts --generate--> replies --reward terms--> scores --KL shaping--> advantages --epochs x minibatches--> policy

Policy loss (Schulman et al. 2017, eq. 7), over reply tokens, with ratio = exp(logprob - old_logprob):

    L = -mean min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)  +  c_v * value loss  -  c_e * entropy

Policy, reference and old policy are the same function with different parameters, always without dropout. Old log-probs are
recomputed by the function that the update uses, so that the ratio is 1 before the first step; how far the sampler's own
log-probs were off is logged.

An iteration is `rollout` and then `learn`. Where every reward is computed on the device, both are one compiled program,
`ppo_iteration`; a reward in plain Python stands between the two, and they are compiled apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from therapy_jax import gpt2, sft
from therapy_jax.advantages import gae, grpo, masked_mean, over_tokens, rloo, shape_rewards, whiten
from therapy_jax.batching import Prompt
from therapy_jax.config import ConfigError, PPOConfig, SamplingConfig
from therapy_jax.gpt2 import Array, Params
from therapy_jax.head import Spec, head_loss
from therapy_jax.rewards.batch import References, RewardBatch
from therapy_jax.rewards.combine import Raw, RunningStats
from therapy_jax.sampling import Reply, generate, reply_hidden, reply_logprobs

Metrics = dict[str, Array]
ScoreFn = Callable[
    [Params, Reply, References, Any], tuple[RewardBatch, Raw]
]  # the reference policy is the trunk that reads
CombineFn = Callable[[Raw, RunningStats], tuple[Array, RunningStats, Metrics]]

FINAL_RATE = 0.1  # of the peak, where the learning rate ends


class PPOState(NamedTuple):
    """All that an iteration changes, and the frozen policy that it stays near."""

    params: Params  # {"policy": GPT-2's, "value": {"head": the value head's, and if it is separate "trunk": a GPT-2's}}
    ref_params: Params  # the SFT policy; never written
    opt_state: Any
    kl_coef: Array  # f32[], beta
    reward_stats: RunningStats  # of each reward term
    step: Array  # i32[], iterations done
    bad_updates: (
        Array  # i32[2], minibatches skipped because loss or gradients were not finite: in a row until now, in all
    )


class Rollout(NamedTuple):
    """Replies and all that the update needs of them; f32[B,R] where nothing else is said, 0 outside the mask."""

    prompt: Prompt  # N of them; their B / N replies each stand side by side
    tokens: Array  # i32[B,R]
    mask: Array  # bool[B,R]
    old_logprobs: Array  # nats, of the policy before the update
    old_values: Array  # of the critic before the update
    advantages: Array  # whitened where cfg.whiten says so
    returns: Array  # what the critic learns


def optimizer(cfg: PPOConfig) -> optax.GradientTransformation:
    """One clip by global norm, then AdamW, with a learning rate of its own for the critic."""

    def adamw(peak: float, iterations: int) -> optax.GradientTransformation:
        steps = max(iterations, 1) * cfg.epochs * cfg.minibatches
        rate = sft.schedule(peak, cfg.warmup_steps, steps, final=FINAL_RATE)
        return optax.adamw(rate, weight_decay=cfg.weight_decay, mask=sft.decayed)

    critic = cfg.learning_rate if cfg.critic_learning_rate is None else cfg.critic_learning_rate  # 0 is a rate, too
    parts: dict[Any, Any] = {
        "policy": adamw(cfg.learning_rate, cfg.iterations - cfg.critic_warmup),  # counted from its own first step
        "value": adamw(critic, cfg.iterations),
    }
    by_part = optax.partition(parts, {"policy": "policy", "value": "value"})
    return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), by_part)


def init_state(
    policy: Params, config: gpt2.GPT2Config, tx: optax.GradientTransformation, cfg: PPOConfig, stats: RunningStats
) -> PPOState:
    """Policy, reference and a separate critic start equal, as copies: the step donates its state, and donated memory has
    one owner."""
    value = {"head": gpt2.ValueHead().init(jax.random.key(0), jnp.zeros(config.n_embd))["params"]}
    if cfg.value_head == "separate":
        value["trunk"] = jax.tree.map(jnp.copy, policy)
    params = {"policy": policy, "value": value}
    beta = jnp.float32(cfg.kl_coef)
    return PPOState(
        params, jax.tree.map(jnp.copy, policy), tx.init(params), beta, stats, jnp.int32(0), jnp.zeros(2, jnp.int32)
    )


def read(
    params: Params, prompt: Prompt, tokens: Array, mask: Array, *, model: gpt2.GPT2, cfg: PPOConfig
) -> tuple[Array, Array]:
    """-> (the policy's hidden states from which the reply tokens are predicted f32[B,R,D], values f32[B,R]).

    The value of a token is the critic's guess before it is written: it reads the hidden state that predicts the token, of
    the policy itself (`shared`; `detached`: no gradient goes back into it) or of a `separate` GPT-2. Without a critic
    (rloo, grpo) values are 0.
    """
    policy_BRD = reply_hidden(params["policy"], prompt, tokens, mask, model=model)
    if cfg.estimator != "gae":
        return policy_BRD, jnp.zeros(tokens.shape, jnp.float32)
    critic_BRD = policy_BRD
    if cfg.value_head == "separate":
        critic_BRD = reply_hidden(params["value"]["trunk"], prompt, tokens, mask, model=model)
    elif cfg.value_head == "detached":
        critic_BRD = jax.lax.stop_gradient(policy_BRD)
    values = jnp.asarray(gpt2.ValueHead().apply({"params": params["value"]["head"]}, critic_BRD))
    return policy_BRD, jnp.where(mask, values, 0.0)


def rollout(
    state: PPOState,
    prompt: Prompt,
    references: References,
    fixed: Any,
    key: Array,
    *,
    model: gpt2.GPT2,
    score_fn: ScoreFn,
    sampling: SamplingConfig,
    cfg: PPOConfig,
) -> tuple[Reply, RewardBatch, Raw]:
    """Each prompt answered cfg.replies_per_prompt times, in a row, and the terms of each reply: N prompts -> B replies.

    `fixed`: arrays that score_fn needs beside the trunk (they come in as arguments, not as constants of the program, so
    that one compiled program serves every run). The keys of iteration k derive from (key, k).
    """
    sample_key, _ = jax.random.split(jax.random.fold_in(key, state.step))
    times = cfg.replies_per_prompt
    reply = generate(state.params["policy"], prompt, sample_key, model=model, cfg=sampling, times=times)
    references = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), references)
    return reply, *score_fn(state.ref_params, reply, references, fixed)


def read_both(
    state: PPOState,
    prompt: Prompt,
    tokens: Array,
    mask: Array,
    *,
    model: gpt2.GPT2,
    cfg: PPOConfig,
    temperature: float,
) -> tuple[Array, Array, Array, Array]:
    """What policy, reference and critic say of each reply token -> (logprobs, entropy, ref_logprobs, values), f32[B,R] each,
    0 outside the mask."""
    hidden, values = read(state.params, prompt, tokens, mask, model=model, cfg=cfg)
    logprobs, entropy = reply_logprobs(
        state.params["policy"], hidden, tokens, mask, model=model, temperature=temperature
    )
    ref_hidden = reply_hidden(state.ref_params, prompt, tokens, mask, model=model)
    ref_logprobs, _ = reply_logprobs(state.ref_params, ref_hidden, tokens, mask, model=model, temperature=temperature)
    return logprobs, entropy, ref_logprobs, values


def judge(
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
    logprobs, entropy, ref_logprobs, values = read_both(
        state, prompt, reply.tokens, mask, model=model, cfg=cfg, temperature=temperature
    )
    kl = jnp.where(mask, logprobs - ref_logprobs, 0.0)
    rewards = shape_rewards(scores, kl, mask, kl_coef=state.kl_coef)
    metrics = {
        "score": scores.mean(),
        "score_sd": scores.std(),
        "shaped_reward": rewards.sum(1).mean(),
        "kl": kl.sum(1).mean(),
        "kl_k3": jnp.where(mask, jnp.expm1(-kl) + kl, 0.0).sum(1).mean(),
        "kl_coef": state.kl_coef,
        "entropy": masked_mean(entropy, mask),
        "reply_tokens": mask.sum(1).mean(),
        "stop_rate": ((reply.tokens == model.config.eos_token_id) & mask).any(1).mean(),
        "sampler_gap": masked_mean(jnp.abs(reply.logprobs - logprobs), mask),
    }
    if cfg.estimator == "gae":
        advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
        residual = masked_mean(jnp.square(returns - values), mask)
        spread = masked_mean(jnp.square(returns - masked_mean(returns, mask)), mask)
        metrics["explained_variance"] = 1.0 - residual / jnp.maximum(spread, 1e-8)
    else:
        compare = rloo if cfg.estimator == "rloo" else grpo
        advantages, returns = over_tokens(compare(rewards.sum(1), cfg.replies_per_prompt), mask), rewards
    advantages = whiten(advantages, mask) if cfg.whiten else advantages
    return Rollout(prompt, reply.tokens, mask, logprobs, values, advantages, returns), metrics


def policy_loss(logprobs: Array, old_logprobs: Array, advantages: Array, clip: float) -> Array:
    """-min(ratio * A, clip(ratio) * A) of each token: once a step has moved a token's probability by more than `clip` in the
    direction that its advantage asks for, nothing pulls it further."""
    ratio = jnp.exp(logprobs - old_logprobs)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def ppo_loss(
    params: Params, rollout: Rollout, *, model: gpt2.GPT2, cfg: PPOConfig, temperature: float
) -> tuple[Array, Metrics]:
    """-> (loss f32[], metrics) of a minibatch; means are over reply tokens."""
    mask, old, advantages = rollout.mask, rollout.old_logprobs, rollout.advantages
    hidden_BRD, values = read(params, rollout.prompt, rollout.tokens, mask, model=model, cfg=cfg)

    def token_loss(logprobs, entropy, old_logprobs, advantages):
        loss = policy_loss(logprobs, old_logprobs, advantages, cfg.clip)
        return loss if entropy is None else loss - cfg.entropy_coef * entropy

    spec = Spec(model.config, token_loss, temperature, with_entropy=bool(cfg.entropy_coef))
    wte = params["policy"]["wte"]
    total, logprobs, _ = head_loss(spec, wte, hidden_BRD, rollout.tokens, mask, (old, advantages))
    loss = total / jnp.maximum(mask.sum(), 1)
    log_ratio = jnp.where(mask, logprobs - old, 0.0)
    ratio = jnp.exp(log_ratio)
    metrics = {
        "policy_loss": masked_mean(policy_loss(logprobs, old, advantages, cfg.clip), mask),
        "clip_fraction": masked_mean((jnp.abs(ratio - 1) > cfg.clip).astype(jnp.float32), mask),
        "update_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "ratio_gap": jnp.abs(ratio - 1).max(),
    }
    if cfg.estimator == "gae":
        # The value may move by value_clip from where it was, else it pays the larger of both errors.
        near = rollout.old_values + jnp.clip(values - rollout.old_values, -cfg.value_clip, cfg.value_clip)
        errors = jnp.maximum(jnp.square(values - rollout.returns), jnp.square(near - rollout.returns))
        metrics["value_loss"] = 0.5 * masked_mean(errors, mask)
        loss += cfg.value_coef * metrics["value_loss"]
    return loss, {"loss": loss, **metrics}


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
    """cfg.epochs passes over the rollout in cfg.minibatches random parts: a scan within a scan. Prompts are dealt out to
    the parts, each with all its replies.

    Once the policy has moved by more than cfg.max_update_kl, the rest of the update leaves it as it is (no early exit: the
    program has one shape). In the first cfg.critic_warmup iterations neither policy nor its optimizer's state moves. Metrics are
    means over the steps that were taken; ratio_gap_start is the largest |ratio - 1| of the first one, before anything has
    moved; skipped counts the steps left out for the KL; those left out because loss or gradients were NaN or infinite are
    counted in state.bad_updates.
    """
    prompts = rollout.prompt.tokens.shape[0]
    value_and_grad = jax.value_and_grad(ppo_loss, has_aux=True)
    policy_learns = (state.step >= cfg.critic_warmup).astype(jnp.float32)

    def warm(tree):  # gradients, for their common norm; updates, for the weight decay
        return {**tree, "policy": jax.tree.map(lambda x: x * policy_learns, tree["policy"])}

    def hold(path, new, old):  # the policy's moments and step counts: bias correction and schedule begin when it does
        policys = any(getattr(part, "key", None) == "policy" for part in path)
        return jnp.where(policy_learns > 0, new, old) if policys else new

    def update(grads, opt_state, params):
        updates, new = tx.update(grads, opt_state, params)
        if not cfg.critic_warmup:
            return updates, new
        return warm(updates), jax.tree_util.tree_map_with_path(hold, new, opt_state)

    def take(x, indices):  # rows of these prompts, from [N, ...] or from [N * replies, ...]
        return x.reshape(prompts, -1, *x.shape[1:])[indices].reshape(-1, *x.shape[1:])

    def minibatch_step(carry, indices):
        params, opt_state, stopped, bad_updates = carry
        part = jax.tree.map(lambda x: take(x, indices), rollout)
        (loss, metrics), grads = value_and_grad(params, part, model=model, cfg=cfg, temperature=temperature)
        grads = warm(grads) if cfg.critic_warmup else grads
        metrics["grad_norm"] = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        metrics = jax.tree.map(lambda x: jnp.where(good, x, 0.0), metrics)
        if cfg.max_update_kl is not None:
            stopped = stopped | (metrics["update_kl"] > cfg.max_update_kl)
        params, opt_state = sft.update_if(good & ~stopped, update, grads, params, opt_state)
        metrics |= {"skipped": stopped.astype(jnp.float32), "taken": (good & ~stopped).astype(jnp.float32)}
        return (params, opt_state, stopped, sft.count_bad(bad_updates, good)), metrics

    def epoch(carry, epoch_key):
        order = jax.random.permutation(epoch_key, prompts).reshape(cfg.minibatches, -1)
        return jax.lax.scan(minibatch_step, carry, order)

    start = (state.params, state.opt_state, jnp.bool_(False), state.bad_updates)
    (params, opt_state, _, bad_updates), steps = jax.lax.scan(epoch, start, jax.random.split(key, cfg.epochs))
    taken, skipped, gap = steps.pop("taken"), steps.pop("skipped"), steps.pop("ratio_gap")
    metrics = {name: (x * taken).sum() / jnp.maximum(taken.sum(), 1.0) for name, x in steps.items()}
    metrics |= {"ratio_gap_start": gap[0, 0], "ratio_gap": gap.max(), "skipped": skipped.sum()}
    metrics |= {"bad_in_a_row": bad_updates[0], "bad_updates": bad_updates[1]}
    return state._replace(params=params, opt_state=opt_state, bad_updates=bad_updates), metrics


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


def learn(
    state: PPOState,
    prompt: Prompt,
    reply: Reply,
    raw: Raw,
    key: Array,
    *,
    model: gpt2.GPT2,
    tx: optax.GradientTransformation,
    combine_fn: CombineFn,
    temperature: float,
    cfg: PPOConfig,
) -> tuple[PPOState, Metrics]:
    """Replies and their raw reward terms -> the state after one iteration, and its metrics."""
    _, update_key = jax.random.split(jax.random.fold_in(key, state.step))
    scores, stats, terms = combine_fn(raw, state.reward_stats)
    batch, seen = judge(state, prompt, reply, scores, model=model, cfg=cfg, temperature=temperature)
    state, update = ppo_update(state, batch, update_key, model=model, tx=tx, cfg=cfg, temperature=temperature)
    kl_coef = adapt_kl_coef(state.kl_coef, seen["kl"], reply.tokens.shape[0], cfg=cfg)
    state = state._replace(kl_coef=kl_coef, reward_stats=stats, step=state.step + 1)
    return state, {**seen, **terms, **update}


def ppo_iteration(
    state: PPOState,
    prompt: Prompt,
    references: References,
    fixed: Any,
    key: Array,
    *,
    model: gpt2.GPT2,
    tx: optax.GradientTransformation,
    score_fn: ScoreFn,
    combine_fn: CombineFn,
    sampling: SamplingConfig,
    cfg: PPOConfig,
) -> tuple[PPOState, Metrics]:
    """Rollout, rewards, advantages and all updates: one compiled program, nothing leaves the device in between.

    score_fn(trunk, reply, references, fixed) -> (RewardBatch, {term: raw f32[B]}); combine_fn(raw, statistics) -> (scores f32[B],
    statistics, metrics). N prompts come in, N * cfg.replies_per_prompt replies are learnt from.
    """
    reply, _, raw = rollout(
        state, prompt, references, fixed, key, model=model, score_fn=score_fn, sampling=sampling, cfg=cfg
    )
    return learn(
        state, prompt, reply, raw, key, model=model, tx=tx, combine_fn=combine_fn, temperature=sampling.temperature, cfg=cfg
    )  # fmt: skip
