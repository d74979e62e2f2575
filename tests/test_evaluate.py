"""Evaluation: answers do not depend on their batch, scores are what the formulas say, the table holds what it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from therapy_jax import classifiers, consensus, dialogue, evaluate, gpt2, prompts, readings, results_table, sharding
from therapy_jax.config import MeshConfig, PromptConfig, RewardWeights, SamplingConfig
from therapy_jax.dialogue import EMOTIONS
from therapy_jax.rewards.batch import Fixed, make_references
from therapy_jax.rewards.combine import RewardError
from therapy_jax.rewards.scoring import HostRewards
from therapy_jax.rewards.words import make_vocabulary

PROMPT = PromptConfig(max_tokens=60)


@pytest.fixture(scope="module")
def data():
    return dialogue.read(None, "jsonl")


@pytest.fixture(scope="module")
def tokenizer(data):
    made = prompts.train_tokenizer([e.client.text + e.therapist.text for e in data["train"]], 700)
    prompts.add_special_tokens(made)
    return made


@pytest.fixture(scope="module")
def model(tokenizer):
    return gpt2.GPT2(gpt2.GPT2Config(len(tokenizer), 160, 32, 1, 2, eos_token_id=tokenizer.eos_token_id))


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(lambda x: 4 * x, gpt2.init(model.config, jax.random.key(0)))


@pytest.fixture(scope="module")
def rows(data, tokenizer):
    return [prompts.encode_prompt(tokenizer, e.context, e.client, PROMPT)[0] for e in data["test"][:13]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch_or_on_the_mesh(rows, model, params, temperature):
    cfg = SamplingConfig(max_new_tokens=8, temperature=temperature)

    def answers(rows, batch_size, devices):
        mesh = sharding.make_mesh(MeshConfig(devices))
        key = jax.random.key(3)
        return evaluate.answer(params, rows, key, model=model, cfg=cfg, batch_size=batch_size, mesh=mesh)

    together = answers(rows, 8, 1)
    assert len(together) == len(rows) and all(0 < len(reply) <= 8 for reply in together)
    assert answers(rows, 8, 8) == together
    assert answers(rows, 5, 1) == together
    assert answers(rows[:1], 1, 1) == together[:1]


def test_every_row_is_in_a_batch_and_fits(rows):
    parts = evaluate.chunks(rows, 4, room=10, n_positions=160)
    assert sorted({i for part, _ in parts for i in part}) == list(range(len(rows)))
    assert all(len(part) == 4 and max(len(rows[i]) for i in part) <= length <= 150 for part, length in parts)


def test_perplexity_and_emotion_reading_equal_the_full_distribution(rows, data, tokenizer, model, params):
    mesh = sharding.make_mesh(MeshConfig(1))
    examples = [prompts.encode(tokenizer, e, PROMPT, 160) for e in data["test"][:13]]

    def logprob(prompt, reply):  # one sequence, no padding, plain log-softmax
        ids = jnp.asarray([prompt + reply])
        logits = gpt2.GPT2(model.config).apply({"params": params}, ids, jnp.ones(ids.shape, bool))
        logs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits))[0])
        return sum(logs[len(prompt) + i - 1, token] for i, token in enumerate(reply))

    losses, counts = evaluate.losses_of(params, examples, model=model, batch_size=4, mesh=mesh)
    expected = [-logprob(e.prompt, e.reply) for e in examples]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert counts.tolist() == [len(e.reply) for e in examples]
    mean = sum(expected) / sum(len(e.reply) for e in examples)
    assert evaluate.perplexity_of(losses, counts) == pytest.approx(np.exp(mean), rel=1e-4)

    words = prompts.emotion_ids(tokenizer)
    likeliest = [EMOTIONS[int(np.argmax([logprob(row, word) for word in words]))] for row in rows]
    assert evaluate.read_emotions(params, rows, tokenizer, model=model, batch_size=16, mesh=mesh) == likeliest


@pytest.fixture(scope="module")
def scorer(data, tokenizer, model, params):
    """As a run makes it, with classifiers that were never trained: heads of zeros answer uniformly."""
    width = readings.read(params, jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool), model=model).shape[1]

    def head(classes):
        made = classifiers.Head(classes=classes, hidden=0, members=1).init(jax.random.key(0), jnp.zeros((1, width)))
        return jax.tree.map(jnp.zeros_like, made["params"])

    emotions = classifiers.prior(classifiers.label_ids("emotion", data["train"])[1::2], len(EMOTIONS))
    n = model.config.n_embd
    frozen = classifiers.Frozen(head(7), head(10), jnp.asarray(emotions), jnp.full(10, 0.1), jnp.zeros(n), jnp.eye(n))
    fixed = Fixed(make_vocabulary(tokenizer, model.config.padded_vocab_size), frozen)
    weights = dataclasses.asdict(RewardWeights())
    return evaluate.Scorer(params, model, tokenizer, fixed, weights, None, HostRewards(None, "", None))


def score(turns, exchanges, scorer):
    refs = make_references(exchanges, scorer.trunk, scorer.tokenizer, model=scorer.model)
    return evaluate.of_turns(turns, exchanges, refs, scorer, PROMPT)


def test_the_therapists_own_replies_score_full_marks(data, scorer):
    exchanges = data["test"][:20]
    system = score([e.therapist for e in exchanges], exchanges, scorer)
    row = evaluate.row(system, exchanges, lambda texts: [e.therapist.emotion for e in exchanges])
    assert system.terms["rouge_l"] == system.terms["semantic"] == system.terms["ending"] == pytest.approx(1.0)
    assert row["rouge1"] == row["rougeL"] == row["emotion_stated_accuracy"] == row["stop_rate"] == pytest.approx(1.0)
    assert row["emotion_expressed_macro_f1"] == pytest.approx(1.0)  # by an evaluator that is always right
    # no reply says what its own reference does not, and each is as long: nothing is lost but what is repeated
    assert system.terms["length"] == 0.0
    expected = sum(weight * system.terms[name] for name, weight in scorer.weights.items())
    assert system.reward == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_replies_counts_their_text_and_end_alone(data, tokenizer, model, params):
    """Against the losses of the same replies as SFT examples, less those of emotion and marker, one by one."""
    mesh = sharding.make_mesh(MeshConfig(1))
    exchanges = data["test"][:5]
    judge = evaluate.LanguageModel(params, model, tokenizer, PROMPT)
    texts = ["I hear you.", "", *(e.therapist.text for e in exchanges[2:])]
    got = evaluate.language_perplexity(judge, texts, exchanges, batch_size=4, mesh=mesh)
    total, count = 0.0, 0
    for text, e in zip(texts, exchanges, strict=True):
        turn = dialogue.Turn("therapist", text, e.therapist.emotion)
        example = prompts.encode(tokenizer, dataclasses.replace(e, therapist=turn), PROMPT, 160)
        ids = jnp.asarray([example.prompt + example.reply])
        logits = gpt2.GPT2(model.config).apply({"params": params}, ids, jnp.ones(ids.shape, bool))
        logs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits))[0])
        said = [*prompts.encode_text(tokenizer, text), tokenizer.eos_token_id]
        start = ids.shape[1] - len(said)
        total += sum(logs[start + i - 1, token] for i, token in enumerate(said))
        count += len(said)
    assert got == pytest.approx(np.exp(-total / count), rel=1e-4)


def test_perplexity_of_replies_that_do_not_fit_is_that_of_their_beginning(data, tokenizer, model, params):
    """A baseline answers anybody with anything: what is too long for the judge ends no evaluation."""
    mesh = sharding.make_mesh(MeshConfig(1))
    (e,) = data["test"][:1]
    judge = evaluate.LanguageModel(params, model, tokenizer, PROMPT)
    text = "I hear you. " * 200
    got = evaluate.language_perplexity(judge, [text], [e], batch_size=1, mesh=mesh)
    most = model.config.n_positions
    turn = dialogue.Turn("therapist", text, e.therapist.emotion)
    prompt, _ = prompts.encode_prompt(tokenizer, e.context, e.client, PROMPT)
    written = prompts.encode_reply(tokenizer, turn, None, PROMPT)
    ids = jnp.asarray([(prompt + written)[:most]])
    assert len(prompt) < most / 2 and len(prompt + written) > most
    logits = gpt2.GPT2(model.config).apply({"params": params}, ids, jnp.ones(ids.shape, bool))
    logs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits))[0])
    start = len(prompt) + written.index(tokenizer.convert_tokens_to_ids("<|text|>")) + 1
    lost = [logs[i - 1, int(ids[0, i])] for i in range(start, most)]
    assert got == pytest.approx(np.exp(-np.mean(lost)), rel=1e-4)


def test_alarm_rings_only_where_the_reward_rises_and_something_else_falls():
    before = {"reward": 0.2, "meteor": 0.10, "distinct2": 0.5, "stop_rate": 0.95, "commonest_share": 0.02}

    def alarm(**changes):
        as_logged = [{f"validation/{k}": v for k, v in d.items()} for d in (before, {**before, **changes})]
        return evaluate.alarm(*as_logged)

    assert alarm(reward=0.3) is None
    assert alarm(reward=0.1, meteor=0.01) is None  # nothing is gamed where the reward itself falls
    assert alarm(reward=0.3, meteor=0.11, distinct2=0.6) is None
    assert "meteor 0.100 -> 0.050" in str(alarm(reward=0.3, meteor=0.05))
    assert "distinct2" in str(alarm(reward=0.3, distinct2=0.2)) and "stop_rate" in str(alarm(reward=0.3, stop_rate=0.1))
    assert "commonest_share" in str(alarm(reward=0.3, commonest_share=0.4))
    assert alarm(reward=0.3, meteor=0.091) is None and alarm(reward=0.3, meteor=0.089)
    before["perplexity"] = 9.0
    assert "perplexity" in str(alarm(reward=0.3, perplexity=13.6)) and alarm(reward=0.3, perplexity=13.4) is None
    before["perplexity"], lost = 9.0, {"validation/reward": 0.3}  # a restart without the judge, and without WordNet
    assert evaluate.alarm({f"validation/{k}": v for k, v in before.items()}, lost) is None


def test_a_reward_that_is_no_number_names_its_term_and_the_reply(data, scorer):
    exchanges = data["test"][:4]
    turns = [e.therapist for e in exchanges]
    share = scorer._replace(device_custom=lambda b: {"share": b.words_mask.sum(-1) / b.words_mask.sum(-1)})
    assert score(turns, exchanges, share).terms["share"] == 1.0
    turns[2] = dataclasses.replace(turns[2], text="?!")  # no word at all: 0 / 0
    with pytest.raises(RewardError, match=r"reward term share is nan for sample 2 \(reply: '\?!'\)"):
        score(turns, exchanges, share)
    with pytest.raises(RewardError, match="gives no shore; it gives share"):
        score(turns[:2], exchanges[:2], share._replace(weights={"shore": 1.0}))


def test_a_constant_wins_no_diversity_and_stands_in_the_table(data, scorer):
    exchanges = data["test"][:20]

    def row_of_turns(turns):
        return evaluate.row(score(turns, exchanges, scorer), exchanges, None)

    constant, chosen = evaluate.constants(data["train"][:80], exchanges, row_of_turns, 0)
    assert constant["commonest_share"] == 1.0 and {"bleu", "rouge1", "rougeL"} <= set(chosen)
    results = {
        "data": {"name": "mesc", "split": "test", "n": 20},
        "systems": {"base": {"reward": -0.5, "perplexity": 33.3}, "constant": constant},
        "emotion_majority_accuracy": 0.99,
    }
    console = Console(width=80, record=True)
    console.print(results_table.screen(results))
    text = console.export_text()
    assert "33.3" in text and "0.9934" in text and "0.9900" in text and "…" not in text


def test_data_without_emotions_has_a_row_without_them(data, scorer):
    bare = [dataclasses.replace(e, therapist=dataclasses.replace(e.therapist, emotion=None)) for e in data["test"][:20]]
    row = evaluate.row(score([e.therapist for e in bare], bare, scorer), bare, None)
    assert row["rougeL"] == pytest.approx(1.0) and not [name for name in row if "emotion" in name]
    console = Console(width=80, record=True)
    results = {"data": {"name": "jsonl", "split": "test", "n": 20}, "systems": {"x": row}}
    console.print(results_table.screen(results | {"emotion_majority_accuracy": None}))
    assert "no emotion is annotated" in console.export_text()


@pytest.mark.parametrize("devices", [1, 4])  # on 4, the two prompts of a batch of 8 // 3 replies become four
def test_the_agreed_answer_is_one_of_its_candidates_and_of_one_it_is_that_one(rows, tokenizer, model, params, devices):
    how = {
        "model": model,
        "cfg": SamplingConfig(max_new_tokens=8, temperature=1.0),
        "batch_size": 8,
        "mesh": sharding.make_mesh(MeshConfig(devices)),
    }
    key = jax.random.key(5)
    agreed = [evaluate.agreed_answer(params, rows, key, candidates=n, tokenizer=tokenizer, **how) for n in (1, 3)]
    assert agreed[0] == evaluate.answer(params, rows, key, **how)
    drawn = [evaluate.answer(params, rows, k, **how) for k in jax.random.split(key, 3)]
    texts = [[prompts.parse_reply(tokenizer, ids).text for ids in replies] for replies in zip(*drawn, strict=True)]
    for ids, replies, known in zip(agreed[1], zip(*drawn, strict=True), texts, strict=True):
        assert ids in replies
        assert known[replies.index(ids)] == known[consensus.most_agreed(known)]


def test_each_metric_has_the_figure_of_its_own_constant(monkeypatch):
    names = ("bleu", "rouge1", "rougeL")
    chosen = {n: dialogue.Turn("therapist", n) for n in names}
    monkeypatch.setattr(evaluate.baselines, "constant", lambda train, seed: chosen)
    train = [dialogue.Exchange("c", (), dialogue.Turn("client", "a"), dialogue.Turn("therapist", "b", "joy"))]

    def row(turns):
        assert [t.emotion for t in turns] == ["joy"] * 5
        return {m: float(10 * names.index(turns[0].text) + i) for i, m in enumerate((*names, "reward"))}

    found, texts = evaluate.constants(train, train * 5, row, 0)
    assert found == {"bleu": 0.0, "rouge1": 11.0, "rougeL": 22.0, "reward": 23.0} and texts == {n: n for n in names}
