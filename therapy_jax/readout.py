"""What the run's own measures say of an answer in a free conversation, where no therapist's reply stands beside it.

Most terms of the reward compare with one (overlap, meaning, length, strategy, the emotions), and would be made up here. What
needs none is computed exactly as PPO computed it: `context`, `repetition`, `ending`, `manner`; and, in place of a reward for
the expressed emotion, what the frozen classifier reads in the words.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax import batching, gpt2, sampling
from therapy_jax.batching import Prompt
from therapy_jax.conversation import Answer, Speaker
from therapy_jax.dialogue import EMOTIONS, Exchange, Turn
from therapy_jax.evaluate import Scorer
from therapy_jax.gpt2 import Array, Params
from therapy_jax.rewards import emotion, scoring
from therapy_jax.rewards.batch import PAD_TO, Fixed, References, make_references
from therapy_jax.rewards.combine import Raw
from therapy_jax.sampling import Reply

FREE = ("context", "repetition", "ending", "manner")  # terms that ask for no therapist's reply and no annotation


class Measures(NamedTuple):
    terms: dict[str, float]  # those of FREE, raw
    expressed: dict[str, float]  # emotion -> probability, likeliest first
    words: int


def measure(scorer: Scorer, before: Sequence[Turn], client: Turn, answers: Sequence[Answer]) -> list[Measures]:
    """Of each answer to one message. A user's custom reward is left out: it may ask for the therapist's reply."""
    exchange = Exchange("", tuple(before), client, Turn("therapist", ""))
    one = make_references([exchange], scorer.trunk, scorer.tokenizer, model=scorer.model, at_once=1)
    refs: Any = jax.tree.map(lambda x: np.repeat(x, len(answers), 0), one)._replace(
        prompt=np.zeros(len(answers), np.int32)
    )
    ids = [list(answer.ids) for answer in answers]
    tokens, mask = batching.pad(ids, batching.round_up(max(map(len, ids)), PAD_TO), "right")
    batch, raw, expressed = _measure(scorer.trunk, tokens, mask, refs, scorer.fixed, model=scorer.model)
    if scorer.host.encoder is not None:
        raw = scoring.host_terms(
            scorer.host._replace(custom=None), batch, raw, scorer.tokenizer, ids, [exchange] * len(ids)
        )
    terms = {name: np.asarray(raw[name]) for name in FREE}
    words = np.asarray(batch.words_mask.sum(-1))
    return [
        Measures(
            {name: float(values[i]) + 0.0 for name, values in terms.items()},  # + 0.0: no -0.0
            {EMOTIONS[k]: float(expressed[i, k]) for k in np.argsort(-np.asarray(expressed[i]))},
            int(words[i]),
        )
        for i in range(len(answers))
    ]


@functools.partial(jax.jit, static_argnames="model")
def _measure(
    trunk: Params, tokens: Array, mask: Array, refs: References, fixed: Fixed, *, model: gpt2.GPT2
) -> tuple[Any, Raw, Array]:
    reply = Reply(tokens, mask, jnp.zeros(tokens.shape))
    batch, raw = scoring.score(trunk, reply, refs, fixed, model=model, device_custom=None)
    return batch, raw, emotion.probabilities(fixed.frozen.emotion, batch.reading)


def loupe(speaker: Speaker, reference: Speaker, answer: Answer) -> list[tuple[str, float, float]]:
    """Of each token that was generated: its text, and its log-prob (nats, temperature 1) under the model that wrote it and
    under the reference (the SFT model)."""
    if not answer.ids:
        return []
    asked = batching.prompts([list(answer.prompt)], batching.round_up(len(answer.prompt), PAD_TO))
    tokens, mask = batching.pad([list(answer.ids)], batching.round_up(len(answer.ids), PAD_TO), "right")
    both = [_logprobs(s.params, asked, tokens, mask, model=s.model)[0] for s in (speaker, reference)]
    texts = [speaker.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in answer.ids]
    return [
        (text, float(ours), float(theirs)) for text, ours, theirs in zip(texts, *map(np.asarray, both), strict=False)
    ]


@functools.partial(jax.jit, static_argnames="model")
def _logprobs(params: Params, prompt: Prompt, tokens: Array, mask: Array, *, model: gpt2.GPT2) -> Array:
    hidden_BRD = sampling.reply_hidden(params, prompt, tokens, mask, model=model)
    return sampling.reply_logprobs(params, hidden_BRD, tokens, mask, model=model, temperature=1.0)[0]
