"""Systems x metrics -> one table.

Trained systems answer every prompt; the trivial ones (one constant reply, the nearest training reply, a random one) say
what a metric is worth: what a constant answer can win is shown beside what the model wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from jax.sharding import Mesh
from rich.table import Table

from therapy_jax import baselines, batching, gpt2, metrics, prompts, sharding
from therapy_jax.config import PromptConfig, RewardWeights, SamplingConfig
from therapy_jax.dialogue import EMOTIONS, Exchange, Turn
from therapy_jax.prompts import Example, ParsedReply
from therapy_jax.rewards import batch as reward_batch
from therapy_jax.rewards.batch import References
from therapy_jax.rewards.combine import score
from therapy_jax.rewards.words import Vocabulary
from therapy_jax.sampling import generate
from therapy_jax.sft import sft_loss

PAD_TO = 32
PAPER = {  # arXiv 2511.11884; tokenisation and BLEU order are not stated there
    "bleu": 0.0111,
    "rouge1": 0.1397,
    "rouge2": 0.0213,
    "rougeL": 0.1317,
    "meteor": 0.0581,
    "emotion_accuracy": 0.9934,
    "base_emotion_accuracy": 0.6696,
}


class System(NamedTuple):
    """A system's answers to the exchanges, in their order."""

    texts: list[str]
    emotions: list[str | None]  # stated
    stop_rate: float
    reward: float  # mean total reward
    terms: dict[str, float]  # mean of each raw reward term
    perplexity: float | None  # of the therapist's own replies under the model; None where there is no model


def references(exchanges: Sequence[Exchange], tokenizer: Any, length: int | None = None) -> References:
    """What the data says about each exchange, as host arrays; a text longer than `length` keeps its start."""
    rows = [prompts.encode_text(tokenizer, e.therapist.text) for e in exchanges]
    length = length or batching.round_up(max(map(len, rows)), PAD_TO)
    tokens, mask = batching.pad([row[:length] for row in rows], length, "right")
    emotion = [EMOTIONS.index(e.therapist.emotion) if e.therapist.emotion in EMOTIONS else -1 for e in exchanges]
    return References(tokens, mask, np.asarray(emotion, np.int32))  # pyright: ignore[reportArgumentType]


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
) -> list[list[int]]:
    """Prompts (ids) -> generated ids each, EOS included where it came. Row i draws from fold_in(key, i), whatever its batch."""
    program = jax.jit(generate, static_argnames=("model", "cfg"))
    replies: list[list[int]] = [[] for _ in rows]
    for indices, length in chunks(rows, batch_size, cfg.max_new_tokens, model.config.n_positions):
        prompt = sharding.split_batch(mesh, batching.prompts([rows[i] for i in indices], length))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(indices))
        reply = jax.device_get(program(params, prompt, sharding.split_batch(mesh, keys), model=model, cfg=cfg))
        for i, tokens, mask in zip(indices, reply.tokens, reply.mask, strict=True):
            replies[i] = tokens[mask].tolist()
    return replies


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


def losses_by_row(params: Any, batch: batching.Batch, *, model: gpt2.GPT2) -> tuple[jax.Array, jax.Array]:
    """sft_loss of each row by itself -> (losses f32[B], tokens f32[B])."""
    rows = jax.tree.map(lambda x: x[:, None], batch)
    return jax.vmap(lambda row: sft_loss(params, row, None, model=model))(rows)


def score_replies(
    tokens: jax.Array, mask: jax.Array, refs: References, vocabulary: Vocabulary, *, weights: RewardWeights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    return score(reward_batch.make(tokens, mask, refs, vocabulary), weights)


def losses_of(
    params: Any, examples: Sequence[Example], *, model: gpt2.GPT2, batch_size: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood of each example's reply, and its number of tokens -> (f32[N], f32[N])."""

    program = jax.jit(losses_by_row, static_argnames="model")
    rows = [e.prompt + e.reply for e in examples]
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows))
    for indices, length in chunks(rows, batch_size, 0, model.config.n_positions):
        batch = batching.supervised([examples[i] for i in indices], batch_size, length)
        losses[indices], counts[indices] = jax.device_get(
            program(params, sharding.split_batch(mesh, batch), model=model)
        )
    return losses, counts


