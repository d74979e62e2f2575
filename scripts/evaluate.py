"""Evaluation: base, sft, ppo and the trivial systems on held-out exchanges -> results.json and a table."""

from therapy_jax import run

if __name__ == "__main__":
    run.parse(__doc__)  # before jax is imported: --help and a misspelt key are answered at once

import dataclasses
import functools
import hashlib
import time
from pathlib import Path

import jax

from therapy_jax import (
    baselines,
    dialogue,
    evaluate,
    files,
    gpt2,
    logs,
    metrics,
    origin,
    processes,
    prompts,
    report,
    results_table,
    sharding,
    stages,
    tfidf,
)
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import Exchange, exchanges
from therapy_jax.rewards import batch as reward_batch
from therapy_jax.rewards.batch import References
from therapy_jax.run import console

MODELS = ("base", "sft", "ppo")


def main(config: Config) -> None:
    folder = run.start(config, "evaluate")
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    cfg = config.evaluate
    sharding.check_divides(cfg.batch_size, mesh, "evaluate.batch_size")
    dialogues = run.read_data(config.data, config.seed)
    data = {split: [e for d in part for e in exchanges(d)] for split, part in dialogues.items()}
    if not data[cfg.split]:
        raise ConfigError(f"the {cfg.split} split is empty; choose another with --evaluate.split")
    for name in dict.fromkeys(["sft", *(name for name in cfg.systems if name in MODELS)]):  # before hours of answering
        held_out = dialogues[cfg.split] if cfg.split != "train" else []
        origin.check(stages.model_of(folder, name), config, held_out, cfg.split)

    # The SFT model is the trunk that scores every system; its tokens carry the trivial answers too.
    gpt2_config, params, tokenizer = stages.load_model(folder, "sft", config)
    room = gpt2_config.n_positions - config.sampling.max_new_tokens
    fits = [
        e
        for e in data[cfg.split]
        if len(prompts.encode_prompt(tokenizer, e.context, e.client, config.prompt)[0]) <= room
    ]
    too_long, chosen = len(data[cfg.split]) - len(fits), fits[: cfg.limit]
    if not chosen:
        raise ConfigError(
            f"no prompt of the {cfg.split} split fits into the model's positions with a reply ({room} tokens)"
        )
    if too_long:
        run.warn(f"{too_long} exchanges left out, for all systems: the prompt has more than {room} tokens")
    trained = origin.settings(stages.model_of(folder, "ppo")) if "ppo" in cfg.systems else None
    if trained is not None and trained.rewards != config.rewards:
        run.warn("ppo was trained with other rewards than these, with which `reward` is computed: give its own config")
    gold = [e.therapist.emotion for e in chosen]
    scorer = stages.make_scorer(folder, config, data, gpt2_config, params, tokenizer)
    refs = reward_batch.make_references(chosen, scorer.trunk, tokenizer, model=scorer.model)
    evaluator = tfidf.fit_evaluator(data, config.seed)
    expressed = None if evaluator is None else evaluator.predict
    language = stages.load_language_model(config, dialogues[cfg.split] if cfg.split != "train" else [], cfg.split)

    def judged(system: evaluate.System) -> dict:
        row = evaluate.row(system, chosen, expressed)
        if language is not None:
            row["reply_perplexity"] = evaluate.language_perplexity(
                language, system.texts, chosen, batch_size=cfg.batch_size, mesh=mesh
            )
        return row

    def of_turns(turns: list[dialogue.Turn]) -> evaluate.System:
        return evaluate.of_turns(turns, chosen, refs, scorer, config.prompt)

    systems: dict[str, dict] = {}
    samples: dict[str, list[evaluate.System]] = {}  # one System a draw; a single one where nothing is drawn
    chosen_constants: dict[str, str] = {}
    train, seeds = data["train"], [config.seed + i for i in range(cfg.draws)]
    for name in cfg.systems:
        if name in MODELS:
            console.print(f"{name}: answering {len(chosen)} prompts ...")
            samples[name] = of_model(name, config, folder, chosen, refs, scorer, mesh)
        elif name == "constant":
            console.print("constant: choosing the best on train ...")
            systems[name], chosen_constants = evaluate.constants(
                train, chosen, lambda turns: judged(of_turns(turns)), config.seed
            )
        elif name == "retrieval":
            samples[name] = [of_turns(baselines.retrieval(train, chosen))]
        elif name == "commonplace":
            half = metrics.distinct([e.therapist.text for e in chosen], 2) / 2
            samples[name] = [of_turns(baselines.commonplace(train, len(chosen), seed, half)) for seed in seeds]
        else:
            samples[name] = [of_turns(baselines.random_reply(train, len(chosen), seed)) for seed in seeds]
    console.print(f"scoring {sum(map(len, samples.values()))} lists of answers ...")
    drawn = {name: [judged(system) for system in draws] for name, draws in samples.items()}
    means = {name: evaluate.mean_row(rows) for name, rows in drawn.items()}
    systems = {name: (means | systems)[name] for name in cfg.systems}
    therapist = judged(of_turns([e.therapist for e in chosen]))  # what a person scores on metrics without a reference

    results = {
        "data": {
            "name": config.data.format,
            "split": cfg.split,
            "n": len(chosen),
            "left_out": too_long,
            "sha256": fingerprint(config),
        },
        "decoding": {**dataclasses.asdict(run.decoding(config)), "candidates": cfg.candidates, "draws": cfg.draws},
        "signature": metrics.signature(),
        # A term that the config gives no weight, as one of a custom reward, counts with 1.
        "reward_weights": {**{name: 1.0 for system in systems.values() for name in system["terms"]}, **scorer.weights},
        "systems": systems,
        **({"draws": drawn} if cfg.draws > 1 else {}),
        "therapist": {k: therapist[k] for k in evaluate.WITHOUT_REFERENCE if k in therapist},
        "comparisons": compare(samples, chosen, config),
        "constants": chosen_constants,
        "emotion_majority_accuracy": metrics.majority_accuracy(gold) if any(gold) else None,
        "paper": results_table.PAPER,
    }
    answers = [
        {
            "context": [{"speaker": turn.speaker, "text": turn.text} for turn in e.context],
            "client": e.client.text,
            "therapist": e.therapist.text,
            **{name: draws[0].texts[i] for name, draws in samples.items()},
        }
        for i, e in enumerate(chosen)
    ]
    if processes.is_writer():
        files.write_json(folder / "results.json", results)
        files.write_json(folder / "answers.json", answers)
    logs.note_environment(folder, "evaluate", time.monotonic() - began, went_on=False)
    console.print(results_table.screen(results))
    for name, differences in results["comparisons"].items():
        shown = ", ".join(f"{k} {d:+.4f} [{low:+.4f}, {high:+.4f}]" for k, (d, low, high) in differences.items())
        console.print(f"{name}: {shown}")
    console.print(f"signature: {results['signature']}")
    console.print(f"written: {run.escape(str(folder / 'results.json'))}")


