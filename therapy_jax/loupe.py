"""The loupe: one reply, token by token, before and after a PPO iteration.

    token        <|text|>   I      hear   that   ...   EOS
    logprobs     what the policy gave the token (nats)          ref_logprobs   what the frozen SFT policy gives it
    kl           logprobs - ref_logprobs (k1)                   rewards        -beta * kl, and on the last token the score
    values       the critic's guess before the token            advantages     what the update asks for: more or less of it
    ratio        new probability / old probability, after the update

`look` is pure. `of_run` makes one more iteration from the models that a run folder holds, on a few held-out prompts, for
the report.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from therapy_jax import batching, evaluate, gpt2, ppo, prompts, stages, weights
from therapy_jax.advantages import shape_rewards
from therapy_jax.batching import Prompt
from therapy_jax.config import Config, ConfigError, MeshConfig, PPOConfig
from therapy_jax.dialogue import Exchange, exchanges, read_dialogues
from therapy_jax.files import fetched
from therapy_jax.gpt2 import Array
from therapy_jax.ppo import PPOState
from therapy_jax.rewards import combine, scoring
from therapy_jax.rewards.batch import PAD_TO, References, make_references
from therapy_jax.sampling import Reply

PROMPTS = 4  # whose replies the report looks at


def once(function: Callable[..., Any], **jit: Any) -> Callable[..., Any]:
    """jit for what runs a single time: on a CPU, compiling would take far longer than the run."""
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options, **jit)


class Loupe(NamedTuple):
    """f32[B,R], 0 outside the mask (ratio: 1); of one reply, see `of_reply`: numpy f32[n], its n tokens alone."""

    logprobs: Array  # nats
    ref_logprobs: Array  # nats
    kl: Array  # nats, k1
    rewards: Array  # they sum to score - beta * sum of kl
    values: Array  # 0 without a critic
    advantages: Array  # as the loss takes them: whitened where ppo.whiten says so
    ratio: Array


def look(
    before: PPOState,
    after: PPOState,
    prompt: Prompt,
    reply: Reply,
    scores: Array,
    *,
    model: gpt2.GPT2,
    cfg: PPOConfig,
    temperature: float,
) -> Loupe:
    """The state that wrote the replies, the state after ppo.learn, and the scores f32[B] -> Loupe."""
    how: dict[str, Any] = {"model": model, "cfg": cfg, "temperature": temperature}
    tokens, mask = reply.tokens, reply.mask
    logprobs, _, ref_logprobs, _ = ppo.read_both(before, prompt, tokens, mask, **how)
    rollout, _ = ppo.judge(before, prompt, reply, scores, **how)
    new_logprobs, *_ = ppo.read_both(after, prompt, tokens, mask, **how)
    kl = jnp.where(mask, logprobs - ref_logprobs, 0.0)
    rewards = shape_rewards(scores, kl, mask, kl_coef=before.kl_coef)
    ratio = jnp.exp(new_logprobs - rollout.old_logprobs)
    return Loupe(logprobs, ref_logprobs, kl, rewards, rollout.old_values, rollout.advantages, ratio)


def of_reply(loupe: Loupe, mask: Array, row: int) -> Loupe:
    """One reply's tokens alone: numpy f32[n] each."""
    counts = np.asarray(mask[row])
    return Loupe(*(np.asarray(x[row])[counts] for x in loupe))  # pyright: ignore[reportArgumentType]


class Bench(NamedTuple):
    """What one iteration needs, on one device."""

    state: PPOState
    tx: Any
    model: gpt2.GPT2
    tokenizer: Any
    scorer: evaluate.Scorer
    stage: str  # whose policy it is: "ppo", or "sft" where there is no ppo/model


def for_one_iteration(config: Config, **ppo_changes: Any) -> Config:
    """The config for a single small iteration on one device, at the rate with which a run ends: an optimizer without
    moments steps by the whole rate in every parameter, and at the peak that would be no update that a run ever sees."""
    rate = config.ppo.learning_rate * ppo.FINAL_RATE
    few = dataclasses.replace(config.ppo, warmup_steps=0, critic_warmup=0, learning_rate=rate, **ppo_changes)
    return dataclasses.replace(config, ppo=few, mesh=MeshConfig(data=1))


