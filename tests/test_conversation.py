"""A conversation: the gate first, the prompt as in training, nothing shown that was not checked, nothing unescaped."""

import dataclasses
import functools
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from therapy_jax import (
    browser,
    classifiers,
    conversation,
    dialogue,
    evaluate,
    gpt2,
    prompts,
    readings,
    readout,
    safety,
    sampling,
)
from therapy_jax.config import Config, PromptConfig, SamplingConfig
from therapy_jax.conversation import Answer, Message, Speaker, say
from therapy_jax.dialogue import EMOTIONS, Exchange, Turn
from therapy_jax.rewards.batch import Fixed, make_references
from therapy_jax.rewards.scoring import HostRewards
from therapy_jax.rewards.words import make_vocabulary

CONFIG = Config(prompt=PromptConfig(max_tokens=40), sampling=SamplingConfig(max_new_tokens=24))  # decoded greedily
HARMLESS, CRISIS = "I slept badly again.", "I want to kill myself."


@pytest.fixture(scope="module")
def data():
    return dialogue.read(None, "jsonl")


@pytest.fixture(scope="module")
def tokenizer(data):
    made = prompts.train_tokenizer([f"{e.client.text} {e.therapist.text}" for e in data["train"]], 700)
    prompts.add_special_tokens(made)
    return made


@pytest.fixture(scope="module")
def speakers(tokenizer):
    """Two models of random weights."""
    model = gpt2.GPT2(gpt2.GPT2Config(len(tokenizer), 128, 32, 1, 2, eos_token_id=tokenizer.eos_token_id))
    return [
        Speaker(name, jax.tree.map(lambda x: 4 * x, gpt2.init(model.config, jax.random.key(i))), model, tokenizer)
        for i, name in enumerate(("sft", "ppo"))
    ]


@pytest.fixture
def writes(monkeypatch, tokenizer):
    """Makes every model write these words, token by token."""

    def write(text, stated="neutral"):
        ids = prompts.encode_reply(tokenizer, Turn("therapist", text, stated), "fear", CONFIG.prompt)
        monkeypatch.setattr(sampling, "stream", lambda *_, **__: iter(ids))

    return write


def test_the_gate_stands_before_the_models():
    broken = Speaker("ppo", None, None, None)  # whoever asks it fails  # pyright: ignore[reportArgumentType]
    ((message,),) = say((), CRISIS, [broken], None, CONFIG)
    assert message.crisis == "suicide" and message.fixed == safety.answer("suicide", CONFIG.safety)
    assert message.answers == () and message.client.text == CRISIS
    with pytest.raises(AttributeError):
        list(say((), HARMLESS, [broken], None, CONFIG))


@pytest.mark.parametrize("text", ["suic<b>ide", "I will hang mys<i>elf"])
def test_the_gate_reads_what_models_would_read(text):
    """Cleaning takes markup away, and joins what it parted."""
    broken = Speaker("ppo", None, None, None)  # pyright: ignore[reportArgumentType]
    ((message,),) = say((), text, [broken], None, CONFIG)
    assert message.crisis == "suicide" and message.answers == ()


def test_what_the_gate_answered_no_model_reads_later(speakers):
    *_, said = say((), HARMLESS, speakers, None, CONFIG)
    *_, said = say(said, CRISIS, speakers, None, CONFIG)
    after = "It rained all day here, so I stayed in and read."
    *_, later = say(said, after, speakers, None, CONFIG)
    *_, without = say(said[:1], after, speakers, None, CONFIG)
    assert len(later) == 3 and later[2].crisis is None
    assert later[2].reminder == safety.reminder(CONFIG.safety) and without[1].reminder is None
    assert safety.reminder(CONFIG.safety) in browser.as_html(later, (), {})
    assert [a.prompt for a in later[2].answers] == [a.prompt for a in without[1].answers]


@pytest.mark.parametrize("emotion", ["given", "inferred"])
def test_the_prompt_is_that_of_training(speakers, tokenizer, emotion):
    """Up to the border between prompt and reply, and with an emotion that was set up to where the reply itself begins."""
    config = dataclasses.replace(CONFIG, prompt=PromptConfig(emotion=emotion, max_tokens=40))
    *_, said = say((), HARMLESS, speakers, None, config, "fear")
    *_, said = say(said, "It's the noise.", speakers, None, config, "anger")
    led = said[0].answers[-1]  # the last speaker's
    turns = (Turn("client", HARMLESS, "fear"), Turn("therapist", led.text, led.emotion))
    exchange = Exchange(
        "", turns if led.text else turns[:1], Turn("client", "It's the noise.", "anger"), Turn("therapist", "Yes.")
    )
    example = prompts.encode(tokenizer, exchange, config.prompt, 128)
    whole, start = example.prompt + example.reply, tokenizer.convert_tokens_to_ids("<|reply|>")
    assert {a.prompt for a in said[1].answers} == {tuple(whole[: whole.index(start) + 1])}
    assert said[1].emotion == "anger" and [a.client_emotion for a in said[1].answers] == ["anger"] * 2
    left_open = conversation.prompt_of(tokenizer, exchange.context, Turn("client", "It's the noise."), config.prompt)
    if emotion == "inferred":
        assert left_open == example.prompt


