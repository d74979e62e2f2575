"""Supervised fine-tuning, by hand: a loss, its gradient, AdamW.

    loss = - sum over supervised tokens of log p(token | tokens before it) / number of supervised tokens

Pre-training on plain dialogue is the same step; only the batch says which tokens are targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from therapy_jax import gpt2
from therapy_jax.batching import Batch
from therapy_jax.config import TrainingConfig
from therapy_jax.gpt2 import Array, Params, hidden
from therapy_jax.head import Spec, head_loss

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Params
    opt_state: Any
    step: Array  # i32[], optimizer steps done
    bad_updates: Array  # i32[2], skipped because loss or gradients were not finite: in a row until now, in all


def decayed(params: Params) -> Params:
    """True where weight decay applies: matrices and embeddings, not biases and layer-norm scales (which, stacked over
    layers, cannot be told by their rank)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "wte", "wpe"), params)


def schedule(peak: float, warmup_steps: int, steps: int, final: float) -> optax.Schedule:
    """Linear from 0 to `peak`, then linear to `final` * peak, where a step after the last would be; of a single
    step, the peak."""
    warmup = min(warmup_steps, steps // 2)
    up = optax.linear_schedule(0.0, peak, warmup)
    down = optax.linear_schedule(peak, peak * final, max(steps - warmup, 1))
    return optax.join_schedules([up, down], [warmup])


def optimizer(config: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with the schedule above."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule(config.learning_rate, config.warmup_steps, steps, config.final_learning_rate),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(params, tx.init(params), jnp.int32(0), jnp.zeros(2, jnp.int32))


def update_if(
    good: Array, update: Callable[..., tuple[Any, Any]], grads: Params, params: Params, opt_state: Any
) -> tuple[Params, Any]:
    """-> (params, opt_state) after an optimizer step, or as they were where `good` (bool[]) is False. A branch and not a
    choice between two results: that would write every parameter twice."""

    def step():
        updates, new_opt_state = update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_opt_state

    return jax.lax.cond(good, step, lambda: (params, opt_state))


def count_bad(bad_updates: Array, good: Array) -> Array:
    """i32[2] (in a row, in all) after one more update."""
    return jnp.where(good, bad_updates * jnp.array([0, 1]), bad_updates + 1)


def negative(logprobs: Array, entropy: None) -> Array:
    """The loss of a token."""
    return -logprobs


def sft_logprobs(params: Params, batch: Batch, key: Array | None, *, model: gpt2.GPT2) -> tuple[Array, Array, Array]:
    """-> (loss, as sft_loss gives it; log-probs of the supervised tokens f32[B,T], each where its token is predicted, and
    which those are, bool[B,T]). Without a key there is no dropout."""
    hidden_BTD, _ = hidden(params, batch.tokens, batch.attention_mask, layout=batch.layout, key=key, model=model)
    targets, counted = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.tokens, batch.loss_mask))
    spec = Spec(model.config, negative, with_entropy=False)
    loss, logprobs, _ = head_loss(spec, params["wte"], hidden_BTD, targets, counted)
    return loss, logprobs, counted


def sft_loss(params: Params, batch: Batch, key: Array | None, *, model: gpt2.GPT2) -> tuple[Array, Array]:
    """-> (summed negative log-likelihood f32[] in nats, number of supervised tokens f32[]). A sum, not a mean: parts of a
    batch then add up to the whole, whatever share of the tokens each holds."""
    loss, _, counted = sft_logprobs(params, batch, key, model=model)
    return loss, counted.sum().astype(jnp.float32)


def sft_step(
    state: TrainState,
    batch: Batch,
    key: Array,
    *,
    model: gpt2.GPT2,
    tx: optax.GradientTransformation,
    cfg: TrainingConfig,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one batch (arrays of [B, T]; B a multiple of cfg.accumulate).

    With accumulate > 1 the batch is walked in equal parts, one after the other: each part's loss is divided by the tokens of the
    whole batch, and losses and gradients are summed, so that the step equals that of the undivided batch (without dropout,
    exactly but for rounding). Where the loss or a gradient is NaN or infinite, parameters and moments stay as they
    are, and the step is counted. Metrics: loss (nats per supervised token), tokens, grad_norm (before clipping), bad_updates
    (in all), bad_in_a_row.
    """
    key = jax.random.fold_in(key, state.step)
    tokens = jnp.maximum(batch.loss_mask[:, 1:].sum().astype(jnp.float32), 1.0)  # of the whole batch

    @jax.value_and_grad
    def value_and_grad(params, part, part_key):
        return sft_loss(params, part, part_key, model=model)[0] / tokens

    def add_part(carry, part):
        i, batch_part = part
        more: Any = value_and_grad(state.params, batch_part, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, more), None

    if cfg.accumulate == 1:
        loss, grads = value_and_grad(state.params, batch, jax.random.fold_in(key, 0))
    else:
        # Part i is every accumulate-th row from i on: so each device has its share of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, cfg.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), _ = jax.lax.scan(add_part, zeros, (jnp.arange(cfg.accumulate), parts))

    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = update_if(good, tx.update, grads, state.params, state.opt_state)
    bad_updates = count_bad(state.bad_updates, good)
    metrics = {"loss": loss, "tokens": tokens, "grad_norm": grad_norm}
    metrics |= {"bad_in_a_row": bad_updates[0], "bad_updates": bad_updates[1]}
    return TrainState(params, opt_state, state.step + 1, bad_updates), metrics
