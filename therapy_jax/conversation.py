"""Talking to a trained model: what a person types goes in, what may be shown comes out.

    message ──crisis gate──▶ client's emotion ──▶ prompt, as in training ──stream──▶ tokens ──checked──▶ sentences
                  └─ a fixed answer; no model is asked                                  └─ or withheld

A conversation is a tuple of messages, and `say` gives it back one message longer, again and again while the answers grow.
Nothing here prints: chat.py and play.py show the same states.

Sentences are held back. Of a reply only whole sentences are given out, each once it and all before it have passed
safety.check_reply: shown token by token, "take 40" would stand on the screen before "mg" tells what it is.

Several models may answer a message. All of them read the same turns, so that their answers can be compared; the
conversation goes on with the answer of the last one. A message that the gate has answered, no model reads later either.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from therapy_jax import (
    batching,
    classifiers,
    crisis_hints,
    gpt2,
    prompts,
    readings,
    run,
    safety,
    sampling,
    sharding,
    stages,
)
from therapy_jax import config as config_module
from therapy_jax.cleaning import clean_line
from therapy_jax.config import Config, ConfigError, MeshConfig, PromptConfig
from therapy_jax.dialogue import EMOTIONS, Exchange, Turn, exchanges
from therapy_jax.files import as_path
from therapy_jax.gpt2 import Params
from therapy_jax.rewards.batch import PAD_TO

STAGES = ("base", "sft", "ppo")
SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s)""")


class MessageError(ValueError):
    """A message that no model can answer; one sentence says why, and what to do."""


class Speaker(NamedTuple):
    """A model that answers."""

    name: str
    params: Params
    model: gpt2.GPT2
    tokenizer: Any


class Reader(NamedTuple):
    """What reads the client's emotion where the models do not write it themselves: a head on the frozen SFT model."""

    trunk: Speaker
    head: classifiers.Head
    params: Params


class Answer(NamedTuple):
    """One model's answer, so far."""

    speaker: str
    text: str  # whole sentences that were checked
    emotion: str | None = None  # that the model states for its reply
    client_emotion: str | None = (
        None  # that the prompt carried or, with prompt.emotion: inferred, the model has written
    )
    prompt: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()  # as generated
    withheld: str | None = None  # why the text is not what the model wrote
    ended: bool = False  # by EOS, not by the length limit


class Message(NamedTuple):
    """What the client says, and what is answered."""

    client: Turn  # with the emotion that the models are told; None where they are told none
    certainty: float | None = None  # of the reader, in that emotion; None where a person has set it
    crisis: str | None = None  # the kind that the gate has found
    fixed: str | None = None  # the gate's answer
    answers: tuple[Answer, ...] = ()
    reminder: str | None = None  # where help is, beside every answer after the gate has fired once

    @property
    def emotion(self) -> str | None:
        """The client's: as it was told to the models, or as the last of them has inferred it."""
        return self.client.emotion or (self.answers[-1].client_emotion if self.answers else None)


Conversation = tuple[Message, ...]


def say(
    conversation: Conversation, text: str, speakers: Sequence[Speaker], reader: Reader | None, config: Config,
    emotion: str | None = None,
) -> Iterator[Conversation]:  # fmt: skip
    """One message more, yielded each time that an answer has grown by a token. `emotion`: the client's, set by a person;
    else it is read. Raises MessageError for a message that does not fit into the model.

    Message n draws from fold_in(seed, n), for all models: answered again with another emotion, only that has changed.
    """
    # What models read is checked, too: without its markup, `suic<b>ide` is a word.
    clean = (clean_line(text) if config.data.clean else "") or text.strip()
    earlier = [message.client.text for message in conversation]
    if crisis := safety.crisis(text, earlier) or safety.crisis(clean, earlier):
        yield (
            *conversation,
            Message(Turn("client", text), None, crisis.kind, safety.answer(crisis.kind, config.safety)),
        )
        return
    before = context(conversation)
    client, certainty = Turn("client", clean, emotion), None
    if emotion is None and reader is not None:
        found, certainty = read_emotion(reader, before, client, config.prompt.max_tokens)
        client = dataclasses.replace(client, emotion=found)
    key = jax.random.fold_in(jax.random.key(config.seed), len(conversation))
    fired = any(message.crisis for message in conversation)
    message = Message(client, certainty, reminder=safety.reminder(config.safety) if fired else None)
    for speaker in speakers:
        done = message.answers
        for answer in reply(speaker, before, client, key, config):
            message = message._replace(answers=(*done, answer))
            yield (*conversation, message)


def context(conversation: Conversation) -> tuple[Turn, ...]:
    """The turns that models read before the next message."""
    turns: list[Turn] = []
    for message in conversation:
        if message.answers:
            turns += [message.client, Turn("therapist", message.answers[-1].text, message.answers[-1].emotion)]
    return tuple(turn for turn in turns if turn.text)


def read_emotion(reader: Reader, before: Sequence[Turn], client: Turn, max_tokens: int) -> tuple[str, float]:
    """The likeliest of EMOTIONS for what the client says in its context, and its probability."""
    asked = [Exchange("", tuple(before), client, Turn("therapist", ""))]
    trunk = reader.trunk
    reading = readings.of_clients(
        trunk.params, asked, trunk.tokenizer, model=trunk.model, max_tokens=max_tokens, at_once=1
    )
    probabilities = np.exp(np.asarray(reader.head.apply({"params": reader.params}, reading)))[0]
    return EMOTIONS[probabilities.argmax()], float(probabilities.max())


