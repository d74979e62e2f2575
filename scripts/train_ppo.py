"""PPO: run_dir/sft/model -> run_dir/ppo/model, the policy improved against the multi-component reward.

Every eval_every iterations the same validation prompts are answered, once each, at the evaluation's temperature (greedily by default);
the policy that is best there by ppo.keep_best is kept. Stopped and started again, it goes on from its last checkpoint.
"""

from therapy_jax import run

if __name__ == "__main__":
    run.parse(__doc__)  # before jax is imported: --help and a misspelt key are answered at once

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from therapy_jax import (
    batching,
    checkpoint,
    classifiers,
    evaluate,
    files,
    gpt2,
    logs,
    metrics,
    origin,
    ppo,
    processes,
    prompts,
    report,
    sharding,
    stages,
    stopping,
    tfidf,
    weights,
)
from therapy_jax.batching import Prompt
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import Dialogue, Exchange, exchanges
from therapy_jax.rewards import combine, scoring
from therapy_jax.rewards.batch import PAD_TO, References, make_references
from therapy_jax.run import console

SAMPLES = 20  # fixed validation prompts whose replies are written to samples.jsonl at each evaluation


class Prepared(NamedTuple):
    """Prompts with what the data says about each: of train as one array, of validation as rows."""

    exchanges: list[Exchange]
    prompts: Prompt
    references: References
    held_out: list[Exchange]
    held_out_rows: list[list[int]]
    held_out_references: References