def load(folder: Path, config: Config, data: dict[str, list[Exchange]]) -> Bench:
    """Policy and critic of ppo/model where there is one, else of sft/model; sft/model is the reference. The optimizer starts
    anew, since its moments are not handed on. Raises ConfigError where there is no sft/model."""
    gpt2_config, reference, tokenizer = stages.load_model(folder, "sft", config)
    scorer = stages.make_scorer(folder, config, data, gpt2_config, reference, tokenizer)
    tx = ppo.optimizer(config.ppo)
    state = ppo.init_state(jax.tree.map(jnp.array, reference), gpt2_config, tx, config.ppo, combine.init_stats(()))
    stage, trained = "sft", folder / "ppo" / "model"
    if (trained / "model.safetensors").is_file():
        stage, value = "ppo", dict(state.params["value"])
        if (trained / "value_head.safetensors").is_file():
            head = load_file(fetched(trained) / "value_head.safetensors")
            value["head"] = {"value": {name.removeprefix("value."): jnp.asarray(x) for name, x in head.items()}}
        if "trunk" in value and (folder / "ppo" / "critic" / "model.safetensors").is_file():
            value["trunk"] = jax.tree.map(jnp.array, weights.load_pretrained(fetched(folder / "ppo" / "critic"))[1])
        policy = jax.tree.map(jnp.array, weights.load_pretrained(fetched(trained))[1])
        state = state._replace(params={"policy": policy, "value": value})
    return Bench(state, tx, gpt2.GPT2(gpt2_config), tokenizer, scorer, stage)


def ask(bench: Bench, config: Config, chosen: Sequence[Exchange]) -> tuple[Prompt, References]:
    """Exchanges -> prompts, padded on the left to one length, and what the data says about each. Raises ConfigError for a prompt
    that leaves no room for a reply."""
    rows = [prompts.encode_prompt(bench.tokenizer, e.context, e.client, config.prompt)[0] for e in chosen]
    room = bench.model.config.n_positions - config.sampling.max_new_tokens
    if (longest := max(map(len, rows))) > room:
        raise ConfigError(
            f"a prompt of {longest} tokens leaves no room for a reply of {config.sampling.max_new_tokens} in the model's "
            f"{bench.model.config.n_positions} positions; say less"
        )
    prompt = batching.prompts(rows, min(batching.round_up(max(map(len, rows)), PAD_TO), room))
    return prompt, make_references(chosen, bench.scorer.trunk, bench.tokenizer, model=bench.model)


def answer(
    bench: Bench, config: Config, chosen: Sequence[Exchange], prompt: Prompt, references: References, key: Array
) -> tuple[Reply, Any, combine.Raw]:
    """ppo.rollout, and the rewards of the host where there are any -> (Reply, RewardBatch, {term: f32[B]})."""
    scorer = bench.scorer
    score_fn = functools.partial(scoring.score, model=bench.model, device_custom=scorer.device_custom)
    how: dict[str, Any] = {"model": bench.model, "score_fn": score_fn, "sampling": config.sampling, "cfg": config.ppo}
    program = once(functools.partial(ppo.rollout, **how))
    reply, batch, raw = program(bench.state, prompt, references, scorer.fixed, key)
    if scorer.host:
        ids = [
            row[counts].tolist() for row, counts in zip(np.asarray(reply.tokens), np.asarray(reply.mask), strict=True)
        ]
        asked = [e for e in chosen for _ in range(config.ppo.replies_per_prompt)]
        raw = scoring.host_terms(scorer.host, batch, raw, scorer.tokenizer, ids, asked)
    return reply, batch, raw


