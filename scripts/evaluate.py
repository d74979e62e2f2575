"""Evaluation: base, sft, ppo and the trivial systems on held-out exchanges -> results.json and a table."""

import dataclasses
import functools
import hashlib
import time
from pathlib import Path

import jax

from therapy_jax import baselines, dialogue, evaluate, gpt2, metrics, prompts, run, sharding
from therapy_jax.config import Config, ConfigError, SamplingConfig
from therapy_jax.dialogue import exchanges
from therapy_jax.rewards.words import make_vocabulary
from therapy_jax.run import console

MODELS = ("base", "sft", "ppo")


def main(config: Config) -> None:
    folder = run.start(config, "evaluate")
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    cfg = config.evaluate
    sharding.check_divides(cfg.batch_size, mesh, "evaluate.batch_size")
    data = {
        split: [e for d in part for e in exchanges(d)]
        for split, part in run.read_data(config.data, config.seed).items()
    }
    chosen = data[cfg.split][: cfg.limit]
    if not chosen:
        raise ConfigError(f"the {cfg.split} split is empty; choose another with --evaluate.split")
    gold = [e.therapist.emotion for e in chosen]
    decoding = run.decoding(config)

    systems: dict[str, dict] = {}
    samples: dict[str, evaluate.System] = {}
    chosen_constants: dict[str, str] = {}
    for name in [m for m in MODELS if m in cfg.systems]:
        console.print(f"{name}: answering {len(chosen)} prompts ...")
        system = of_model(name, config, folder, chosen, decoding, mesh)
        samples[name], systems[name] = system, evaluate.row(system, chosen)

    trivial = [s for s in cfg.systems if s not in MODELS]
    if trivial:
        gpt2_config, _, tokenizer = run.load_model(folder, "sft", config)  # its tokens carry the trivial answers too
        vocabulary = make_vocabulary(tokenizer, gpt2_config.padded_vocab_size)
        refs = evaluate.references(chosen, tokenizer)
        score_turns = functools.partial(
            evaluate.of_turns,
            exchanges=chosen,
            refs=refs,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            weights=config.rewards.weights,
            prompt=config.prompt,
        )
        for name in trivial:
            console.print(f"{name} ...")
            if name == "constant":
                systems[name], chosen_constants = evaluate.constants(data["train"], chosen, score_turns, config.seed)
                continue
            train = data["train"]
            turns = (
                baselines.retrieval(train, chosen)
                if name == "retrieval"
                else baselines.random_reply(train, len(chosen), config.seed)
            )
            samples[name] = score_turns(turns)
            systems[name] = evaluate.row(samples[name], chosen)

    results = {
        "data": {"name": config.data.format, "split": cfg.split, "n": len(chosen), "sha256": fingerprint(config)},
        "decoding": dataclasses.asdict(decoding),
        "signature": metrics.signature(),
        "reward_weights": dataclasses.asdict(config.rewards.weights),
        "systems": systems,
        "constants": chosen_constants,
        "emotion_majority_accuracy": metrics.majority_accuracy(gold),
        "paper": evaluate.PAPER,
    }
    run.write_json(folder / "results.json", results)
    answers = [
        {"client": e.client.text, "therapist": e.therapist.text, **{name: s.texts[i] for name, s in samples.items()}}
        for i, e in enumerate(chosen)
    ]
    run.write_json(folder / "answers.json", answers)
    run.note_environment(folder, "evaluate", time.monotonic() - began)
    console.print(evaluate.table(results))
    console.print(f"signature: {results['signature']}")
    console.print(f"written: {folder / 'results.json'}")


def of_model(
    name: str, config: Config, folder: Path, chosen: list[dialogue.Exchange], decoding: SamplingConfig, mesh
) -> evaluate.System:
    """One trained system's answers, scores and the perplexity of the therapist's replies under it."""
    gpt2_config, params, tokenizer = run.load_model(folder, name, config)
    model, params = gpt2.GPT2(gpt2_config), sharding.replicate(mesh, params)
    size = config.evaluate.batch_size
    examples = [prompts.encode(tokenizer, e, config.prompt, gpt2_config.n_positions) for e in chosen]
    rows = [e.prompt for e in examples]
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    replies = evaluate.answer(params, rows, key, model=model, cfg=decoding, batch_size=size, mesh=mesh)
    perplexity = evaluate.perplexity_of(*evaluate.losses_of(params, examples, model=model, batch_size=size, mesh=mesh))
    vocabulary = make_vocabulary(tokenizer, gpt2_config.padded_vocab_size)
    refs = evaluate.references(chosen, tokenizer)
    system = evaluate.of_replies(replies, refs, tokenizer, vocabulary, config.rewards.weights, perplexity)
    if name != "base":
        return system
    # base never learnt to write an emotion: it is asked which of the seven words it finds likeliest.
    read = functools.partial(
        evaluate.read_emotions, params, tokenizer=tokenizer, model=model, batch_size=size, mesh=mesh
    )
    if config.prompt.emotion == "inferred":  # its own guess of the client's emotion comes first, as in a reply
        marker = tokenizer.convert_tokens_to_ids("<|reply|>")
        rows = [
            [*row, *prompts.encode_text(tokenizer, word), marker] for row, word in zip(rows, read(rows), strict=True)
        ]
    return system._replace(emotions=list(read(rows)))


def fingerprint(config: Config) -> str:
    """sha256 of the data file; of names and contents for a folder."""
    path = dialogue.SAMPLE if config.data.path is None else Path(config.data.path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if path.is_file() else file.name.encode() + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run.main(main, __doc__ or "")
