"""Supervised fine-tuning: dialogues -> run_dir/base/model and run_dir/sft/model.

base is the model before SFT: from the hub or a folder (model.name), or from scratch, pre-trained on plain dialogue where
the config has a `pretrain` part. Stopped and started again, each stage goes on from its last checkpoint.
"""

from therapy_jax import run

if __name__ == "__main__":
    run.parse(__doc__)  # before jax is imported: --help and a misspelt key are answered at once

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from therapy_jax import (
    batching,
    checkpoint,
    files,
    gpt2,
    locate,
    logs,
    origin,
    packing,
    processes,
    prompts,
    report,
    sft,
    sharding,
    stopping,
    weights,
)
from therapy_jax.batching import Batch
from therapy_jax.config import Config, ConfigError, TrainingConfig
from therapy_jax.dialogue import Dialogue, exchanges
from therapy_jax.prompts import Example
from therapy_jax.run import console

TOKENIZER_ORIGIN = "tokenizer_origin.json"  # with what settings the tokenizer beside it was trained
BATCHES_PER_VALIDATION = 32  # at most: a validation loss should cost little beside eval_every steps


def main(config: Config) -> None:
    folder = run.start(config, "train_sft")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config.sft.batch_size // config.sft.accumulate, mesh, "sft.batch_size / sft.accumulate")
    dialogues = run.read_data(config.data, config.seed)
    sizes = check_exchanges(config, dialogues)

    gpt2_config, params, tokenizer = save_base(config, folder, dialogues, mesh)

    encode = functools.partial(prompts.encode, tokenizer, config=config.prompt, longest=gpt2_config.n_positions)
    conversations = {split: [[encode(e) for e in exchanges(d)] for d in part] for split, part in dialogues.items()}
    examples = {split: list(itertools.chain(*part)) for split, part in conversations.items()}
    dropped = sum(e.dropped_turns for part in examples.values() for e in part)
    console.print(f"sft: {sizes} exchanges; {dropped:,} context turns left out to fit prompt.max_tokens")

    held_out = examples["validation"]
    if config.sft.row_tokens is None:
        batch_of, per_epoch = one_exchange_a_row(config, examples["train"])
    else:
        batch_of, per_epoch = whole_conversations(config, config.sft.row_tokens, conversations["train"])

    order = np.argsort([len(e.prompt) + len(e.reply) for e in held_out], kind="stable")
    chunks = [
        [held_out[i] for i in order[k : k + config.sft.batch_size]] for k in range(0, len(order), config.sft.batch_size)
    ]
    longest = [
        batching.round_up(max(len(e.prompt) + len(e.reply) for e in chunk), config.sft.pad_to) for chunk in chunks
    ]
    validation = [batching.supervised(c, config.sft.batch_size, n) for c, n in zip(chunks, longest, strict=True)]

    sections = ("seed", "data", "model", "tokenizer", "prompt", "pretrain", "sft")
    params = fit(
        "sft", folder, config.sft, gpt2_config, params, batch_of, per_epoch, validation, mesh, config,
        belongs_to("sft", config, sections, dialogues),
    )  # fmt: skip
    origin.note(folder / "sft" / "model", config, dialogues["train"], folder / "base" / "model")
    weights.save_pretrained(folder / "sft" / "model", gpt2_config, params, tokenizer)
    console.print(f"sft: best model in {run.escape(str(folder / 'sft' / 'model'))}")


def check_exchanges(config: Config, dialogues: dict[str, list[Dialogue]]) -> str:
    """-> how many each split has. Raises ConfigError or DataError for what SFT cannot use, before a pre-training that may take hours."""
    found = {split: [e for d in part for e in exchanges(d)] for split, part in dialogues.items()}
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in found.items())
    for split in ("train", "validation"):
        if not found[split]:
            raise ConfigError(f"sft: the {split} split has no exchange ({sizes}); see data.splits, or give more data")
    for e in itertools.chain(*found.values()):
        prompts.check_emotion(e, config.prompt)
    return sizes