def main(config: Config) -> None:
    cfg = config.ppo
    ppo.check(config.sampling)
    folder = run.start(config, "train_ppo")
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    part = cfg.batch_size // cfg.replies_per_prompt // cfg.minibatches
    sharding.check_divides(part, mesh, "ppo.batch_size / ppo.replies_per_prompt / ppo.minibatches")
    dialogues = run.read_data(config.data, config.seed)
    data = {split: [e for d in part for e in exchanges(d)] for split, part in dialogues.items()}
    origin.check(stages.model_of(folder, "sft"), config, dialogues["validation"], "validation")
    gpt2_config, params, tokenizer = stages.load_model(folder, "sft", config)
    model, tx = gpt2.GPT2(gpt2_config), ppo.optimizer(cfg)
    scorer = stages.make_scorer(folder, config, data, gpt2_config, params, tokenizer)
    ready = prepare(config, data, scorer)
    stats = combine.init_stats(probe(config, ready, scorer))
    make = functools.partial(ppo.init_state, config=gpt2_config, tx=tx, cfg=cfg, stats=stats)
    state = sharding.make_state(mesh, make, sharding.place(mesh, params))
    trunk = {"trunk": classifiers.digest(scorer.trunk)}
    del params  # from here on the state's reference is what scores: the SFT model is held once
    scorer = scorer._replace(trunk=None)
    evaluate_policy = make_validation(config, folder, dialogues, data, ready, scorer, mesh)
    sections = ("seed", "data", "prompt", "rewards", "classifiers", "sampling", "ppo")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k in sections}
    if config.rewards.custom:  # a reward that was edited is another reward
        file = Path(config.rewards.custom.path.rpartition(":")[0]).expanduser()
        settings["custom_reward"] = hashlib.sha256(file.read_bytes()).hexdigest()
    validation = {"validation": dataclasses.asdict(run.decoding(config))}  # scores that choose must be of one decoding
    same_anywhere = dataclasses.replace(gpt2_config, mesh=None, remat=False)  # a run may go on with other devices
    belongs_to = {"stage": "ppo", "model": dataclasses.asdict(same_anywhere), **settings, **validation, **trunk}
    belongs_to["content"] = origin.content(dialogues)
    best_metric, mode = (
        f"validation/{cfg.keep_best.removeprefix('-')}",
        "min" if cfg.keep_best.startswith("-") else "max",
    )
    scores: dict[int, float] = {}  # of best_metric, which say what checkpoint.manager keeps beside the newest
    manager = checkpoint.manager(folder / "ppo" / "checkpoints", mode, scores)
    restored = checkpoint.restore(manager, state, belongs_to, say=run.warn)
    state, done, unlogged = restored or (state, 0, None)
    lines = logs.take_up(folder, "ppo", done if restored else -1)
    logs.take_up(folder, "ppo", done if done in lines else done - 1, "samples.jsonl")
    scores |= {step: line[best_metric] for step, line in lines.items() if best_metric in line}

    def beyond(kl: float) -> bool:
        return cfg.max_kl is not None and kl > cfg.max_kl

    def is_evaluated(iteration: int, line: dict[str, Any]) -> bool:
        return iteration % cfg.eval_every == 0 or iteration == cfg.iterations or beyond(line.get("kl_k3", 0.0))

    def complete(iteration: int, line: dict[str, Any]) -> None:
        """Evaluate the state that is saved as `iteration`, where it is due, and write the log line."""
        if is_evaluated(iteration, line):
            with stopping.at_once():
                found = evaluate_policy(state, iteration)
            if best_metric not in found:
                names = ", ".join(sorted(name.removeprefix("validation/") for name in found))
                raise ConfigError(f"ppo.keep_best: there is no validation metric {cfg.keep_best}; there are {names}")
            line |= {name: logs.plain(value) for name, value in found.items()}
            scores[iteration] = line[best_metric]
            if 0 in lines and (alarm := evaluate.alarm(lines[0], line)):
                console.print(f"[bold yellow]alarm[/] at iteration {iteration}: {alarm}")
                line["alarm"] = alarm
        lines[iteration] = line
        logs.log(folder, "ppo", iteration, line, began)

    if restored:
        console.print(f"ppo: going on from iteration {done} of {cfg.iterations}")
    else:  # the SFT policy is the first candidate: PPO that makes things worse leaves it as it was
        complete(0, {})
        checkpoint.save(manager, 0, state, belongs_to, {})

    iterate = compile_iteration(config, model, tx, state, ready, scorer, mesh)
    finished = done
    with (
        logs.noting(folder, "ppo", began),
        run.progress("ppo", cfg.iterations, done) as advance,
        stopping.deferred(),
        run.count_compilations() as compiled,
    ):
        if unlogged is not None and done not in lines:
            complete(done, unlogged)
        stopped = beyond((unlogged or {}).get("kl_k3", 0.0))  # in an earlier start: it stays so
        while finished < cfg.iterations and not stopped:
            before = compiled()
            state, on_device = iterate(state, finished)
            if finished > done and compiled() > before and not scorer.host:  # an encoder, or a reward of yours, may
                console.print(f"[yellow]iteration {finished + 1} compiled a program anew: slow, and a fault of ours")
            line = {name: logs.plain(value) for name, value in jax.device_get(on_device).items()}
            run.check_finite(line)
            finished += 1
            stopped = beyond(line["kl_k3"])
            stop = stopping.wanted()
            bad = line["bad_in_a_row"] >= cfg.max_bad_updates
            if is_evaluated(finished, line) or stop or bad:
                logs.copy_logs(folder)
                checkpoint.save(manager, finished, state, belongs_to, line)
            complete(finished, line)
            advance(finished, **{k: line[k] for k in ("score", "kl", "reply_tokens")})
            if bad:
                logs.copy_logs(folder)
                run.give_up(folder, "ppo", finished, line, prompts_of(config, ready, finished - 1))
            if stop:
                logs.copy_logs(folder)
                raise stopping.Stopped(f"ppo: stopped by {stop} at iteration {finished} of {cfg.iterations}, saved")
    logs.copy_logs(folder)
    if stopped:
        console.print(f"ppo: stopped at iteration {finished}: the KL per reply is above ppo.max_kl ({cfg.max_kl} nats)")

    best = checkpoint.best(processes.shared(list(manager.all_steps())), scores, mode)
    if best != finished:
        restored = checkpoint.restore(manager, state, belongs_to, checkpoint.ranking(scores, mode), run.warn)
        assert restored is not None
        state, best, _ = restored
    origin.note(folder / "ppo" / "model", config, dialogues["train"], folder / "sft" / "model")
    export(folder / "ppo", gpt2_config, state, tokenizer)
    console.print(
        f"ppo: best {best_metric} {scores.get(best, float('nan')):.4f} at iteration {best} (SFT: iteration 0); "
        f"model in {run.escape(str(folder / 'ppo'))}"
    )
    manager.close()
    if done < finished or not logs.is_noted(folder, "ppo"):
        logs.note_environment(folder, "ppo", time.monotonic() - began)


