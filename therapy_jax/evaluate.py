"""Systems x metrics -> the lines of results.json.

Trained systems answer every prompt; the trivial ones (one constant reply, commonplaces, the nearest training reply, a random one) say
what a metric is worth: what a constant answer can win is shown beside what the model wins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from therapy_jax import baselines, batching, consensus, gpt2, metrics, prompts, sharding
from therapy_jax.config import PromptConfig, SamplingConfig
from therapy_jax.dialogue import EMOTIONS, Exchange, Turn
from therapy_jax.gpt2 import Params
from therapy_jax.prompts import Example, ParsedReply
from therapy_jax.rewards import combine, scoring
from therapy_jax.rewards.batch import PAD_TO, Fixed, References
from therapy_jax.rewards.combine import RewardError
from therapy_jax.sampling import Reply, generate
from therapy_jax.sft import sft_logprobs

WITHOUT_REFERENCE = ("distinct1", "distinct2", "commonest_share", "reply_words", "reply_perplexity")


class System(NamedTuple):
    """A system's answers to the exchanges, in their order."""

    texts: list[str]
    emotions: list[str | None]  # stated
    stop_rate: float
    reward: float  # mean total reward
    terms: dict[str, float]  # mean of each raw reward term
    perplexity: float | None  # of the therapist's own replies under the model; None where there is no model


class Scorer(NamedTuple):
    """What it takes to give any replies the reward that PPO was trained on."""

    trunk: Params
    model: gpt2.GPT2
    tokenizer: Any
    fixed: Fixed
    weights: dict[str, float]
    device_custom: scoring.Custom | None
    host: scoring.HostRewards


def chunks(rows: Sequence[Sequence[int]], batch_size: int, room: int, n_positions: int) -> list[tuple[list[int], int]]:
    """Rows sorted by length, in batches of exactly batch_size (the last one repeats its last row) -> [(indices, length)].
    `room` tokens must stay free behind the longest row."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    parts = [part + part[-1:] * (batch_size - len(part)) for part in parts]
    lengths = [min(batching.round_up(len(rows[part[-1]]), PAD_TO), n_positions - room) for part in parts]
    return list(zip(parts, lengths, strict=True))


def answer(
    params: Any,
    rows: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    model: gpt2.GPT2,
    cfg: SamplingConfig,
    batch_size: int,
    mesh: Mesh,
    times: int = 1,
) -> list[list[int]]:
    """N prompts (ids) -> generated ids of N * times replies, those to a prompt side by side, EOS included where it came.
    Row i draws from fold_in(key, i), whatever its batch; with times > 1 its reply c from fold_in(split(key, times)[c], i).
    A prompt is read once for all its replies, of which about batch_size are written at a time."""
    program = jax.jit(generate_rows, static_argnames=("model", "cfg", "times"))
    replies: list[list[list[int]]] = [[] for _ in rows]
    size = batching.round_up(max(batch_size // times, 1), sharding.row_shards(mesh))
    for indices, length in chunks(rows, size, cfg.max_new_tokens, model.config.n_positions):
        mine = np.asarray(indices)[sharding.my_rows(mesh, size)]
        prompt = batching.prompts([rows[i] for i in mine], length)
        split = sharding.split_batch(mesh, (prompt, mine))
        found = sharding.fetch(program(params, *split, key, model=model, cfg=cfg, times=times))
        written = [tokens[mask].tolist() for tokens, mask in zip(*found, strict=True)]
        for place, i in enumerate(indices):
            replies[i] = written[place * times : (place + 1) * times]
    return [ids for those in replies for ids in those]


def agreed_answer(
    params: Any, rows: Sequence[Sequence[int]], key: jax.Array, *, candidates: int, tokenizer: Any, **how: Any
) -> list[list[int]]:
    """`answer` to each prompt, `candidates` times; of these the one whose text the others agree with most (consensus.py)."""
    drawn = answer(params, rows, key, times=candidates, **how)
    texts = [prompts.parse_reply(tokenizer, ids).text for ids in drawn]
    starts = range(0, len(drawn), candidates)
    chosen = consensus.choose([texts[k : k + candidates] for k in starts])
    return [drawn[k + i] for k, i in zip(starts, chosen, strict=True)]


def read_emotions(
    params: Any, rows: Sequence[Sequence[int]], tokenizer: Any, *, model: gpt2.GPT2, batch_size: int, mesh: Mesh
) -> list[str]:
    """The emotion word that the model finds likeliest as the next thing after each prompt: argmax over the seven."""
    words = prompts.emotion_ids(tokenizer)
    examples = [Example(list(row), word, 0) for row in rows for word in words]
    losses = losses_of(params, examples, model=model, batch_size=batch_size, mesh=mesh)[0].reshape(
        len(rows), len(words)
    )
    return [EMOTIONS[i] for i in losses.argmin(1)]


# jit keeps its programs by function: these stand here by name, so that a second evaluation does not compile again.


def generate_rows(
    params: Params,
    prompt: batching.Prompt,
    rows: jax.Array,
    key: jax.Array,
    *,
    model: gpt2.GPT2,
    cfg: SamplingConfig,
    times: int,
) -> tuple[jax.Array, jax.Array]:
    """`generate`, where the place of a prompt in its batch is not its number: rows i32[N] -> (tokens, mask) of the replies. Log-probs
    that leave no program are not computed: a sum over the vocabulary is spared for each token."""
    keys = jax.random.split(key, times) if times > 1 else key[None]
    each = jax.vmap(lambda i: jax.vmap(lambda k: jax.random.fold_in(k, i))(keys))(rows)
    reply = generate(params, prompt, each.reshape(-1), model=model, cfg=cfg, times=times)
    return reply.tokens, reply.mask


def losses_by_row(params: Any, batch: batching.Batch, *, model: gpt2.GPT2) -> tuple[jax.Array, jax.Array]:
    """sft_loss of each row by itself -> (losses f32[B], tokens f32[B])."""
    _, logprobs, counted = sft_logprobs(params, batch, None, model=model)
    return -logprobs.sum(1), counted.sum(1).astype(jnp.float32)


def losses_of(
    params: Any, examples: Sequence[Example], *, model: gpt2.GPT2, batch_size: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood of each example's reply, and its number of tokens -> (f32[N], f32[N])."""

    program = jax.jit(losses_by_row, static_argnames="model")
    rows = [e.prompt + e.reply for e in examples]
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows))
    for indices, length in chunks(rows, batch_size, 0, model.config.n_positions):
        mine = [indices[i] for i in sharding.my_rows(mesh, batch_size)]
        batch = batching.supervised([examples[i] for i in mine], len(mine), length)
        found = program(params, sharding.split_batch(mesh, batch), model=model)
        losses[indices], counts[indices] = sharding.fetch(found)
    return losses, counts