def of_model(
    name: str,
    config: Config,
    folder: Path,
    chosen: list[Exchange],
    refs: References,
    scorer: evaluate.Scorer,
    mesh,
) -> list[evaluate.System]:
    """One trained system's answers and scores, a System a draw, and the perplexity of the therapist's replies under it.
    Draw i is what seed + i would have answered."""
    gpt2_config, params, tokenizer = stages.load_model(folder, name, config)
    model, params = gpt2.GPT2(gpt2_config), sharding.place(mesh, params)
    size = config.evaluate.batch_size
    examples = [prompts.encode(tokenizer, e, config.prompt, gpt2_config.n_positions) for e in chosen]
    # Not theirs: beside a long reply of the therapist's they may have had to leave context out.
    rows = [prompts.encode_prompt(tokenizer, e.context, e.client, config.prompt)[0] for e in chosen]
    how = {"model": model, "cfg": run.decoding(config), "batch_size": size, "mesh": mesh}
    perplexity = evaluate.perplexity_of(*evaluate.losses_of(params, examples, model=model, batch_size=size, mesh=mesh))

    def draw(seed: int) -> evaluate.System:
        key = jax.random.fold_in(jax.random.key(seed), 3)
        replies = evaluate.agreed_answer(
            params, rows, key, candidates=config.evaluate.candidates, tokenizer=tokenizer, **how
        )
        return evaluate.of_replies(replies, refs, chosen, scorer, perplexity)

    systems = [draw(config.seed + i) for i in range(config.evaluate.draws)]
    if name != "base":
        return systems
    # base never learnt to write an emotion: it is asked which of the seven words it finds likeliest.
    read = functools.partial(
        evaluate.read_emotions, params, tokenizer=tokenizer, model=model, batch_size=size, mesh=mesh
    )
    if config.prompt.emotion == "inferred":  # its own guess of the client's emotion comes first, as in a reply
        marker = tokenizer.convert_tokens_to_ids("<|reply|>")
        rows = [
            [*row, *prompts.encode_text(tokenizer, word), marker] for row, word in zip(rows, read(rows), strict=True)
        ]
    emotions = list(read(rows))
    return [system._replace(emotions=emotions) for system in systems]


def compare(samples: dict[str, list[evaluate.System]], chosen: list[Exchange], config: Config) -> dict[str, dict]:
    """The last trained system against every other: mean difference and its 95 % interval by paired bootstrap over the
    exchanges. The score of an exchange is its mean over the draws, so that an interval has less of the sampler's luck."""
    trained = [name for name in samples if name in MODELS]
    if not trained:
        return {}
    last = max(trained, key=MODELS.index)

    def scores(texts: list[str], e: Exchange) -> dict[str, float]:
        return metrics.mean_scores([metrics.item_scores(text, e.therapist.text) for text in texts])

    items = {
        name: [scores(texts, e) for *texts, e in zip(*(s.texts for s in draws), chosen, strict=True)]
        for name, draws in samples.items()
    }
    resamples, seed = config.evaluate.bootstrap, config.seed
    return {
        f"{last} - {other}": metrics.paired_bootstrap(items[last], items[other], resamples, seed)
        for other in samples
        if other != last
    }


def fingerprint(config: Config) -> str:
    """sha256 of the data file; of names and contents for a folder."""
    path = dialogue.SAMPLE if config.data.path is None else files.local_path(config.data.path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if path.is_file() else file.name.encode() + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run.main(report.after(main), __doc__)