def prepare(config: Config, data: dict[str, list[Exchange]], scorer: evaluate.Scorer) -> Prepared:
    """Exchanges -> prompts of one length and references. Prompts too long for the config, or the model, are left out."""
    tokenizer, model, longest = scorer.tokenizer, scorer.model, config.prompt.max_tokens
    room = model.config.n_positions - config.sampling.max_new_tokens
    if longest > room:
        raise ConfigError(
            f"prompt.max_tokens + sampling.max_new_tokens ({longest + config.sampling.max_new_tokens}) exceed the model's "
            f"{model.config.n_positions} positions"
        )

    def encoded(split: str, limit: int) -> tuple[list[Exchange], list[list[int]]]:
        rows = [prompts.encode_prompt(tokenizer, e.context, e.client, config.prompt)[0] for e in data[split]]
        kept = [i for i, row in enumerate(rows) if len(row) <= limit]
        return [data[split][i] for i in kept], [rows[i] for i in kept]

    def refer(part: list[Exchange]) -> References:
        return make_references(part, scorer.trunk, tokenizer, model=model)

    train, rows = encoded("train", longest)
    if not train:
        raise ConfigError(f"no training prompt fits in prompt.max_tokens ({longest}); raise it")
    too_long = len(data["train"]) - len(train)
    console.print(f"ppo: {len(train):,} prompts; {too_long:,} left out: the utterance alone exceeds prompt.max_tokens")
    length = min(batching.round_up(max(map(len, rows)), PAD_TO), room)
    held_out, held_out_rows = encoded("validation", room)
    if not held_out:
        raise ConfigError("the validation split has no exchange to judge the policy by; see data.splits")
    few = slice(config.ppo.eval_prompts)
    held_out, held_out_rows = held_out[few], held_out_rows[few]
    return Prepared(train, batching.prompts(rows, length), refer(train), held_out, held_out_rows, refer(held_out))


def probe(config: Config, ready: Prepared, scorer: evaluate.Scorer) -> list[str]:
    """The names of all reward terms, from scoring two therapists' own replies: a broken reward says so before training."""
    two = ready.exchanges[:2]
    said = [prompts.encode_reply(scorer.tokenizer, e.therapist, e.client.emotion, config.prompt) for e in two]
    _, terms = evaluate.reward_terms(scorer, said, jax.tree.map(lambda x: x[:2], ready.references), two)
    return sorted(terms)


def make_validation(
    config: Config,
    folder: Path,
    dialogues: dict[str, list[Dialogue]],
    data: dict[str, list[Exchange]],
    ready: Prepared,
    scorer: evaluate.Scorer,
    mesh: Mesh,
) -> Callable[[ppo.PPOState, int], dict[str, float]]:
    """-> a function (state, iteration) -> {validation/NAME: value}: one reply to each fixed prompt, at the temperature
    of evaluate.py; the reward, and metrics that are not in it."""
    expressed = tfidf.fit_evaluator(data, config.seed)
    language = stages.load_language_model(config, dialogues["validation"], "validation")
    therapists = [e.therapist for e in ready.held_out]
    gold = [turn.emotion for turn in therapists]
    size = config.ppo.batch_size

    def evaluate_policy(state: ppo.PPOState, iteration: int) -> dict[str, float]:
        reader = scorer._replace(trunk=state.ref_params)
        replies = evaluate.answer(
            state.params["policy"], ready.held_out_rows, jax.random.key(0), model=scorer.model, cfg=run.decoding(config),
            batch_size=size, mesh=mesh,
        )  # fmt: skip
        system = evaluate.of_replies(replies, ready.held_out_references, ready.held_out, reader)
        logs.log_samples(folder, iteration, system.texts[:SAMPLES], system.emotions[:SAMPLES], ready.held_out[:SAMPLES])
        found = {"reward": system.reward, "stop_rate": system.stop_rate}
        found |= metrics.text_metrics(system.texts, [turn.text for turn in therapists])
        if any(gold):
            found |= metrics.emotion_scores(system.emotions, gold, "emotion_stated")
        if any(gold) and expressed is not None:
            found |= metrics.emotion_scores(expressed.predict(system.texts), gold, "emotion_expressed")
        if language is not None:
            found["perplexity"] = evaluate.language_perplexity(
                language, system.texts, ready.held_out, batch_size=size, mesh=mesh
            )
        found |= {f"reward/{name}": value for name, value in system.terms.items()}
        return {f"validation/{name}": value for name, value in found.items()}

    return evaluate_policy