def reward_terms(
    scorer: Scorer, replies: Sequence[Sequence[int]], refs: References, exchanges: Sequence[Exchange]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same terms that PPO was trained on, for any replies (ids) -> (weighted total [N], {term: [N]}). All replies are one
    batch, since `sameness` compares them with one another; terms enter as they are, never standardised by a run's statistics.
    Raises RewardError for a weight without a term, and for a value that is NaN or infinite, naming the reply."""
    tokens, mask = batching.pad(replies, batching.round_up(max(map(len, replies)) or 1, PAD_TO), "right")
    reply = Reply(tokens, mask, np.zeros(tokens.shape, np.float32))  # pyright: ignore[reportArgumentType]
    program = jax.jit(scoring.score, static_argnames=("model", "device_custom"))
    batch, raw = program(
        scorer.trunk, reply, refs, scorer.fixed, model=scorer.model, device_custom=scorer.device_custom
    )
    if scorer.host:
        batch, raw = sharding.fetch((batch, raw))
        raw = scoring.host_terms(scorer.host, batch, raw, scorer.tokenizer, replies, exchanges)
    terms = sharding.fetch(raw)
    if unknown := sorted(set(scorer.weights) - set(terms)):
        names = ", ".join(sorted(set(terms) - set(combine.TERMS))) or "none"
        raise RewardError(f"rewards.custom.weights: the function gives no {', '.join(unknown)}; it gives {names}")
    for name, values in terms.items():
        if not np.isfinite(values).all():
            i = int(np.argmin(np.isfinite(values)))
            text = prompts.parse_reply(scorer.tokenizer, replies[i]).text
            raise RewardError(f"reward term {name} is {values[i]} for sample {i} (reply: {text[:80]!r})")
    parts = [scorer.weights.get(name, 1.0) * values for name, values in terms.items()]
    return np.sum(parts, axis=0), terms


def of_replies(
    replies: Sequence[Sequence[int]],
    refs: References,
    exchanges: Sequence[Exchange],
    scorer: Scorer,
    perplexity: float | None = None,
) -> System:
    """Generated ids -> System."""
    parsed: list[ParsedReply] = [prompts.parse_reply(scorer.tokenizer, ids) for ids in replies]
    total, terms = reward_terms(scorer, replies, refs, exchanges)
    return System(
        texts=[p.text for p in parsed],
        emotions=[p.emotion for p in parsed],
        stop_rate=float(np.mean([p.ended for p in parsed])),
        reward=float(total.mean()),
        terms={name: float(values.mean()) for name, values in terms.items()},
        perplexity=perplexity,
    )


def of_turns(
    turns: Sequence[Turn], exchanges: Sequence[Exchange], refs: References, scorer: Scorer, prompt: PromptConfig
) -> System:
    """Answers that come as text, scored through the same tokens as a model's."""
    replies = [
        prompts.encode_reply(scorer.tokenizer, t, e.client.emotion, prompt)
        for t, e in zip(turns, exchanges, strict=True)
    ]
    system = of_replies(replies, refs, exchanges, scorer)
    return system._replace(texts=[t.text for t in turns], emotions=[t.emotion for t in turns])


class LanguageModel(NamedTuple):
    """A model of another seed that had no part in any reply or reward."""

    params: Params
    model: gpt2.GPT2
    tokenizer: Any
    prompt: PromptConfig  # as it was trained


def language_perplexity(
    judge: LanguageModel, texts: Sequence[str], exchanges: Sequence[Exchange], *, batch_size: int, mesh: Mesh
) -> float:
    """Is it still language? exp of the mean negative log-likelihood per token (each text and its EOS) that the judge gives
    to replies, after the prompt and the annotated emotion."""
    examples = []
    border, most = judge.tokenizer.convert_tokens_to_ids("<|text|>"), judge.model.config.n_positions
    for text, e in zip(texts, exchanges, strict=True):
        before, _ = prompts.encode_prompt(judge.tokenizer, e.context, e.client, judge.prompt)
        turn = dataclasses.replace(e.therapist, text=text)
        reply = prompts.encode_reply(judge.tokenizer, turn, e.client.emotion, judge.prompt)
        # A baseline may answer a long message with somebody else's long reply: its end is left out, then the prompt's beginning.
        reply = reply[: max(most - len(before), most // 2)]
        before = before[max(len(before) + len(reply) - most, 0) :]
        at = reply.index(border) + 1
        examples.append(Example(before + reply[:at], reply[at:], 0))
    return perplexity_of(*losses_of(judge.params, examples, model=judge.model, batch_size=batch_size, mesh=mesh))


HELD_OUT = {
    "meteor": 0.9,
    "meteor_exact_stem": 0.9,
    "distinct2": 0.7,
    "stop_rate": 0.8,
}  # a fall below this share alarms
GROWING = {"commonest_share": 2.0, "perplexity": 1.5}  # and so does a growth above this multiple


def alarm(before: dict[str, float], now: dict[str, float]) -> str | None:
    """What is wrong where the validation reward has risen since the start and metrics that are not in it have fallen: the
    reward is being gamed. None where all is well. Keys are `validation/NAME`."""
    was, is_ = (lambda name: before[f"validation/{name}"]), (lambda name: now[f"validation/{name}"])
    if "validation/reward" not in before or not is_("reward") > was("reward"):
        return None
    both = before.keys() & now.keys()  # a restart may have lost a judge, or WordNet
    fallen = [n for n, share in HELD_OUT.items() if f"validation/{n}" in both and is_(n) < share * was(n)]
    grown = [n for n, times in GROWING.items() if f"validation/{n}" in both and is_(n) > times * was(n)]
    if not fallen + grown:
        return None
    changes = ", ".join(f"{name} {was(name):.3f} -> {is_(name):.3f}" for name in fallen + grown)
    return f"reward rises ({was('reward'):.3f} -> {is_('reward'):.3f}) while {changes}"


def row(
    system: System, exchanges: Sequence[Exchange], expressed: Callable[[Sequence[str]], list[str]] | None
) -> dict[str, Any]:
    """One system's line of results.json; all metrics are on words as metrics.signature() says. `expressed` reads emotions in
    texts: the evaluator, which is never the classifier that rewards. Data without emotions gives no metric of them."""
    wanted = [e.therapist for e in exchanges]
    gold = [t.emotion for t in wanted]
    emotions: dict[str, float] = {}
    if any(gold):
        emotions |= metrics.emotion_scores(system.emotions, gold, "emotion_stated")
        emotions |= metrics.emotion_scores(expressed(system.texts), gold, "emotion_expressed") if expressed else {}
    return {
        "reward": system.reward,
        **metrics.text_metrics(system.texts, [t.text for t in wanted]),
        **emotions,
        "stop_rate": system.stop_rate,
        "perplexity": system.perplexity,
        "terms": system.terms,
    }


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of one system's draws -> their mean, number by number; what no line has stays None."""
    return jax.tree.map(lambda *x: float(np.mean(x)), *rows)


def constants(
    train: Sequence[Exchange], exchanges: Sequence[Exchange], row_of_turns: Callable[[list[Turn]], Any], seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The row of the best constant answer, another one for each metric, each chosen on train; and those answers."""
    chosen = baselines.constant(train, seed)
    emotion = baselines.majority_emotion(train)
    rows = {
        name: row_of_turns([Turn("therapist", turn.text, emotion)] * len(exchanges)) for name, turn in chosen.items()
    }
    anchor = rows["rougeL"]  # what no single metric chose (reward, length, ...) is that of the answer best by ROUGE-L
    return {**anchor, **{name: rows[name][name] for name in rows}}, {name: turn.text for name, turn in chosen.items()}


def perplexity_of(losses: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean negative log-likelihood per token over all replies (tokens weigh equally, not replies)."""
    return math.exp(losses.sum() / tokens.sum())