def combine_fn(bench: Bench, config: Config) -> ppo.CombineFn:
    def combined(raw: combine.Raw, stats: combine.RunningStats):
        return combine.combine(raw, bench.scorer.weights, stats, standardise=config.rewards.standardise)

    return combined


def improve(
    bench: Bench, config: Config, prompt: Prompt, reply: Reply, raw: combine.Raw, key: Array
) -> tuple[PPOState, ppo.Metrics]:
    """ppo.learn."""
    how: dict[str, Any] = {"model": bench.model, "tx": bench.tx, "cfg": config.ppo}
    how |= {"combine_fn": combine_fn(bench, config), "temperature": config.sampling.temperature}
    return once(functools.partial(ppo.learn, **how))(bench.state, prompt, reply, raw, key)


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text of its own, spaces kept; what is only a part of a character shows as the replacement character."""
    return [tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids]


def of_run(folder: Path, config: Config) -> dict[str, Any]:
    """One iteration more from the run's models, on the first few held-out prompts that fit -> what loupe.json holds.

    Raises ConfigError where the folder has no sft/model, or the config cannot be that of a PPO rollout.
    """
    ppo.check(config.sampling)
    times = config.ppo.replies_per_prompt
    cfg = for_one_iteration(config, batch_size=PROMPTS * times, minibatches=1)
    source = cfg.data
    dialogues = read_dialogues(source.path, source.format, source.splits, source.clean, source.on_bad_row, cfg.seed)
    data = {split: [e for d in part for e in exchanges(d)] for split, part in dialogues.items()}
    bench = load(folder, cfg, data)

    def fits(e: Exchange) -> bool:
        ids, _ = prompts.encode_prompt(bench.tokenizer, e.context, e.client, cfg.prompt)
        return len(ids) <= bench.model.config.n_positions - cfg.sampling.max_new_tokens

    held_out = [e for split in ("validation", "test", "train") for e in data.get(split, []) if fits(e)]
    if len(held_out) < PROMPTS:
        raise ConfigError(f"the loupe looks at {PROMPTS} prompts, and only {len(held_out)} fit into the model")
    chosen = [held_out[i * (min(len(held_out), 64) // PROMPTS)] for i in range(PROMPTS)]  # not all of one conversation
    prompt, references = ask(bench, cfg, chosen)
    key = jax.random.fold_in(jax.random.key(cfg.seed), 4)
    reply, _, raw = answer(bench, cfg, chosen, prompt, references, key)
    state = bench.state._replace(reward_stats=combine.init_stats(raw))
    bench = bench._replace(state=state)
    scores, _, _ = combine_fn(bench, cfg)(raw, state.reward_stats)
    after, metrics = improve(bench, cfg, prompt, reply, raw, key)
    program = once(look, static_argnames=("model", "cfg", "temperature"))
    seen = program(
        state, after, prompt, reply, scores, model=bench.model, cfg=cfg.ppo, temperature=cfg.sampling.temperature
    )
    replies = []
    for i, e in enumerate(chosen):
        row = i * times
        ids = np.asarray(reply.tokens[row])[np.asarray(reply.mask[row])].tolist()
        columns = {name: [float(v) for v in x] for name, x in of_reply(seen, reply.mask, row)._asdict().items()}
        terms = {name: float(x[row]) for name, x in raw.items()}
        replies.append(
            {"client": e.client.text, "therapist": e.therapist.text, "tokens": words_of(bench.tokenizer, ids),
             "score": float(scores[row]), "terms": terms, **columns}
        )  # fmt: skip
    return {
        "stage": bench.stage,
        "estimator": cfg.ppo.estimator,
        "kl_coef": float(state.kl_coef),
        "clip": cfg.ppo.clip,
        "learning_rate": cfg.ppo.learning_rate,
        "steps": cfg.ppo.epochs,
        "batch": len(scores),
        "clip_fraction": float(metrics["clip_fraction"]),
        "weights": {name: bench.scorer.weights.get(name, 1.0) for name in raw},
        "standardise": cfg.rewards.standardise,
        "replies": replies,
    }