def reward_terms(
    replies: Sequence[Sequence[int]], refs: References, vocabulary: Vocabulary, weights: RewardWeights
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same terms that PPO was trained on, for any replies (ids) -> (total [N], {term: [N]})."""
    tokens, mask = batching.pad(replies, batching.round_up(max(map(len, replies)) or 1, PAD_TO), "right")
    program = jax.jit(score_replies, static_argnames="weights")
    return jax.device_get(program(tokens, mask, refs, vocabulary, weights=weights))


def of_replies(
    replies: Sequence[Sequence[int]],
    refs: References,
    tokenizer: Any,
    vocabulary: Vocabulary,
    weights: RewardWeights,
    perplexity: float | None = None,
) -> System:
    """Generated ids -> System."""
    parsed: list[ParsedReply] = [prompts.parse_reply(tokenizer, ids) for ids in replies]
    total, terms = reward_terms(replies, refs, vocabulary, weights)
    return System(
        texts=[p.text for p in parsed],
        emotions=[p.emotion for p in parsed],
        stop_rate=float(np.mean([p.ended for p in parsed])),
        reward=float(total.mean()),
        terms={name: float(values.mean()) for name, values in terms.items()},
        perplexity=perplexity,
    )


def of_turns(
    turns: Sequence[Turn],
    exchanges: Sequence[Exchange],
    refs: References,
    tokenizer: Any,
    vocabulary: Vocabulary,
    weights: RewardWeights,
    prompt: PromptConfig,
) -> System:
    """Answers that come as text, scored through the same tokens as a model's."""
    replies = [
        prompts.encode_reply(tokenizer, t, e.client.emotion, prompt) for t, e in zip(turns, exchanges, strict=True)
    ]
    system = of_replies(replies, refs, tokenizer, vocabulary, weights)
    return system._replace(texts=[t.text for t in turns], emotions=[t.emotion for t in turns])


def row(system: System, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """One system's line of results.json; all metrics are on words as metrics.signature() says."""
    wanted = [e.therapist for e in exchanges]
    return {
        "reward": system.reward,
        **metrics.text_metrics(system.texts, [t.text for t in wanted]),
        **metrics.emotion_scores(system.emotions, [t.emotion for t in wanted], "emotion_stated"),
        "stop_rate": system.stop_rate,
        "perplexity": system.perplexity,
        "terms": system.terms,
    }


def constants(
    train: Sequence[Exchange], exchanges: Sequence[Exchange], score_turns: Any, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The row of the best constant answer, another one for each metric, each chosen on train; and those answers."""
    chosen = baselines.constant(train, seed)
    emotion = baselines.majority_emotion(train)
    rows = {
        name: row(score_turns([Turn("therapist", turn.text, emotion)] * len(exchanges)), exchanges)
        for name, turn in chosen.items()
    }
    anchor = rows["rougeL"]  # what no single metric chose (reward, length, ...) is that of the answer best by ROUGE-L
    return {**anchor, **{name: rows[name][name] for name in rows}}, {name: turn.text for name, turn in chosen.items()}


def perplexity_of(losses: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean negative log-likelihood per token over all replies (tokens weigh equally, not replies)."""
    return math.exp(losses.sum() / tokens.sum())


ROWS = {  # results.json -> what the table calls it
    "reward": "reward",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "meteor": "METEOR",
    "meteor_exact_stem": "METEOR (ex., stem)",
    "emotion_stated_accuracy": "emotion acc.",
    "emotion_stated_macro_f1": "emotion F1",
    "distinct1": "Distinct-1",
    "distinct2": "Distinct-2",
    "commonest_share": "commonest",
    "perplexity": "perplexity",
    "reply_words": "words",
    "stop_rate": "stops",
}


def table(results: dict[str, Any]) -> Table:
    """results.json for the screen: a row a metric, a column a system, the paper's figures last."""
    data, systems = results["data"], results["systems"]
    majority = results["emotion_majority_accuracy"]
    out = Table(
        title=f"{data['name']}, {data['split']} split, {data['n']} exchanges",
        caption=f"emotion accuracy of always answering the majority: {majority:.4f}; stated emotions only",
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    out.add_column("", no_wrap=True)
    for name in (*systems, "paper"):
        out.add_column(name, justify="right", no_wrap=True)
    paper = {**PAPER, "emotion_stated_accuracy": PAPER["emotion_accuracy"]} if data["name"] == "mesc" else {}
    for key, label in ROWS.items():
        if any(key in values for values in systems.values()):
            digits = 1 if key in ("perplexity", "reply_words") else 4
            cells = [values.get(key) for values in (*systems.values(), paper)]
            out.add_row(label, *("" if cell is None else f"{cell:.{digits}f}" for cell in cells))
    return out
