"""One client sentence through one whole PPO iteration: every array by name, shape and meaning, in the order of the files.

Everything that is shown was computed by the functions that train, on the models of run_dir; where it holds none, on a tiny
model that has learnt nothing. Nothing is written to run_dir.

    python scripts/walkthrough.py --config configs/quickstart.yaml --text "My sister stopped calling me." --emotion sadness

--text TEXT (default: an exchange of the test split) and --emotion WORD (of the client; default: neutral) are this script's
own; all other options are those of the config.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from therapy_jax import run
from therapy_jax.config import Config, MeshConfig
from therapy_jax.dialogue import EMOTIONS, Dialogue, Exchange, Turn, exchanges

REPLIES = 4  # to the one prompt
SHORT = 12  # tokens a reply of the model that has learnt nothing: there is no more to see in a longer one
console = Console(width=min(Console().width, 100) if sys.stdout.isatty() else 100, highlight=False, markup=False)


def main(config: Config, text: str | None, emotion: str | None) -> None:
    import jax

    from therapy_jax import loupe, ppo

    ppo.check(config.sampling)
    run.use_cache(config)
    dialogues = run.read_data(config.data, config.seed)
    with models(config, dialogues) as (folder, config):
        few: dict[str, Any] = {
            "estimator": "gae",
            "batch_size": REPLIES,
            "replies_per_prompt": REPLIES,
            "minibatches": 1,
        }
        asked, config = config.ppo.estimator, loupe.for_one_iteration(config, **few)
        data = {split: [e for d in part for e in exchanges(d)] for split, part in dialogues.items()}
        bench = loupe.load(folder, config, data)
        exchange, where = choose(data, text, emotion)
        say(
            f"{REPLIES} replies to one prompt, estimator gae, so that each step has something to show; the config says {asked}."
        )
        if len(jax.devices()) > 1:
            say("One device is used, however many there are.")
        walk(bench, config, exchange, where)


def walk(bench: Any, config: Config, exchange: Exchange, where: str) -> None:
    """The iteration, from the exchange to the loupe. bench: loupe.Bench."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from therapy_jax import gpt2, loupe, ppo, sampling
    from therapy_jax.advantages import gae, grpo, masked_mean, rloo, shape_rewards, whiten
    from therapy_jax.rewards import batch as reward_batch
    from therapy_jax.rewards.combine import init_stats

    model, state, cfg, tokenizer = bench.model, bench.state, config.ppo, bench.tokenizer
    temperature, key = config.sampling.temperature, jax.random.key(config.seed)
    how: dict[str, Any] = {"model": model, "cfg": cfg, "temperature": temperature}

    title("The exchange", "dialogue.py")
    say(f"A client turn, the turns before it, and the therapist's reply to it. {where}")
    for turn in exchange.context:
        row(f"context, {turn.speaker}", turn.text)
    row("client", exchange.client.text)
    row("client's emotion", exchange.client.emotion or "not annotated")
    row("therapist", exchange.therapist.text)
    row("stated emotion", exchange.therapist.emotion or "not annotated")

    title("The prompt", "prompts.py, batching.py")
    prompt, references = loupe.ask(bench, config, [exchange])
    say(
        "Text becomes tokens; markers stand between the parts. Prompts are padded on the left, so that all replies of a batch"
    )
    say("start in the same column. The mask comes from lengths, never from ids.")
    array("prompt.tokens", prompt.tokens, "ids; the oldest whole context turns go first where there is no room")
    array("prompt.mask", prompt.mask, f"True = a real token: {int(prompt.mask.sum())} of {prompt.mask.size}")
    ids = prompt.tokens[0][prompt.mask[0]].tolist()
    say("|".join(shown(word) for word in loupe.words_of(tokenizer, ids)), indent=2)

    title("Prefill: the prompt is read once", "gpt2.py, sampling.py")
    times, room = cfg.replies_per_prompt, config.sampling.max_new_tokens
    prefill = loupe.once(functools.partial(sampling.prefill, times=times, room=room, model=model))
    hidden, cache = prefill(state.params["policy"], prompt)
    say(
        f"Each layer keeps its keys and values, so that a new token costs one step and not the whole text again. The {times} replies"
    )
    say("share the prompt: it is read once and its cache copied.")
    array("hidden", hidden, "state at the prompt's end, which predicts the first token of the reply")
    for name, meaning in meanings(gpt2.KVCache).items():
        array(f"cache.{name}", getattr(cache, name), meaning)

    title("The replies", "sampling.py, ppo.rollout")
    reply, batch, raw = loupe.answer(bench, config, [exchange], prompt, references, key)
    say(
        f"Token by token from softmax(logits / {temperature:g}), each reply with random numbers of its own, until EOS or the limit."
    )
    for name, meaning in meanings(sampling.Reply).items():
        array(f"reply.{name}", getattr(reply, name), meaning)
    mask = np.asarray(reply.mask)
    ids = [np.asarray(reply.tokens)[i][mask[i]].tolist() for i in range(REPLIES)]
    for i in range(REPLIES):
        row(f"reply {i}", shown("".join(loupe.words_of(tokenizer, ids[i]))))
    words = loupe.words_of(tokenizer, ids[0])
    say("From here on values are those of reply 0; every array has a row for each reply.")

    title("What the reward terms read", "rewards/batch.py, rewards/words.py")
    say("Sub-words are folded into words on the device, meanings are read by the frozen SFT model.")
    for name, meaning in meanings(reward_batch.RewardBatch).items():
        if name != "frozen":
            array(f"batch.{name}", getattr(batch, name), meaning)

    title("The terms, raw and weighted, and the score", "rewards/combine.py")
    say("Every term gives one number a reply. score = sum of weight * term.")
    if config.rewards.standardise:
        say("rewards.standardise: each term enters as (value - mean) / sd of all its values so far.")
    state = state._replace(reward_stats=init_stats(raw))
    bench = bench._replace(state=state)
    scores, _, _ = loupe.combine_fn(bench, config)(raw, state.reward_stats)
    columns = [["term", "weight", *(f"reply {i}" for i in range(REPLIES)), "weighted, reply 0"]]
    for name, values in sorted(raw.items()):
        one = {other: x if other == name else jnp.zeros_like(x) for other, x in raw.items()}
        part, _, _ = loupe.combine_fn(bench, config)(one, state.reward_stats)  # the score were this the only term
        weight = bench.scorer.weights.get(name, 1.0)
        columns.append([name, f"{weight:g}", *(f"{number(x)}" for x in values), number(part[0], sign=True)])
    columns.append(["score", "", *(number(x) for x in scores), number(scores[0], sign=True)])
    grid(columns)
    array("scores", scores, "their sum; the update only sees differences between replies")

    title("The policy beside the reference: KL", "ppo.read_both, head.py")
    read_both = loupe.once(ppo.read_both, static_argnames=("model", "cfg", "temperature"))
    logprobs, entropy, ref_logprobs, values = read_both(state, prompt, reply.tokens, reply.mask, **how)
    kl = jnp.where(reply.mask, logprobs - ref_logprobs, 0.0)
    k3 = jnp.where(reply.mask, jnp.exp(-kl) - 1 + kl, 0.0)
    say(
        "Both models read the whole reply at once and say how likely each token was. k1 = logprob - ref_logprob shapes the reward;"
    )
    say("k3 = exp(-k1) - 1 + k1 is never negative, and logged.")
    array("logprobs", logprobs, "nats; recomputed by the function that the update uses, so that its ratio starts at 1")
    array("ref_logprobs", ref_logprobs, "nats, of the frozen SFT policy")
    array("entropy", entropy, "nats, of the policy's whole distribution at each token")
    row("k1, k3 of reply 0", f"{float(kl[0].sum()):.4f}, {float(k3[0].sum()):.4f} nats, summed over its tokens")
    gap = float(jnp.abs(reply.logprobs - logprobs).max())
    row("sampler gap", f"{gap:.1e} nats: the most that the sampler's own log-probs differ from these")
    if bench.stage == "sft":
        say("The policy has not moved yet: it is the reference, and the KL is 0.")

    title("Shaped rewards", "advantages.shape_rewards")
    rewards = shape_rewards(scores, kl, reply.mask, kl_coef=state.kl_coef)
    beta = float(state.kl_coef)
    say("A token costs beta * k1; the score lands on the last token.")
    array("rewards", rewards, f"-beta * k1, beta = {beta:g}, + score at the end")
    total, score, spent = float(rewards[0].sum()), float(scores[0]), float(kl[0].sum())
    row("sum of rewards", f"{total:.6f}")
    row("score - beta * KL", f"{score:.6f} - {beta:g} * {spent:.6f} = {score - beta * spent:.6f}   (the same)")

    title("Values and generalised advantages", "ppo.read, advantages.gae")
    advantages, returns = gae(rewards, values, reply.mask, gamma=cfg.gamma, lam=cfg.lam)
    say(
        f"A(t) = r(t) + gamma V(t+1) - V(t) + gamma lambda A(t+1), from the last token up; gamma {cfg.gamma:g}, lambda {cfg.lam:g}."
    )
    say("Read the table from its last row: each row takes V and A of the row below, 0 behind the end.")
    if not np.asarray(values).any():
        say("The critic starts at 0: advantages are the rewards to come, and nothing else.")
    array("values", values, "the critic's guess of the rewards to come, before the token is written")
    array("advantages", advantages, "how much better than that guess it went")
    array("returns", returns, "advantages + values: what the critic learns")
    n = len(words)
    following = [[*(float(x) for x in column[0][1:n]), 0.0] for column in (values, advantages)]
    rows = [["t", "token", "r(t)", "V(t)", "V(t+1)", "A(t+1)", "A(t)"]]
    for t in range(n):
        numbers = (rewards[0, t], values[0, t], following[0][t], following[1][t], advantages[0, t])
        rows.append([str(t), shown(words[t]), *map(number, numbers)])
    grid(rows, text=(1,))

    title("Whitened advantages", "advantages.whiten")
    white = whiten(advantages, reply.mask)
    spread = (masked_mean(jnp.square(x - masked_mean(x, reply.mask)), reply.mask) ** 0.5 for x in (advantages, white))
    before, after = (
        f"mean {float(masked_mean(x, reply.mask)):.3f}, sd {float(sd):.3f}"
        for x, sd in zip((advantages, white), spread, strict=True)
    )
    say(f"Over all {int(mask.sum())} tokens of all replies: {before} -> {after}.")
    say("" if cfg.whiten else "ppo.whiten is off: the update takes them as they are.")
    array("whitened", white, "what the loss takes")
    say("Without a critic the other replies to the prompt are the baseline, and each token of a reply gets the same:")
    sums = rewards.sum(1)
    row("RLOO, by reply", ", ".join(number(x) for x in rloo(sums, REPLIES)))
    row("GRPO, by reply", ", ".join(number(x) for x in grpo(sums, REPLIES)))

    title("The loss, before the first step", "ppo.ppo_loss")
    judge = loupe.once(ppo.judge, static_argnames=("model", "cfg", "temperature"))
    rollout, _ = judge(state, prompt, reply, scores, **how)
    loss_fn = loupe.once(ppo.ppo_loss, static_argnames=("model", "cfg", "temperature"))
    _, metrics = loss_fn(state.params, rollout, **how)
    say(
        f"ratio = exp(logprob - old_logprob); loss = -mean min(ratio A, clip(ratio, {1 - cfg.clip:g}, {1 + cfg.clip:g}) A)"
    )
    say(
        f"+ {cfg.value_coef:g} * value loss - {cfg.entropy_coef:g} * entropy. All that the update needs is in one Rollout:"
    )
    for name, meaning in meanings(ppo.Rollout).items():
        if name not in ("prompt",):
            array(f"rollout.{name}", getattr(rollout, name), meaning)
    row("largest |ratio - 1|", f"{float(metrics['ratio_gap']):.1e}: nothing has moved yet")
    for name in ("policy_loss", "value_loss", "loss"):
        row(name, f"{float(metrics[name]):.6f}")

    title("The update", "ppo.learn, ppo.ppo_update")
    learnt, metrics = loupe.improve(bench, config, prompt, reply, raw, key)
    say(
        f"{cfg.epochs} pass{'es' * (cfg.epochs > 1)} over the replies, one step each: clip the gradient to norm {cfg.max_grad_norm:g}, then AdamW at {cfg.learning_rate:.2g}."
    )
    explain = {
        "grad_norm": "of all parameters, before it is clipped; mean over the steps, like the next three",
        "policy_loss": "of the loss above",
        "value_loss": "half the squared error of the critic",
        "clip_fraction": f"share of tokens whose ratio has left [{1 - cfg.clip:g}, {1 + cfg.clip:g}]",
        "ratio_gap_start": "largest |ratio - 1| of the first step",
        "ratio_gap": "and of any step, before it is taken",
        "skipped": f"steps left out, since the policy had moved by more than ppo.max_update_kl ({cfg.max_update_kl})",
    }
    for name, meaning in explain.items():
        row(name, f"{float(metrics[name]):.4g}   {meaning}")
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), learnt.params["policy"], state.params["policy"])
    row(
        "largest change",
        f"{max(float(x) for x in jax.tree.leaves(moved)):.2g} in a parameter of the policy; {gpt2.count(learnt.params['policy']):,} there are",
    )

    title("The loupe: reply 0 after the update", "loupe.py")
    look = loupe.once(loupe.look, static_argnames=("model", "cfg", "temperature"))
    seen = look(state, learnt, prompt, reply, scores, **how)
    one = loupe.of_reply(seen, reply.mask, 0)
    say(
        "Where the advantage is above 0 the ratio should be above 1, and below where it is below. All tokens share the weights, so"
    )
    say("that a token may also be carried along by the others.")
    strip(words, one.advantages)
    rows = [["token", *(name.replace("_", " ") for name in loupe.Loupe._fields)]]
    rows += [[shown(word), *(number(x[t]) for x in one)] for t, word in enumerate(words)]
    grid(rows, text=(0,))
    right = int(((one.ratio > 1) == (one.advantages > 0)).sum())
    say(
        f"The ratio went where the advantage asked for on {right} of {n} tokens. This was one iteration; {config.ppo.iterations} make a run."
    )