def prompts_of(config: Config, ready: Prepared, done: int) -> dict[str, Any]:
    """The prompts of the iteration after `done`, as token ids and as what the clients say."""
    size = config.ppo.batch_size // config.ppo.replies_per_prompt
    indices = batching.rollout_indices(len(ready.exchanges), size, config.seed, done)
    rows = zip(ready.prompts.tokens[indices], ready.prompts.mask[indices], strict=True)
    return {
        "prompts": [row[kept].tolist() for row, kept in rows],
        "clients": [ready.exchanges[i].client.text for i in indices],
    }


def compile_iteration(
    config: Config, model: gpt2.GPT2, tx: Any, state: ppo.PPOState, ready: Prepared, scorer: evaluate.Scorer, mesh: Mesh
) -> Callable[[ppo.PPOState, int], tuple[ppo.PPOState, Any]]:
    """-> a function (state, iterations done) -> (state, metrics on device): one program, or two around a host reward."""
    cfg = config.ppo
    score_fn = functools.partial(scoring.score, model=model, device_custom=scorer.device_custom)

    def combine_fn(raw: combine.Raw, stats: combine.RunningStats):
        return combine.combine(raw, scorer.weights, stats, standardise=config.rewards.standardise)

    roll: dict[str, Any] = {"model": model, "score_fn": score_fn, "sampling": config.sampling, "cfg": cfg}
    learn: dict[str, Any] = {"model": model, "tx": tx, "combine_fn": combine_fn, "cfg": cfg}
    once: dict[str, Any] = {"donate_argnums": 0, "out_shardings": (sharding.shardings(mesh, state), None)}
    whole_program = jax.jit(functools.partial(ppo.ppo_iteration, **(roll | learn)), **once)
    rollout_program = jax.jit(functools.partial(ppo.rollout, **roll))
    learn_program = jax.jit(functools.partial(ppo.learn, **learn, temperature=config.sampling.temperature), **once)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    asked = cfg.batch_size // cfg.replies_per_prompt

    def iterate(state: ppo.PPOState, done: int) -> tuple[ppo.PPOState, Any]:
        indices = batching.rollout_indices(len(ready.exchanges), asked, config.seed, done)
        rows = indices[sharding.my_rows(mesh, asked)]
        prompt, references = sharding.split_batch(
            mesh, jax.tree.map(lambda x: x[rows], (ready.prompts, ready.references))
        )
        if not scorer.host:
            return whole_program(state, prompt, references, scorer.fixed, key)
        reply, batch, raw = rollout_program(state, prompt, references, scorer.fixed, key)
        tokens, mask = sharding.fetch((reply.tokens, reply.mask))
        ids = [row[counts].tolist() for row, counts in zip(tokens, mask, strict=True)]
        answered = [ready.exchanges[i] for i in indices for _ in range(cfg.replies_per_prompt)]
        batch, raw = sharding.fetch((batch, raw))
        raw = scoring.host_terms(scorer.host, batch, raw, scorer.tokenizer, ids, answered)
        return learn_program(state, prompt, reply, sharding.replicate(mesh, raw), key)

    return iterate


def export(folder: Path, gpt2_config: gpt2.GPT2Config, state: ppo.PPOState, tokenizer: Any) -> None:
    """folder/model, which torch's GPT2LMHeadModel loads, the value head beside it, and a separate critic in folder/critic."""
    critic = state.params["value"]
    head = {k: np.asarray(v) for k, v in files.flatten(sharding.fetch(critic["head"])).items()}
    if processes.is_writer():
        with files.staged(folder / "model", last="value_head.safetensors") as here:
            weights.write_tensors(head, here / "value_head.partial")
            files.share(here / "value_head.partial")
            (here / "value_head.partial").rename(here / "value_head.safetensors")
    if "trunk" in critic:
        weights.save_pretrained(folder / "critic", gpt2_config, critic["trunk"], tokenizer)
    weights.save_pretrained(
        folder / "model", gpt2_config, state.params["policy"], tokenizer
    )  # last: what has it is whole


if __name__ == "__main__":
    run.main(report.after(main), __doc__)