def one_exchange_a_row(config: Config, examples: list[Example]) -> tuple[Callable[[int, np.ndarray], Batch], int]:
    """-> (the rows `mine` of the batch of each step, steps per epoch); batches hold exchanges of like lengths."""
    lengths = [len(e.prompt) + len(e.reply) for e in examples]
    per_epoch = math.ceil(len(lengths) / config.sft.batch_size)

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int):
        return batching.epoch_batches(lengths, config.sft.batch_size, config.sft.pad_to, config.seed, epoch)

    def batch_of(step: int, mine: np.ndarray) -> Batch:
        indices, length = plan(step // per_epoch)[step % per_epoch]
        return batching.supervised([examples[i] for i in indices[mine[mine < len(indices)]]], len(mine), length)

    return batch_of, per_epoch


def whole_conversations(
    config: Config, row_tokens: int, conversations: list[list[Example]]
) -> tuple[Callable[[int, np.ndarray], Batch], int]:
    """The same with a context that exchanges share read once. The rows are packed once, and shuffled for each epoch."""
    rows = packing.pack([t for c in conversations for t in packing.trees(c, row_tokens)], row_tokens, config.seed)
    size, per_epoch = config.sft.batch_size, math.ceil(len(rows) / config.sft.batch_size)
    alone = sum(len(e.prompt) + len(e.reply) for c in conversations for e in c)
    together = sum(tree.size() for row in rows for tree in row)
    console.print(
        f"sft: {len(rows):,} rows of {row_tokens} tokens, {together / (len(rows) * row_tokens):.0%} full; {together:,} tokens "
        f"instead of the {alone:,} of single exchanges"
    )

    def batch_of(step: int, mine: np.ndarray) -> Batch:
        order = np.random.default_rng((config.seed, step // per_epoch)).permutation(len(rows))
        places = step % per_epoch * size + mine
        return packing.packed([rows[i] for i in order[places[places < len(rows)]]], len(mine), row_tokens)

    return batch_of, per_epoch


def save_base(
    config: Config, folder: Path, dialogues: dict[str, list[Dialogue]], mesh: Mesh
) -> tuple[gpt2.GPT2Config, Any, Any]:
    """`make_base` on the corpora of config.pretrain -> folder/base/model, with a note of what it has learnt from."""
    corpora = [run.read_data(data, config.seed) for data in config.pretrain.data] if config.pretrain else []
    made = make_base(config, folder, dialogues, corpora, mesh)
    started_from = None if config.model.name is None else locate.find(config.model.name).folder
    origin.note(folder / "base" / "model", config, [d for c in corpora for d in c["train"]], started_from)
    weights.save_pretrained(folder / "base" / "model", *made)
    return made


def make_base(
    config: Config,
    folder: Path,
    dialogues: dict[str, list[Dialogue]],
    corpora: list[dict[str, list[Dialogue]]],
    mesh: Mesh,
) -> tuple[gpt2.GPT2Config, Any, Any]:
    """The model before SFT, with rows for the prompt's special tokens -> (GPT2Config, params, tokenizer)."""
    saved = folder / "base" / "model"
    name = config.tokenizer.name or config.model.name
    learnt = {"pretrain.data": [dataclasses.asdict(d) for d in config.pretrain.data]} if config.pretrain else {}
    made_from = {"vocab_size": config.tokenizer.vocab_size, "seed": config.seed} | (
        learnt or {"data": dataclasses.asdict(config.data)}
    )
    if name is not None:
        tokenizer = prompts.load_tokenizer(name)
    elif processes.shared((saved / "tokenizer.json").is_file()):  # a restart: ids must mean what they meant
        check_tokenizer(saved, made_from)
        tokenizer = prompts.load_tokenizer(files.fetched(saved))
    else:
        texts = [prompts.plain_text(d.turns) for corpus in corpora or [dialogues] for d in corpus["train"]]
        tokenizer = prompts.train_tokenizer(texts, config.tokenizer.vocab_size)
    prompts.add_special_tokens(tokenizer)
    if processes.is_writer():
        with files.staged(saved, last="tokenizer.json") as here:
            files.write_json(here / TOKENIZER_ORIGIN, made_from if name is None else {"name": name})
            weights.save_tokenizer(here, tokenizer)

    if config.model.name is not None:
        gpt2_config, params = weights.load_pretrained(config.model.name)
        if gpt2_config.eos_token_id != tokenizer.eos_token_id:
            raise weights.WeightsError(
                f"the model ends with token {gpt2_config.eos_token_id}, the tokenizer with {tokenizer.eos_token_id}"
            )
    else:
        sizes = config.model
        gpt2_config = gpt2.GPT2Config(
            vocab_size=min(tokenizer.convert_tokens_to_ids(list(prompts.SPECIAL_TOKENS))),  # without the special tokens
            n_positions=sizes.n_positions,
            n_embd=sizes.n_embd,
            n_layer=sizes.n_layer,
            n_head=sizes.n_head,
            eos_token_id=tokenizer.eos_token_id,
        )
        params = gpt2.init(gpt2_config, jax.random.fold_in(jax.random.key(config.seed), 0))
    how = {"dropout": config.model.dropout, "compute_dtype": run.compute_dtype(config), "remat": config.model.remat}
    gpt2_config = dataclasses.replace(gpt2_config, **how)
    console.print(f"model: {gpt2.count(params):,} parameters, {gpt2_config.n_layer} layers, width {gpt2_config.n_embd}")

    if config.pretrain is not None:
        params = pretrain(config, folder, corpora, tokenizer, gpt2_config, params, mesh)
    return *weights.resize_vocabulary(gpt2_config, params, max(len(tokenizer), gpt2_config.vocab_size)), tokenizer


def check_tokenizer(saved: Path, made_from: dict[str, Any]) -> None:
    """Raises ConfigError where the tokenizer of an earlier start was trained with other settings than today's."""
    path = saved / TOKENIZER_ORIGIN
    then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else made_from
    if differing := [f"{k} was {then.get(k)}, now {made_from[k]}" for k in made_from if then.get(k) != made_from[k]]:
        raise ConfigError(
            f"{saved}: the tokenizer there was made with other settings ({'; '.join(differing)}); set these back, or start in "
            "a new run_dir"
        )


def pretrain(
    config: Config, folder: Path, corpora: list, tokenizer: Any, gpt2_config: gpt2.GPT2Config, params: Any, mesh: Mesh
) -> Any:
    """Language modelling on plain dialogue: blocks of one long stream of conversations, every token a target."""
    training = config.pretrain
    assert training is not None
    sharding.check_divides(
        training.batch_size // training.accumulate, mesh, "pretrain.batch_size / pretrain.accumulate"
    )

    def blocks(split: str) -> np.ndarray:
        texts = (
            prompts.encode_text(tokenizer, prompts.plain_text(d.turns)) for corpus in corpora for d in corpus[split]
        )
        return batching.text_blocks(texts, tokenizer.eos_token_id, training.block_tokens)

    train, held_out = blocks("train"), blocks("validation")
    console.print(
        f"pretrain: {train.size:,} tokens in {len(train):,} blocks of {training.block_tokens}, {held_out.size:,} tokens held out"
    )
    if training.block_tokens > gpt2_config.n_positions:
        raise ConfigError(
            f"pretrain.block_tokens ({training.block_tokens}) is more than the model's {gpt2_config.n_positions} positions"
        )
    per_epoch = len(train) // training.batch_size
    if not per_epoch or not len(held_out):
        split, found = ("train", train) if not per_epoch else ("validation", held_out)
        raise ConfigError(
            f"pretrain: the {split} split has {len(found)} blocks of {training.block_tokens} tokens, a batch has "
            f"{training.batch_size}; lower pretrain.batch_size or pretrain.block_tokens, or give more data"
        )
    if len(held_out) < training.batch_size:  # one batch, in which some blocks count more than once
        held_out = np.resize(held_out, (training.batch_size, training.block_tokens))

    def batch_of(step: int, mine: np.ndarray) -> Batch:
        order = np.random.default_rng((config.seed, step // per_epoch)).permutation(len(train))
        return batching.unsupervised(train[order[step % per_epoch * training.batch_size + mine]])

    parts = [
        held_out[k : k + training.batch_size]
        for k in range(0, len(held_out) - training.batch_size + 1, training.batch_size)
    ]
    validation = [batching.unsupervised(part) for part in parts]
    sections = ("seed", "data", "model", "tokenizer", "pretrain")
    return fit(
        "base", folder, training, gpt2_config, params, batch_of, per_epoch, validation, mesh, config,
        belongs_to("base", config, sections, corpora),
    )  # fmt: skip


def belongs_to(stage: str, config: Config, sections: Sequence[str], read: Any) -> dict[str, Any]:
    """What a checkpoint of the stage goes on with, and with nothing else. read: the data."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in sections}
    settings["model"].pop("remat")  # a run may go on with other devices, and less memory
    return {"stage": stage, **settings, "content": origin.content(read)}


def fit(
    stage: str,
    folder: Path,
    training: TrainingConfig,
    gpt2_config: gpt2.GPT2Config,
    params: Any,
    batch_of: Callable[[int, np.ndarray], Batch],
    per_epoch: int,
    validation: list[Batch],
    mesh: Mesh,
    config: Config,
    identity: dict[str, Any],
) -> Any:
    """The loop of both stages: step, log, validate, save -> the parameters with the lowest validation loss."""
    began = time.monotonic()
    steps = max(round(training.epochs * per_epoch), 1)
    sharding.check_model(mesh, gpt2_config.split_sizes)
    model = gpt2.GPT2(dataclasses.replace(gpt2_config, mesh=mesh))
    tx = sft.optimizer(training, steps)
    state = sharding.make_state(mesh, functools.partial(sft.init_state, tx=tx), sharding.place(mesh, params))
    mine = sharding.my_rows(mesh, training.batch_size)
    scores: dict[int, float] = {}  # validation losses, which say what checkpoint.manager keeps beside the newest
    manager = checkpoint.manager(folder / stage / "checkpoints", "min", scores)
    restored = checkpoint.restore(manager, state, identity, say=run.warn)
    state, done, unlogged = restored or (state, 0, None)
    lines = logs.take_up(folder, stage, done)
    scores |= {step: line["validation_loss"] for step, line in lines.items() if "validation_loss" in line}
    if restored:
        console.print(f"{stage}: going on from step {done} of {steps}")

    step_program = jax.jit(
        functools.partial(sft.sft_step, model=model, tx=tx, cfg=training),
        donate_argnums=0,
        out_shardings=(sharding.shardings(mesh, state), None),
    )
    loss_program = jax.jit(functools.partial(sft.sft_loss, key=None, model=model))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)

    spread = np.linspace(0, len(validation) - 1, min(BATCHES_PER_VALIDATION, len(validation))).round().astype(int)
    judged = [validation[i] for i in spread]  # not the first ones: they are the shortest exchanges, or one corpus

    def validate(params: Any) -> float:
        sums = [
            loss_program(params, sharding.split_batch(mesh, batching.without_mask(batch)))
            for batch in (jax.tree.map(lambda x: x[mine], whole) for whole in judged)
        ]
        return float(sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums))

    def ids(batch: Batch) -> dict[str, list[list[int]]]:
        assert batch.attention_mask is not None
        return {"tokens": [row[kept].tolist() for row, kept in zip(batch.tokens, batch.attention_mask, strict=True)]}

    def is_evaluated(step: int) -> bool:
        return step % training.eval_every == 0 or step == steps

    def complete(step: int, line: dict[str, Any]) -> None:
        """Evaluate the state that is saved as `step`, where it is due, and write the log line."""
        if is_evaluated(step):
            with stopping.at_once():
                line["validation_loss"] = scores[step] = logs.plain(validate(state.params))
        logs.log(folder, stage, step, line, began)

    with (
        logs.noting(folder, stage, began),
        run.progress(stage, steps, done) as advance,
        stopping.deferred(),
    ):
        if unlogged is not None and done not in lines:
            complete(done, unlogged)
        for step in range(done, steps):
            batch = sharding.split_batch(mesh, batching.without_mask(batch_of(step, mine)))
            state, metrics = step_program(state, batch, key)
            finished, line = step + 1, None
            if finished % training.log_every == 0 or finished == 1 or is_evaluated(finished):
                line = {"epoch": finished / per_epoch, **jax.device_get(metrics)}
                line = {name: logs.plain(value) for name, value in line.items()}
            stop = stopping.wanted(now=line is not None)
            bad = line is not None and line["bad_in_a_row"] >= training.max_bad_updates
            if is_evaluated(finished) or stop or bad:
                logs.copy_logs(folder)
                checkpoint.save(manager, finished, state, identity, line)
            if line is not None:
                complete(finished, line)
                run.release_freed_memory()
                advance(finished, **{k: v for k, v in line.items() if "loss" in k})
            if bad and line is not None:
                logs.copy_logs(folder)
                run.give_up(folder, stage, finished, line, ids(batch_of(step, np.arange(training.batch_size))))
            if stop:
                logs.copy_logs(folder)
                raise stopping.Stopped(f"{stage}: stopped by {stop} at step {finished} of {steps}, saved")
    logs.copy_logs(folder)

    best = checkpoint.best(processes.shared(list(manager.all_steps())), scores, "min")
    if best != steps:
        restored = checkpoint.restore(manager, state, identity, checkpoint.ranking(scores, "min"), run.warn)
        assert restored is not None
        state, best, _ = restored
    lowest = scores.get(best, math.nan)
    console.print(f"{stage}: validation loss {lowest:.4f} at step {best}, the best; {time.monotonic() - began:.0f} s")
    manager.close()
    if done < steps or not logs.is_noted(folder, stage):
        logs.note_environment(folder, stage, time.monotonic() - began)
    return sharding.fetch(state.params)


if __name__ == "__main__":
    run.main(report.after(main), __doc__)