# ------------------------------------------------------------------------------------------ where models and text come from


@contextlib.contextmanager
def models(config: Config, dialogues: dict[str, list[Dialogue]]) -> Iterator[tuple[Path, Config]]:
    """-> (a folder with sft/model, the config that belongs to it): run_dir, or one that lasts as long as this script."""
    folder = run.as_path(config.run_dir)
    if (folder / "sft" / "model" / "model.safetensors").is_file():
        trained = "SFT and PPO" if (folder / "ppo" / "model" / "model.safetensors").is_file() else "SFT"
        say(f"Models: {folder}, after {trained}.")
        yield folder, config
        return
    import train_sft  # scripts/train_sft.py

    from therapy_jax import sharding, weights

    say(
        f"{folder} holds no SFT model (scripts/train_sft.py makes one): a model that has LEARNT NOTHING walks instead. Its words"
    )
    say("are noise; every number is computed as it would be in training.")
    reader = dataclasses.replace(config.classifiers, epochs=1, members=1)
    short = dataclasses.replace(config.sampling, max_new_tokens=min(config.sampling.max_new_tokens, SHORT))
    config = dataclasses.replace(config, pretrain=None, classifiers=reader, sampling=short, mesh=MeshConfig(data=1))
    with tempfile.TemporaryDirectory() as name:
        made = train_sft.make_base(config, Path(name), dialogues, sharding.make_mesh(config.mesh))
        weights.save_pretrained(Path(name) / "sft" / "model", *made)
        yield Path(name), config


