"""One client sentence through one whole PPO iteration: every array by name, shape and meaning, in the order of the files.

Everything that is shown was computed by the functions that train, on the models of run_dir; where it holds none, on a tiny
model that has learnt nothing. Nothing is written to run_dir but classifiers, where it holds none yet.

    python scripts/walkthrough.py --config configs/quickstart.yaml --text "My sister stopped calling me." --emotion sadness
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from therapy_jax import files, run, safety
from therapy_jax.cleaning import clean_line
from therapy_jax.config import Config, ConfigError, MeshConfig
from therapy_jax.dialogue import EMOTIONS, Dialogue, Exchange, Turn, exchanges

REPLIES = 4  # to the one prompt
SHORT = 12  # tokens a reply of the model that has learnt nothing: there is no more to see in a longer one
console = Console(width=min(Console().width, 100) if sys.stdout.isatty() else 100, highlight=False, markup=False)


@dataclass(frozen=True)
class Options:
    text: str | None = None
    """What the client says; null = an exchange of the test split."""
    emotion: str | None = None
    """What the client feels, one word of dialogue.EMOTIONS; null = as annotated, or neutral."""


def main(config: Config, options: Options) -> None:
    import jax

    from therapy_jax import loupe, ppo

    ppo.check(config.sampling)
    if options.emotion not in (None, *EMOTIONS):
        raise ConfigError(f"--emotion {options.emotion!r} is none of the emotions: {', '.join(EMOTIONS)}")
    if options.text is not None:
        options = dataclasses.replace(options, text=clean_line(options.text))  # as models read it, the gate reads it
    if options.text == "":
        raise ConfigError("--text is empty; give a sentence, such as --text 'My sister stopped calling me.'")
    if options.text is not None:
        say(safety.DISCLOSURE)
        if found := safety.crisis(options.text):  # before any model reads it
            say(safety.answer(found.kind, config.safety))
            return
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
        exchange, where = choose(data, options.text, options.emotion)
        say(f"""{REPLIES} replies to one prompt, with estimator gae, so that each step has something to show (the config says
            {asked}).""")
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
        row(f"context, {turn.speaker}", shown(turn.text))
    row("client", shown(exchange.client.text))
    row("client's emotion", exchange.client.emotion or "not annotated")
    row("therapist", shown(exchange.therapist.text))
    row("therapist's emotion", exchange.therapist.emotion or "not annotated")

    title("The prompt", "prompts.py, batching.py")
    say("""Text becomes tokens, with markers between the parts. Prompts are padded on the left, so that all replies of a batch
        start in the same column. The mask comes from lengths, never from ids.""")
    prompt, references = loupe.ask(bench, config, [exchange])
    for name, meaning in meanings(type(prompt)).items():
        array(f"prompt.{name}", getattr(prompt, name), meaning)
    ids = prompt.tokens[0][prompt.mask[0]].tolist()
    row("tokens that count", f"{len(ids)} of {prompt.mask.size}")
    say("|".join(shown(word) for word in loupe.words_of(tokenizer, ids)), indent=2)

    title("Prefill: the prompt is read once", "gpt2.py, sampling.prefill")
    times, room = cfg.replies_per_prompt, config.sampling.max_new_tokens
    say(f"""Each layer keeps its keys and values, so that a new token costs one step and not the whole text again. The {times}
        replies share the prompt: it is read once, and its cache copied.""")
    prefill = loupe.once(functools.partial(sampling.prefill, times=times, room=room, model=model))
    hidden, cache = prefill(state.params["policy"], prompt)
    array("hidden", hidden, "[B, D] the state at the prompt's end, which predicts the first token of the reply")
    for name, meaning in meanings(gpt2.KVCache).items():
        array(f"cache.{name}", getattr(cache, name), meaning)

    title("The replies", "sampling.generate, ppo.rollout")
    say(f"""Token by token from softmax(logits / {temperature:g}), each reply with random numbers of its own, until EOS or the
        limit of {room} tokens.""")
    reply, batch, raw = loupe.answer(bench, config, [exchange], prompt, references, key)
    for name, meaning in meanings(sampling.Reply).items():
        array(f"reply.{name}", getattr(reply, name), meaning)
    mask = np.asarray(reply.mask)
    replies = [
        loupe.words_of(tokenizer, row[counts].tolist())
        for row, counts in zip(np.asarray(reply.tokens), mask, strict=True)
    ]
    if any(safety.check_reply("".join(words)) for words in replies):
        say(f"{safety.WITHHELD} The walk ends here; another --seed draws other replies.")
        return
    for i, words in enumerate(replies):
        row(f"reply {i}", shown("".join(words)))
    words = replies[0]
    tokens = [shown(word) for word in words]
    say("Every array has a row for each reply. From here on, what is shown token by token is reply 0.")

    title("What the reward terms read", "rewards/batch.py, rewards/words.py")
    say("Sub-words are folded into words on the device. What a text means is read by the frozen SFT model.")
    for name, meaning in meanings(reward_batch.RewardBatch).items():
        if name != "frozen":
            array(f"batch.{name}", getattr(batch, name), meaning)

    title("The terms, raw and weighted, and the score", "rewards/combine.py")
    say("Every term gives one number a reply. score = sum of weight * term.")
    if config.rewards.standardise:
        say("rewards.standardise: each term enters as (value - mean) / sd of all its values so far.")
    combine = loupe.combine_fn(bench, config)
    state = state._replace(reward_stats=init_stats(raw))
    bench = bench._replace(state=state)
    scores, _, _ = combine(raw, state.reward_stats)
    rows = [["term", "weight", *(f"reply {i}" for i in range(times)), "weighted, reply 0"]]
    for name, values in sorted(raw.items()):
        alone = {other: x if other == name else jnp.zeros_like(x) for other, x in raw.items()}
        part = combine(alone, state.reward_stats)[0]  # the score, were this the only term
        rows.append(
            [name, f"{bench.scorer.weights.get(name, 1.0):g}", *map(number, values), number(part[0], sign=True)]
        )
    table([*rows, ["score", "", *map(number, scores), number(scores[0], sign=True)]])
    array("scores", scores, "[B] the update sees only by how much they differ")

    title("Policy and reference: KL", "ppo.read_both, head.py")
    say("""Both models read the whole reply at once and say how likely each token was. k1 = logprob - ref_logprob shapes the
        reward; k3 = exp(-k1) - 1 + k1, which is never negative, is logged.""")

    def before_the_update(state, prompt, reply, scores):  # one program for all that is known before the first step
        rollout, seen = ppo.judge(state, prompt, reply, scores, **how)
        loss = ppo.ppo_loss(state.params, rollout, **how)[1]
        return ppo.read_both(state, prompt, reply.tokens, reply.mask, **how), rollout, seen, loss

    (logprobs, entropy, ref_logprobs, values), rollout, seen, loss = loupe.once(before_the_update)(
        state, prompt, reply, scores
    )
    kl = jnp.where(reply.mask, logprobs - ref_logprobs, 0.0)
    array("logprobs", logprobs, "[B, R] nats; recomputed as the update computes them, so that its ratio starts at 1")
    array("ref_logprobs", ref_logprobs, "[B, R] nats, of the frozen SFT policy")
    array("entropy", entropy, "[B, R] nats, of the policy's whole distribution at each token")
    array("kl", kl, "[B, R] nats, k1")
    row(
        "KL a reply",
        f"k1 {float(seen['kl']):.4f}, k3 {float(seen['kl_k3']):.4f} nats: sums over tokens, mean over replies",
    )
    row(
        "sampler gap",
        f"{float(seen['sampler_gap']):.1e} nats: how far the sampler's own log-probs are from these, on average",
    )
    if bench.stage == "sft":
        say("The policy has not moved yet: it is the reference, and the KL is 0.")

    title("Shaped rewards", "advantages.shape_rewards")
    beta, spent, score = float(state.kl_coef), float(kl[0].sum()), float(scores[0])
    say(f"A token costs beta * k1, beta = {beta:g}. The score lands on the last token.")
    rewards = shape_rewards(scores, kl, reply.mask, kl_coef=state.kl_coef)
    array("rewards", rewards, "[B, R] they sum to score - beta * KL:")
    columns = (logprobs, ref_logprobs, kl, rewards)
    rows = [[str(t), token, *(number(x[0, t]) for x in columns)] for t, token in enumerate(tokens)]
    sums = ["", "sum", *(number(x[0].sum()) for x in columns)]
    table([["t", "token", "logprob", "ref_logprob", "k1", "reward"], *rows, sums], text=(1,))
    row("sum of rewards", f"{float(rewards[0].sum()):.6f}")
    row("score - beta * KL", f"{score:.6f} - {beta:g} * {spent:.6f} = {score - beta * spent:.6f}")

    title("Values, and generalised advantages", "ppo.read, advantages.gae")
    say(f"""A(t) = r(t) + gamma V(t+1) - V(t) + gamma lambda A(t+1), from the last token up, with gamma {cfg.gamma:g} and
        lambda {cfg.lam:g}. Read the table from its last row: each row takes V and A of the row below it, and 0 behind the end.""")
    if not np.asarray(values).any():
        say("The critic starts at 0, so that advantages are the rewards to come and nothing else.")
    advantages, returns = gae(rewards, values, reply.mask, gamma=cfg.gamma, lam=cfg.lam)
    array("values", values, "[B, R] the critic's guess of the rewards to come, before the token is written")
    array("advantages", advantages, "[B, R] by how much it went better than that guess")
    array("returns", returns, "[B, R] advantages + values: what the critic learns")
    rows = [["t", "token", "r(t)", "V(t)", "V(t+1)", "A(t+1)", "A(t)"]]
    for t, token in enumerate(tokens):
        below = (values[0, t + 1], advantages[0, t + 1]) if t + 1 < len(tokens) else (0.0, 0.0)
        rows.append([str(t), token, *map(number, (rewards[0, t], values[0, t], *below, advantages[0, t]))])
    table(rows, text=(1,))

    title("Whitened advantages", "advantages.whiten")
    white = whiten(advantages, reply.mask)

    def spread(x):
        mean = masked_mean(x, reply.mask)
        return f"mean {number(mean)}, sd {number(jnp.sqrt(masked_mean(jnp.square(x - mean), reply.mask)))}"

    say(f"Over all {int(mask.sum())} tokens of all replies: {spread(advantages)} -> {spread(white)}.")
    if not cfg.whiten:
        say("ppo.whiten is off: the update takes them as they were.")
    array("whitened", white, "[B, R] what the loss takes")
    say("Without a critic the other replies to the prompt are the baseline, and each token of a reply gets the same:")
    sums = rewards.sum(1)
    row("rloo, by reply", ", ".join(map(number, rloo(sums, times))))
    row("grpo, by reply", ", ".join(map(number, grpo(sums, times))))

    title("The loss, before the first step", "ppo.ppo_loss")
    near = f"clip(ratio, {1 - cfg.clip:g}, {1 + cfg.clip:g})"
    say(f"""ratio = exp(logprob - old_logprob); loss = -mean min(ratio A, {near} A) + {cfg.value_coef:g} * value loss
        - {cfg.entropy_coef:g} * entropy. All that the update needs is in one Rollout:""")
    for name, meaning in meanings(ppo.Rollout).items():
        if name != "prompt":
            array(f"rollout.{name}", getattr(rollout, name), meaning)
    row("largest |ratio - 1|", f"{float(loss['ratio_gap']):.1e}: nothing has moved yet")
    for name in ("policy_loss", "value_loss", "loss"):
        if name in loss:
            row(name, f"{float(loss[name]):.6f}")

    title("The update", "ppo.learn, ppo.ppo_update")
    say(f"""Passes over the replies: {cfg.epochs}, one optimizer step each. The gradient is clipped to norm
        {cfg.max_grad_norm:g}; AdamW steps at {cfg.learning_rate:.2g}, a tenth of the config's peak, where a run ends: an
        optimizer without moments takes large steps.""")
    learnt, metrics = loupe.improve(bench, config, prompt, reply, raw, key)
    explain = {
        "grad_norm": "of all parameters, before clipping; mean over the steps, like the next three",
        "policy_loss": "of the loss above",
        "value_loss": "half the squared error of the critic",
        "clip_fraction": f"share of tokens whose ratio has left [{1 - cfg.clip:g}, {1 + cfg.clip:g}]",
        "ratio_gap_start": "largest |ratio - 1| of the first step",
        "ratio_gap": "and of any step, before it is taken",
        "skipped": f"steps left out because the policy had moved by more than ppo.max_update_kl ({cfg.max_update_kl})",
    }
    for name, meaning in explain.items():
        array(name, metrics[name], meaning, value=f"{float(metrics[name]):.4g}")
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), learnt.params["policy"], state.params["policy"])
    count = gpt2.count(learnt.params["policy"])
    row("largest change", f"{max(jax.tree.leaves(changes)):.2g}, in one of the policy's {count:,} parameters")

    title("The loupe: reply 0 after the update", "loupe.py")
    say("""Where the advantage is above 0 the ratio should be above 1, and where it is below, below. All tokens share the
        weights, so that one may be carried along by the others.""")
    look = loupe.once(functools.partial(loupe.look, **how))
    one = loupe.of_reply(look(state, learnt, prompt, reply, scores), reply.mask, 0)
    strip(tokens, one.advantages)
    rows = [[token, *(number(x[t]) for x in one)] for t, token in enumerate(tokens)]
    table([["token", *(name.replace("_", " ") for name in one._fields)], *rows], text=(0,))
    right = int(((one.ratio > 1) == (one.advantages > 0)).sum())
    say(
        f"The ratio went where the advantage pulls on {right} of {len(words)} tokens. That was one iteration; a run has {cfg.iterations}."
    )


# ------------------------------------------------------------------------------------------ where models and text come from


@contextlib.contextmanager
def models(config: Config, dialogues: dict[str, list[Dialogue]]) -> Iterator[tuple[Path, Config]]:
    """-> (a folder with sft/model, the config that belongs to it): run_dir, or one that lasts as long as this script."""
    folder = files.as_path(config.run_dir)
    if (folder / "sft" / "model" / "model.safetensors").is_file():
        trained = "SFT and PPO" if (folder / "ppo" / "model" / "model.safetensors").is_file() else "SFT"
        say(f"Models: {folder}, after {trained}.")
        yield folder, config
        return
    import train_sft  # scripts/train_sft.py

    from therapy_jax import sharding, weights

    say(f"""{folder} holds no SFT model (scripts/train_sft.py makes one): a model that has LEARNT NOTHING walks instead. Its
        words are noise; every number is computed as it would be in training.""")
    reader = dataclasses.replace(config.classifiers, epochs=1, members=1)
    short = dataclasses.replace(config.sampling, max_new_tokens=min(config.sampling.max_new_tokens, SHORT))
    config = dataclasses.replace(config, pretrain=None, classifiers=reader, sampling=short, mesh=MeshConfig(data=1))
    with tempfile.TemporaryDirectory() as name:
        made = train_sft.make_base(config, Path(name), dialogues, [], sharding.make_mesh(config.mesh))
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


# --------------------------------------------------------------------------------------------------------------- printing


_numbers = itertools.count(1)


def title(text: str, file: str) -> None:
    console.print()
    console.print(Text.assemble((f"{next(_numbers)}. {text}", "bold"), "  ", (file, "dim")))


def say(text: str, indent: int = 0) -> None:
    """A paragraph; its lines are those of the screen, not of the source. Indented text is shown as it is."""
    console.print(Padding(Text(text), (0, 0, 0, indent)) if indent else Text(" ".join(text.split())))


def row(name: str, value: str) -> None:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=26)
    line.add_column(overflow="fold")
    line.add_row(Text("  " + name, style="cyan"), Text(value))
    console.print(line)


def array(name: str, x: Any, meaning: str, value: str | None = None) -> None:
    """Name, dtype and shape (or the value), meaning."""
    dtype = re.sub(r"^(float|int|uint)", lambda found: found[1][0], str(x.dtype))
    line = Table.grid(padding=(0, 2, 0, 0))
    for width in (26, 17, None):
        line.add_column(width=width, overflow="fold")
    what = f"{dtype}[{','.join(map(str, x.shape))}]" if value is None else value
    line.add_row(Text("  " + name, style="cyan"), Text(what, style="green"), Text(meaning, style="dim"))
    console.print(line)


def table(rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> None:
    """Head and rows; numbers to the right, the first column and `text` to the left."""
    out = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(rows[0]):
        side, width = ("left", 24) if i in text else ("left" if i == 0 else "right", None)
        out.add_column(Text(name), justify=side, max_width=width, overflow="fold")
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
    """The fields of a NamedTuple and the comments that stand beside them in the source, less the dtype."""
    found = re.findall(r"^    (\w+): [^#\n]+?(?:  # (.*))?$", inspect.getsource(kind), re.MULTILINE)
    return {name: re.sub(r"^(i32|f32|bool)(\[[\w, /]*\]),?", r"\2", comment) for name, comment in found}


if __name__ == "__main__":
    run.main(main, __doc__, Options)
