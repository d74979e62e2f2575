"""From replies to reward terms: one pure function on the device, and what stands around it on the host.

rewards on device   reply tokens -> RewardBatch -> {term: f32[B]}                       (inside the one program)
rewards on host     ... -> decoded text -> your function, or a sentence encoder -> {term: f32[B]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax import encoder, gpt2, processes
from therapy_jax.config import RewardConfig
from therapy_jax.dialogue import Exchange
from therapy_jax.gpt2 import Params
from therapy_jax.rewards import batch as reward_batch
from therapy_jax.rewards import custom, meaning
from therapy_jax.rewards.batch import CONTEXT_TOKENS, Fixed, References, RewardBatch
from therapy_jax.rewards.combine import TERMS, Raw, raw_terms
from therapy_jax.sampling import Reply

Custom = Callable[[RewardBatch], Mapping[str, Any]]


def score(
    trunk: Params, reply: Reply, references: References, fixed: Fixed, *, model: gpt2.GPT2, device_custom: Custom | None
) -> tuple[RewardBatch, Raw]:
    """Every term that the device computes -> (what they read, {name: f32[B]})."""
    batch = reward_batch.make(trunk, reply.tokens, reply.mask, references, fixed, model=model)
    return batch, raw_terms(batch, device_custom)


class HostRewards(NamedTuple):
    """The rewards that leave the device; both None = the iteration stays one program."""

    custom: Callable[[list[custom.Sample]], Any] | None
    name: str  # of the custom reward, for its errors
    encoder: encoder.Encoder | None

    def __bool__(self) -> bool:
        return self.custom is not None or self.encoder is not None


def load(config: RewardConfig) -> tuple[Custom | None, HostRewards]:
    """The user's function where there is one, on the side it belongs to, and the sentence encoder where one is named."""
    function = custom.load(config.custom) if config.custom else None
    name = config.custom.path if config.custom else ""
    sentence_encoder = encoder.load(config.encoder) if config.encoder else None
    if config.custom is None or config.custom.on == "host":
        return None, HostRewards(function, name, sentence_encoder)
    assert function is not None
    return custom.on_device(function, name), HostRewards(None, "", sentence_encoder)


def from_one(make: Callable[[], Raw]) -> Raw:
    """What process 0 makes on its host, in every process, its RewardError too: a function that draws at random or asks a server
    says something else in each, and an encoder on other hardware something else in the last bits."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if processes.is_writer():
        try:
            said = {"terms": {name: np.asarray(values).tolist() for name, values in make().items()}}
        except custom.RewardError as error:
            said = {"error": str(error)}
    said = processes.shared(said)
    if "error" in said:
        raise custom.RewardError(said["error"])
    return {name: jnp.asarray(values, jnp.float32) for name, values in said["terms"].items()}


def terms_of_encoder(sentences: encoder.Encoder, batch: RewardBatch, texts: Sequence[Sequence[str]]) -> Raw:
    """The terms of meaning, by the encoder. texts: reply, reference, client's utterance and context of each reply."""
    place = {text: i for i, text in enumerate(dict.fromkeys(text for four in texts for text in four))}
    known = encoder.embed_texts(sentences, list(place))  # once, however many replies answer the same prompt
    vectors = known[[place[text] for four in texts for text in four]]
    some = np.asarray([[bool(text.strip()) for text in four] for four in texts])
    vectors = jnp.asarray(np.where(some[..., None], vectors.reshape(len(texts), 4, -1), 0.0))
    names = ("meaning", "reference_meaning", "client_meaning", "context_meaning")
    read = batch._replace(**{name: vectors[:, i] for i, name in enumerate(names)})
    return {"semantic": meaning.semantic(read), "context": meaning.context(read)}


def host_terms(
    host: HostRewards,
    batch: RewardBatch,
    raw: Raw,
    tokenizer: Any,
    replies: Sequence[Sequence[int]],
    exchanges: Sequence[Exchange],
) -> Raw:
    """`raw` with the terms of the host in it; replies are generated ids. Raises RewardError (see custom.on_host)."""
    samples = custom.make_samples(tokenizer, replies, exchanges)
    if host.encoder is not None:
        # Of the turns before only the newest words, as the trunk reads them: an encoder would cut the end of a long text.
        newest = [" ".join(" ".join(s.context).split()[-CONTEXT_TOKENS:]) for s in samples]
        texts = [[s.reply, s.reference, s.client, before] for s, before in zip(samples, newest, strict=True)]
        sentences = host.encoder
        raw = {**raw, **from_one(lambda: terms_of_encoder(sentences, batch, texts))}
    if (function := host.custom) is not None:
        more = from_one(lambda: custom.on_host(function, samples, host.name))
        if taken := sorted(set(TERMS) & set(more)):
            raise custom.RewardError(
                f"reward {host.name} gives {', '.join(taken)}, which is a term of ours; choose another name"
            )
        raw = {**raw, **more}
    return raw