def choose(data: dict[str, list[Exchange]], text: str | None, emotion: str | None) -> tuple[Exchange, str]:
    """The exchange to walk, and a sentence on where it comes from."""
    if text is None:
        known = next((data[split] for split in ("test", "validation", "train") if data.get(split)), [])
        exchange = next((e for e in known if len(e.context) == 2), known[0])
        client = exchange.client if emotion is None else dataclasses.replace(exchange.client, emotion=emotion)
        return dataclasses.replace(exchange, client=client), "This one is from held-out data."
    from therapy_jax import baselines

    client = Turn("client", text, emotion or "neutral")
    asked = Exchange("walkthrough", (), client, Turn("therapist", ""))
    (nearest,) = baselines.retrieval(data["train"], [asked])
    where = "Nobody has answered yours yet: the reply to the nearest client of train stands in, since rewards compare with one."
    return dataclasses.replace(asked, therapist=nearest), where


def take_own(argv: list[str]) -> tuple[str | None, str | None, list[str]]:
    """--text and --emotion -> (text, emotion, what is left for the parser of the config)."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE.yaml] [--text TEXT] [--emotion WORD] [--section.name VALUE ...]",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--text")
    parser.add_argument("--emotion", choices=EMOTIONS)
    known, rest = parser.parse_known_args(argv)
    if known.text is not None and not known.text.strip():
        parser.error("--text is empty; give a sentence, such as --text 'My sister stopped calling me.'")
    return known.text, known.emotion, rest


# --------------------------------------------------------------------------------------------------------------- printing


_section = 0


def title(text: str, file: str) -> None:
    global _section
    _section += 1
    console.print()
    console.print(Text.assemble((f"{_section}. {text}", "bold"), "  ", (file, "dim")))


def say(text: str, indent: int = 0) -> None:
    if text:
        console.print(Text(" " * indent + text))


def row(name: str, value: str) -> None:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=24)
    line.add_column(overflow="fold")
    line.add_row(Text("  " + name, style="cyan"), Text(value))
    console.print(line)


def array(name: str, x: Any, meaning: str) -> None:
    """Name, dtype and shape, meaning."""
    dtype = re.sub(r"^(float|int|uint)", lambda m: m[1][0], str(x.dtype))
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=24, no_wrap=True)
    line.add_column(width=17, no_wrap=True)
    line.add_column(overflow="fold")
    shape = f"{dtype}[{','.join(map(str, x.shape))}]"
    line.add_row(Text("  " + name, style="cyan"), Text(shape, style="green"), Text(meaning, style="dim"))
    console.print(line)


def grid(rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> None:
    """Head and rows; numbers to the right, the first column and `text` to the left."""
    out = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(rows[0]):
        out.add_column(
            Text(name),
            justify="left" if i == 0 or i in text else "right",
            max_width=24 if i in text else None,
            overflow="fold",
        )
    for cells in rows[1:]:
        out.add_row(*map(Text, cells))
    console.print(out)


def strip(words: Sequence[str], advantages: Any) -> None:
    """The tokens of a reply, blue where more of them is wanted, orange where less."""
    line, most = Text("  "), max(abs(float(x)) for x in advantages) or 1.0
    for word, x in zip(words, advantages, strict=True):
        strength = abs(float(x)) / most
        far = (86, 180, 233) if x > 0 else (230, 159, 0)
        red, green, blue = (round(255 + (c - 255) * strength) for c in far)
        line.append(shown(word), style=f"black on rgb({red},{green},{blue})")
    console.print(line)


def shown(word: str) -> str:
    """A token for the screen: no line break, no control character."""
    return "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in word) or "·"


def number(x: Any, sign: bool = False) -> str:
    value = round(float(x), 4) + 0.0  # no minus before nothing
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def meanings(kind: type) -> dict[str, str]:
    """The fields of a NamedTuple and the comments that stand beside them in the source."""
    return {
        name: comment
        for name, comment in re.findall(r"^    (\w+): [^#\n]+?(?:  # (.*))?$", inspect.getsource(kind), re.M)
    }


if __name__ == "__main__":
    own_text, own_emotion, sys.argv[1:] = take_own(sys.argv[1:])
    run.main(functools.partial(main, text=own_text, emotion=own_emotion), __doc__ or "")