def test_formats_without_emotion_are_told_none(speakers, tokenizer):
    config = dataclasses.replace(CONFIG, prompt=PromptConfig("context", max_tokens=40))
    *_, said = say((), HARMLESS, speakers[:1], None, config, "fear")
    assert tokenizer.convert_tokens_to_ids("<|emotion|>") not in said[0].answers[0].prompt
    assert said[0].answers[0].client_emotion is None


def test_the_answer_is_what_generate_gives(speakers, tokenizer):
    """The first answer, drawn at a temperature: the tokens of `generate` for the same prompt and key."""
    config = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, temperature=0.9))
    *_, said = say((), HARMLESS, speakers, None, config, "joy")
    for answer, speaker in zip(said[0].answers, speakers, strict=True):
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        asked = np.asarray([answer.prompt], np.int32)
        reply = sampling.generate(
            speaker.params, sampling.Prompt(asked, np.ones_like(asked, bool)), key,
            model=speaker.model, cfg=SamplingConfig(24, temperature=0.9),
        )  # fmt: skip
        assert np.asarray(reply.tokens[reply.mask]).tolist() == list(answer.ids)


def test_only_whole_sentences_are_given_out(writes, speakers):
    writes("That sounds hard. What would help? Sleep, perhaps")
    texts = [said[0].answers[0].text for said in say((), HARMLESS, speakers[:1], None, CONFIG)]
    assert list(dict.fromkeys(texts)) == [
        "", "That sounds hard.", "That sounds hard. What would help?", "That sounds hard. What would help? Sleep, perhaps",
    ]  # fmt: skip


@pytest.mark.parametrize("last", ["", " And rest.", " And"])
def test_what_the_check_finds_never_shows(writes, speakers, last):
    harm = "Take 40 mg of diazepam tonight."
    assert safety.check_reply(harm) is not None and safety.check_reply("That sounds hard.") is None
    writes(f"That sounds hard. {harm}{last}")
    states = [said[0].answers[0] for said in say((), HARMLESS, speakers[:1], None, CONFIG)]
    assert {a.text for a in states} == {"", "That sounds hard.", safety.WITHHELD}
    assert states[-1].withheld and states[-1].text == safety.WITHHELD and states[-1].ended
    assert not any("40" in a.text for a in states)


def test_a_terminal_is_told_nothing_by_a_model(writes, speakers):
    writes("Red \x1b[31malert\x07\u202e.")
    *_, said = say((), HARMLESS, speakers[:1], None, CONFIG)
    assert said[0].answers[0].text == "Red [31malert."


def test_what_is_checked_is_what_is_shown(writes, speakers):
    writes("I\u00a0hear\tyou.")
    *_, said = say((), HARMLESS, speakers[:1], None, CONFIG)
    assert said[0].answers[0].text == "I hear you."
    writes("Take 40\x07 mg of diaze\x07pam tonight.")  # the check alone would read two words
    *_, said = say((), HARMLESS, speakers[:1], None, CONFIG)
    assert said[0].answers[0].text == safety.WITHHELD


def test_a_message_too_long_says_so_before_a_model_is_asked(speakers):
    with pytest.raises(conversation.MessageError, match="ppo reads at most 104"):
        list(say((), "The bus was late. " * 60, speakers[1:], None, CONFIG))


def test_the_reader_is_the_head_on_the_turns_that_models_read(speakers, data):
    """The same probabilities as from readings.of_clients with many exchanges at once."""
    trunk, head = speakers[0], classifiers.Head(len(EMOTIONS))
    width = readings.width("client_emotion", 32)
    params = jax.tree.map(lambda x: 9 * x, head.init(jax.random.key(1), jnp.zeros((1, width)))["params"])
    reader, chosen = conversation.Reader(trunk, head, params), data["test"][:5]
    read = readings.of_clients(trunk.params, chosen, trunk.tokenizer, model=trunk.model, max_tokens=40)
    together = np.exp(np.asarray(head.apply({"params": params}, read)))
    for exchange, expected in zip(chosen, together, strict=True):
        emotion, certainty = conversation.read_emotion(reader, exchange.context, exchange.client, 40)
        assert emotion == EMOTIONS[expected.argmax()] and certainty == pytest.approx(expected.max(), abs=1e-5)


