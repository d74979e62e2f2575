"""An exchange -> tokens. The restructured input of the paper (section 3): context + emotional state + client utterance.

    <|client|> She left. <|therapist|> When was that? <|utterance|> On Sunday, by text. <|emotion|> sadness <|reply|>
    └────────── context: whole earlier turns ───────┘ └─ the client, now ──────────────┘ └─ annotated ──┘

and the structured reply that the model learns to write:

     sadness<|text|> That sounds abrupt, and lonely.<|endoftext|>

Formats leave parts out: `utterance` has neither context nor emotion, `context` no emotion, `emotion` no context. With
`emotion: inferred` the sequence is the same, only the border moves: the prompt stops after <|emotion|>, and the model
writes the client's emotion and <|reply|> itself before it answers, since nobody labels a live client.

Text can never forge a marker: it is encoded with special tokens switched off. Masks come from lengths, never from ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from therapy_jax.config import PromptConfig
from therapy_jax.dialogue import EMOTIONS, DataError, Exchange, Turn
from therapy_jax.locate import ACCEPTED, WeightsError, find, holds

# transformers is here for its tokenizers; that torch is missing is no news to anybody.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
SPECIAL_TOKENS = ("<|client|>", "<|therapist|>", "<|utterance|>", "<|emotion|>", "<|reply|>", "<|text|>")
EOS = "<|endoftext|>"


class Example(NamedTuple):
    """One training exchange: the model reads `prompt` and learns to write `reply`, whose last token is the only EOS."""

    prompt: list[int]
    reply: list[int]
    dropped_turns: int  # context turns that the budget left out
    context_tokens: int = 0  # of the prompt, those of the turns before


class ParsedReply(NamedTuple):
    """What a written reply says. Without <|text|> (the base model never learnt it) all of it is text."""

    client_emotion: str | None  # only with emotion: inferred
    emotion: str | None  # the therapist's, as stated
    text: str
    ended: bool  # by EOS, not by the length limit


def load_tokenizer(folder_or_hub_id: str | os.PathLike) -> Any:
    """A Hugging Face tokenizer: a folder with tokenizer.json, one with GPT-2's vocab.json + merges.txt, a hub id, or that of
    one of our runs (locate.py)."""
    import transformers  # two seconds; here, so that importing this module stays cheap

    folder = find(folder_or_hub_id).folder
    bare = not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if bare and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise WeightsError(
            f"{folder}: no tokenizer here (neither tokenizer.json nor vocab.json + merges.txt); it holds {holds(folder)}. "
            f"Accepted is {ACCEPTED}"
        )
    loader = transformers.GPT2Tokenizer if bare else transformers.AutoTokenizer
    try:
        how: dict[str, Any] = {} if bare else {"trust_remote_code": False}
        tokenizer = loader.from_pretrained(folder, **how)
    except Exception as error:  # damaged files raise many kinds, and messages of many lines: they stay in the cause
        said = (str(error).splitlines() or [""])[0][:150]
        raise WeightsError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {said})") from error
    if tokenizer.eos_token_id is None:
        raise WeightsError(f"{folder}: the tokenizer has no EOS token, so no reply could ever end")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE like GPT-2's (Radford et al. 2019, section 2.2), trained on these texts; EOS is token 0.

    The emotion words are repeated often enough to become single tokens, which they are in GPT-2's own vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(itertools.chain(texts, [" " + " ".join(EMOTIONS)] * 1000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS, clean_up_tokenization_spaces=False
    )


def add_special_tokens(tokenizer: Any) -> int:
    """Add the markers of the prompt where they are missing; returns how many were new."""
    return tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Text -> ids, with a leading space (so that the first word is the same token as inside a sentence). A marker that
    somebody typed into their text stays ordinary characters."""
    return tokenizer.encode(" " + text.strip(), add_special_tokens=False, split_special_tokens=True)


def emotion_ids(tokenizer: Any) -> list[list[int]]:
    """The tokens of each emotion word, in the order of EMOTIONS."""
    return [encode_text(tokenizer, word) for word in EMOTIONS]


def plain_text(turns: Sequence[Turn]) -> str:
    """A conversation for pre-training: one turn a line, no markers, so that base is a plain language model."""
    return "\n".join(turn.text for turn in turns)