def prompt_of(tokenizer: Any, before: Sequence[Turn], client: Turn, config: PromptConfig) -> list[int]:
    """encode_prompt; where the model would infer the emotion and a person has set it, its words stand in the prompt."""
    ids, _ = prompts.encode_prompt(tokenizer, before, client, config)
    if config.emotion == "inferred" and client.emotion:
        ids += [*prompts.encode_text(tokenizer, client.emotion), tokenizer.convert_tokens_to_ids("<|reply|>")]
    return ids


def reply(speaker: Speaker, before: Sequence[Turn], client: Turn, key: Any, config: Config) -> Iterator[Answer]:
    """One model's answer, after each token. Raises MessageError."""
    name, params, model, tokenizer = speaker
    cfg = run.decoding(config)
    prompt, room = prompt_of(tokenizer, before, client, config.prompt), model.config.n_positions - cfg.max_new_tokens
    if len(prompt) > room:
        raise MessageError(f"this message takes {len(prompt)} tokens, {name} reads at most {room}: shorten it")
    length = min(batching.round_up(max(len(prompt), config.prompt.max_tokens), PAD_TO), room)  # few lengths to compile
    ids: list[int] = []
    text = ""
    for token in sampling.stream(params, batching.prompts([prompt], length), key, model=model, cfg=cfg):
        ids.append(token)
        parsed, last = prompts.parse_reply(tokenizer, ids), len(ids) == cfg.max_new_tokens
        whole = printable(parsed.text if parsed.ended or last else whole_sentences(parsed.text))
        told = client.emotion if "emotion" in config.prompt.format else None
        known = (parsed.emotion, told or parsed.client_emotion, tuple(prompt), tuple(ids))
        if whole != text and (reason := safety.check_reply(whole)):
            yield Answer(name, safety.WITHHELD, *known, reason, ended=True)
            return
        text = whole
        yield Answer(name, text, *known, ended=parsed.ended)


def whole_sentences(text: str) -> str:
    """The text up to the last end of a sentence that something follows."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey; a blank for any other white space."""
    text = "".join(" " if c.isspace() and c != "\n" else c for c in text)
    return "".join(c for c in text if c.isprintable() or c in "\n\u200d")  # \u200d joins the parts of an emoji


# ---------------------------------------------------------------------------------------------------- from a run folder


def open_run(config: Config) -> tuple[Path, Config, list[str]]:
    """-> the run folder, the config on one device, and the models that are there, in the order of STAGES. Raises
    ConfigError where there is none, or where they were trained on other prompts than the config makes."""
    run.check_platform(config.require)
    folder = as_path(config.run_dir)
    names = [name for name in STAGES if (folder / name / "model" / "model.safetensors").is_file()]
    if not names:
        raise ConfigError(
            f"{folder}: no trained model here; run scripts/train_sft.py with this --config and --run_dir first"
        )
    if (folder / "config.yaml").is_file():
        then, now = config_module.load(folder / "config.yaml").prompt, config.prompt
        for key, was in dataclasses.asdict(then).items():
            if was != getattr(now, key):
                raise ConfigError(
                    f"prompt.{key} was {was} when {folder} was trained, now it is {getattr(now, key)}; "
                    f"take the run's own settings, with --config {folder / 'config.yaml'}"
                )
    return folder, dataclasses.replace(config, mesh=MeshConfig(data=1)), names


def load_speaker(folder: Path, name: str, config: Config) -> Speaker:
    gpt2_config, params, tokenizer = stages.load_model(folder, name, config)
    return Speaker(name, sharding.place(gpt2_config.mesh, params), gpt2.GPT2(gpt2_config), tokenizer)


def load_data(config: Config) -> dict[str, list[Exchange]]:
    data = run.read_data(config.data, config.seed)
    return {split: [e for dialogue in part for e in exchanges(dialogue)] for split, part in data.items()}


def load_reader(folder: Path, trunk: Speaker, config: Config, data: dict[str, list[Exchange]]) -> Reader | None:
    """The head client_emotion of the run folder, trained now where there is none yet; None where nothing is annotated."""
    names = (*classifiers.REWARDING, "client_emotion")
    found = classifiers.load_or_train(folder, config, data, trunk.model.config, trunk.params, trunk.tokenizer, names)
    if found.client_emotion is None or not found.report["heads"]["client_emotion"]["annotated"]:
        return None
    return Reader(trunk, found.heads["client_emotion"], found.client_emotion)


def warm_up(speaker: Speaker, reader: Reader | None, config: Config) -> None:
    """Compile what the first message needs: all is asked once, and one token is drawn twice (the second time from what the
    first one has left)."""
    client = Turn("client", "Hello.", EMOTIONS[0])
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(crisis_hints.learnt)  # the gate learns its cases while XLA compiles
        if reader is not None:
            read_emotion(reader, (), client, config.prompt.max_tokens)
        list(itertools.islice(reply(speaker, (), client, jax.random.key(0), config), 2))
        learning.result()