@pytest.fixture(scope="module")
def scorer(speakers, tokenizer):
    params, model, n = speakers[0].params, speakers[0].model, 32

    def head(classes):
        module = classifiers.Head(classes)
        return module.init(jax.random.key(classes), jnp.zeros((1, readings.width("emotion", n))))["params"]

    frozen = classifiers.Frozen(head(7), head(10), jnp.full(7, 1 / 7), jnp.full(10, 0.1), jnp.zeros(n), jnp.eye(n))
    fixed = Fixed(make_vocabulary(tokenizer, model.config.padded_vocab_size), frozen)
    return evaluate.Scorer(params, model, tokenizer, fixed, {}, None, HostRewards(None, "", None))


def test_the_terms_shown_are_those_of_the_reward_whatever_the_reference(scorer, speakers, data, tokenizer):
    """Scored as PPO scores, beside two different therapists' replies: the terms that are shown do not move."""
    one, other = data["test"][3], data["test"][8]
    said = [prompts.encode_reply(tokenizer, turn, None, CONFIG.prompt) for turn in (other.therapist, one.therapist)]
    said.append(said[0][1:-1] * 2)  # repeats itself and does not end
    shown = readout.measure(scorer, one.context, one.client, [Answer("ppo", "", ids=tuple(ids)) for ids in said])
    for therapist in (one.therapist, other.therapist):
        beside = [dataclasses.replace(one, therapist=therapist)] * 3
        refs = make_references(beside, scorer.trunk, tokenizer, model=scorer.model)
        _, terms = evaluate.reward_terms(scorer, said, refs, beside)
        for name in readout.FREE:
            np.testing.assert_allclose([m.terms[name] for m in shown], terms[name], atol=1e-5)
    assert shown[2].terms["repetition"] < shown[0].terms["repetition"] and shown[2].terms["ending"] == 0.0
    assert [sum(m.expressed.values()) for m in shown] == pytest.approx([1.0] * 3, abs=1e-5)
    assert shown[1].words == len(tokenizer.decode(said[1][2:-1]).replace("-", " ").split())


def test_the_loupe_shows_the_samplers_logprobs(speakers, tokenizer):
    ours, theirs = speakers
    asked = [prompts.encode_text(tokenizer, HARMLESS)]
    cfg = SamplingConfig(max_new_tokens=10)
    prompt = sampling.Prompt(np.asarray(asked, np.int32), np.ones((1, len(asked[0])), bool))
    reply = sampling.generate(ours.params, prompt, jax.random.key(4), model=ours.model, cfg=cfg)
    ids = np.asarray(reply.tokens[reply.mask]).tolist()
    rows = readout.loupe(ours, theirs, Answer("sft", "", prompt=tuple(asked[0]), ids=tuple(ids)))
    assert "".join(text for text, _, _ in rows) == tokenizer.decode(ids)
    np.testing.assert_allclose([row[1] for row in rows], reply.logprobs[reply.mask], atol=1e-4)
    logits = theirs.model.apply(
        {"params": theirs.params}, jnp.asarray([asked[0] + ids]), jnp.ones((1, len(asked[0] + ids)), bool)
    )
    other = np.asarray(jax.nn.log_softmax(logits)[0, len(asked[0]) - 1 : -1])[np.arange(len(ids)), ids]
    np.testing.assert_allclose([row[2] for row in rows], other, atol=1e-4)


class Text(HTMLParser):
    """The elements and the text of a page, as a browser's parser finds them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.attributes = set(), "", set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_markup_in_a_dialogue_stays_text_on_the_page():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> \"'&amp;"
    known = browser.Details(readout.Measures({"context": 0.5}, {"joy": 1.0}, 3), [(evil, -1.0, -2.0)])
    said = (
        Message(Turn("client", evil), answers=(Answer(evil, evil, evil, ids=(1,)), Answer("a", evil, withheld=evil))),
        Message(Turn("client", evil), None, "suicide", evil),
    )
    seen = Text()
    seen.feed(browser.as_html(said, ((known, None), ()), {}, evil))
    assert not seen.tags & {"script", "img"} and not any(name.startswith("on") for name in seen.attributes)
    assert (
        seen.text.count(evil) == 9
    )  # two clients, name, emotion, two texts, why one was withheld, the gate, the problem
    assert seen.text.count(evil.replace(" ", "·")) == 1


@functools.cache
def bars(value):
    seen = []

    class Bars(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "i":
                seen.append(dict(part.split(":") for part in dict(attrs)["style"].split(";")))

    Bars().feed(browser.signed_bar("context", value, 0.5))
    return seen[0]


@pytest.mark.parametrize(("value", "left", "width"), [(1.0, 50, 50), (-1.0, 0, 50), (-0.5, 25, 25), (0.0, 50, 0)])
def test_a_bar_reaches_from_the_middle_to_its_value(value, left, width):
    assert bars(value)["left"] == f"{left}.0%" and bars(value)["width"] == f"{width}.0%"