def encode_prompt(tokenizer: Any, context: Sequence[Turn], client: Turn, config: PromptConfig) -> tuple[list[int], int]:
    """-> (ids, context turns dropped). The oldest whole turns go first until the prompt fits config.max_tokens; the client's
    utterance always stays whole, even where it alone is longer than that."""
    before, now, dropped = encode_parts(tokenizer, context, client, config)
    return before + now, dropped


def encode_parts(
    tokenizer: Any, context: Sequence[Turn], client: Turn, config: PromptConfig
) -> tuple[list[int], list[int], int]:
    """The same in two parts: the turns before, and the client now."""
    marker = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    tail = [marker["<|utterance|>"], *encode_text(tokenizer, client.text)]
    if "emotion" in config.format:
        if config.emotion == "inferred":
            tail += [marker["<|emotion|>"]]
        elif client.emotion is not None:
            tail += [marker["<|emotion|>"], *encode_text(tokenizer, client.emotion)]
    if config.emotion == "given":
        tail += [marker["<|reply|>"]]

    turns = (
        [[marker[f"<|{t.speaker}|>"], *encode_text(tokenizer, t.text)] for t in context]
        if "context" in config.format
        else []
    )
    kept: list[list[int]] = []
    room = config.max_tokens - len(tail)
    for turn in reversed(turns):
        room -= len(turn)
        if room < 0:
            break
        kept.insert(0, turn)
    return [i for turn in kept for i in turn], tail, len(turns) - len(kept)


def encode_reply(tokenizer: Any, therapist: Turn, client_emotion: str | None, config: PromptConfig) -> list[int]:
    """The supervised part: emotion, <|text|>, text, and exactly one EOS. Never cut."""
    marker = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    inferred = (
        [*encode_text(tokenizer, client_emotion or ""), marker["<|reply|>"]] if config.emotion == "inferred" else []
    )
    stated = encode_text(tokenizer, therapist.emotion) if therapist.emotion else []
    return [*inferred, *stated, marker["<|text|>"], *encode_text(tokenizer, therapist.text), tokenizer.eos_token_id]


def check_emotion(exchange: Exchange, config: PromptConfig) -> None:
    """Raises DataError where the model is to learn an emotion that is not annotated."""
    if config.emotion == "inferred" and exchange.client.emotion is None:
        raise DataError(
            f"conversation {exchange.conversation_id}: a client turn has no emotion, which prompt.emotion: inferred needs; "
            "annotate it or set prompt.emotion: given"
        )


def encode(tokenizer: Any, exchange: Exchange, config: PromptConfig, longest: int) -> Example:
    """One exchange -> Example. Raises DataError where utterance + reply exceed `longest` (the model's positions), or where
    `emotion: inferred` meets a client turn without an emotion."""
    check_emotion(exchange, config)
    reply = encode_reply(tokenizer, exchange.therapist, exchange.client.emotion, config)
    # Beside a long reply there may be room for less context than the settings allow.
    config = dataclasses.replace(config, max_tokens=max(min(config.max_tokens, longest - len(reply)), 1))
    before, now, dropped = encode_parts(tokenizer, exchange.context, exchange.client, config)
    prompt = before + now
    if len(prompt) + len(reply) > longest:
        raise DataError(
            f"conversation {exchange.conversation_id}: the client's utterance and the reply take {len(prompt) + len(reply)} tokens, "
            f"more than the model's {longest} positions; shorten them, or take a model with more (model.n_positions)"
        )
    return Example(prompt, reply, dropped, len(before))


def parse_reply(tokenizer: Any, ids: Sequence[int]) -> ParsedReply:
    """Generated ids (EOS included where it came) -> emotion and text; tolerant of any order the model may have written."""
    marker = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ids = list(ids)
    ended = tokenizer.eos_token_id in ids
    if ended:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    client_ids: list[int] = []
    stated: list[int] = []
    if marker["<|text|>"] in ids:
        border = ids.index(marker["<|text|>"])
        stated, ids = ids[:border], ids[border + 1 :]
        if marker["<|reply|>"] in stated:
            border = stated.index(marker["<|reply|>"])
            client_ids, stated = stated[:border], stated[border + 1 :]

    def read(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    client_emotion, emotion = (word if (word := read(part)) in EMOTIONS else None for part in (client_ids, stated))
    return ParsedReply(client_emotion, emotion, read(ids), ended)
