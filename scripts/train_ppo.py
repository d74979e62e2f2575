"""PPO: run_dir/sft/model -> run_dir/ppo/model, the policy improved against the multi-component reward.

Every eval_every iterations the same validation prompts are answered, decoded as in the evaluation (greedily by default);
the policy with the best mean total reward there is the one that is kept. Stopped and started again, it goes on from its last checkpoint.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
from safetensors.numpy import save_file

from therapy_jax import batching, checkpoint, evaluate, gpt2, metrics, ppo, prompts, run, sharding, weights
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import Exchange, exchanges
from therapy_jax.rewards import batch as reward_batch
from therapy_jax.rewards.combine import score
from therapy_jax.rewards.words import make_vocabulary
from therapy_jax.run import console

SAMPLES = 20  # fixed validation prompts whose replies are written to samples.jsonl at each evaluation


def main(config: Config) -> None:
    ppo.check(config.sampling)
    folder = run.start(config, "train_ppo")
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config.ppo.batch_size // config.ppo.minibatches, mesh, "ppo.batch_size / ppo.minibatches")
    data = {
        split: [e for d in part for e in exchanges(d)]
        for split, part in run.read_data(config.data, config.seed).items()
    }

    gpt2_config, params, tokenizer = run.load_model(folder, "sft", config)
    room = gpt2_config.n_positions - config.sampling.max_new_tokens
    if config.prompt.max_tokens > room:
        total = config.prompt.max_tokens + config.sampling.max_new_tokens
        raise ConfigError(
            f"prompt.max_tokens + sampling.max_new_tokens ({total}) exceed the model's {gpt2_config.n_positions} positions"
        )
    model, tx = gpt2.GPT2(gpt2_config), ppo.optimizer(config.ppo)
    vocabulary = sharding.replicate(mesh, make_vocabulary(tokenizer, gpt2_config.padded_vocab_size))

    def encode(exchange: Exchange) -> list[int]:
        return prompts.encode_prompt(tokenizer, exchange.context, exchange.client, config.prompt)[0]

    encoded = {split: [encode(e) for e in part] for split, part in data.items()}
    usable = [i for i, row in enumerate(encoded["train"]) if len(row) <= config.prompt.max_tokens]
    too_long = len(encoded["train"]) - len(usable)
    if not usable:
        raise ConfigError(f"no training prompt fits in prompt.max_tokens ({config.prompt.max_tokens}); raise it")
    console.print(f"ppo: {len(usable):,} prompts; {too_long:,} left out: the utterance alone exceeds prompt.max_tokens")
    length = batching.round_up(max(len(encoded["train"][i]) for i in usable), evaluate.PAD_TO)
    train_prompts = batching.prompts([encoded["train"][i] for i in usable], min(length, room))
    train_references = evaluate.references([data["train"][i] for i in usable], tokenizer)

    def score_fn(reply, references):
        return score(reward_batch.make(reply.tokens, reply.mask, references, vocabulary), config.rewards.weights)

    held_out = [i for i, row in enumerate(encoded["validation"]) if len(row) <= room][: config.ppo.eval_prompts]
    eval_exchanges = [data["validation"][i] for i in held_out]
    eval_rows = [encoded["validation"][i] for i in held_out]
    eval_references = evaluate.references(eval_exchanges, tokenizer)
    decoding = run.decoding(config)

    def evaluate_policy(policy, iteration: int) -> dict[str, float]:
        """Replies to the fixed prompts, decoded as evaluate.py will: reward, and metrics that are not in it."""
        size = config.ppo.batch_size
        replies = evaluate.answer(
            policy, eval_rows, jax.random.key(0), model=model, cfg=decoding, batch_size=size, mesh=mesh
        )
        system = evaluate.of_replies(replies, eval_references, tokenizer, vocabulary, config.rewards.weights)
        run.log_samples(folder, iteration, system.texts[:SAMPLES], system.emotions[:SAMPLES], eval_exchanges[:SAMPLES])
        words = metrics.text_metrics(system.texts, [e.therapist.text for e in eval_exchanges])
        found = {
            "reward": system.reward,
            "stop_rate": system.stop_rate,
            **words,
            **{f"reward/{k}": v for k, v in system.terms.items()},
        }
        return {f"validation/{name}": value for name, value in found.items()}

    state = sharding.replicate(mesh, ppo.init_state(params, gpt2_config, tx, config.ppo))
    sections = ("seed", "data", "prompt", "rewards", "sampling", "ppo")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k in sections}
    belongs_to = {"stage": "ppo", "model": dataclasses.asdict(gpt2_config), **settings}
    manager = checkpoint.manager(folder / "ppo" / "checkpoints", best="validation/reward", mode="max")
    restored = checkpoint.restore(manager, state, belongs_to)
    state, done = restored or (state, 0)
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.forget_after(folder / name, "ppo", done if restored else -1)
    if restored:
        console.print(f"ppo: going on from iteration {done} of {config.ppo.iterations}")
    else:  # the SFT policy is the first candidate: PPO that makes things worse leaves it as it was
        found = evaluate_policy(state.params["policy"], 0)
        run.log(folder, "ppo", 0, found, began)
        checkpoint.save(manager, 0, state, belongs_to, found)

    program = jax.jit(
        functools.partial(
            ppo.ppo_iteration, model=model, tx=tx, score_fn=score_fn, sampling=config.sampling, cfg=config.ppo
        ),
        donate_argnums=0,
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    with run.progress("ppo", config.ppo.iterations, done) as advance:
        for iteration in range(done, config.ppo.iterations):
            indices = batching.rollout_indices(len(usable), config.ppo.batch_size, config.seed, iteration)
            prompt, references = jax.tree.map(lambda x, chosen=indices: x[chosen], (train_prompts, train_references))
            state, metrics_ = program(state, *sharding.split_batch(mesh, (prompt, references)), key)
            logged, finished = jax.device_get(metrics_), iteration + 1
            run.check_finite(logged)
            if finished % config.ppo.eval_every == 0 or finished == config.ppo.iterations:
                found = evaluate_policy(state.params["policy"], finished)
                logged |= found
                checkpoint.save(manager, finished, state, belongs_to, found)
            run.log(folder, "ppo", finished, logged, began)
            advance(
                finished, score=float(logged["score"]), kl=float(logged["kl"]), tokens=float(logged["reply_tokens"])
            )

    best = manager.best_step()
    assert best is not None
    if best != manager.latest_step():
        state, _ = checkpoint.restore(manager, state, belongs_to, step=best) or (state, 0)
    target = folder / "ppo" / "model"
    weights.save_pretrained(target, gpt2_config, state.params["policy"], tokenizer)
    value = {k: np.asarray(v) for k, v in checkpoint.flatten(jax.device_get(state.params["value"])).items()}
    save_file(value, target / "value_head.safetensors")
    reward = checkpoint.metric_of(manager, best, "validation/reward")
    console.print(f"ppo: best validation reward {reward:.4f} at iteration {best} (SFT: iteration 0); model in {target}")
    manager.close()
    if done < config.ppo.iterations:
        run.note_environment(folder, "ppo", time.monotonic() - began)


if __name__ == "__main__":
    run.main(main, __doc__ or "")
