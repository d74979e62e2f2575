"""Readings against torch's hidden states, heads against torch's loss, whitening against scikit-learn's PCA."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight

from therapy_jax import classifiers, dialogue, gpt2, prompts, readings, tfidf, weights
from therapy_jax.config import ClassifierConfig, Config, ConfigError, PromptConfig
from therapy_jax.dialogue import EMOTIONS, STRATEGIES, Exchange, Turn
from therapy_jax.rewards import batch

QUICK = ClassifierConfig(epochs=6, batch_size=16, hidden=8, members=2, learning_rate=3e-3)
CONFIG = Config(classifiers=QUICK, prompt=PromptConfig(max_tokens=40))


@pytest.fixture(scope="module")
def sample() -> dict[str, list[Exchange]]:
    """A part of the built-in sample: enough to train on, in seconds."""
    return {split: part[:80] for split, part in dialogue.read(None, "jsonl").items()}


@pytest.fixture(scope="module")
def trunk(sample):
    """A random GPT-2 of three layers -> (GPT2Config, params, tokenizer)."""
    tokenizer = prompts.train_tokenizer([e.client.text for e in sample["train"]], 400)
    prompts.add_special_tokens(tokenizer)
    config = gpt2.GPT2Config(
        len(tokenizer), n_positions=64, n_embd=24, n_layer=3, n_head=3, eos_token_id=tokenizer.eos_token_id
    )
    params = gpt2.init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)  # biases and scales move too: a zero would hide whether it is read at all
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return config, jax.tree.unflatten(tree, moved), tokenizer


@pytest.fixture(scope="module")
def hidden_states(trunk, tmp_path_factory):
    """ids -> the last hidden states f32[T, D] that torch computes for one text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trunk")
    weights.save_pretrained(folder, *trunk)
    model = transformers.GPT2Model.from_pretrained(folder).eval()

    def states(ids):
        with torch.no_grad():
            return model(torch.tensor([list(ids)])).last_hidden_state[0].numpy()

    return states


def test_a_reading_is_pooled_from_torchs_hidden_states(trunk, hidden_states):
    config, params, _ = trunk
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 9)
    plain = hidden_states(ids)
    both = np.concatenate([plain, np.asarray(params["wte"])[ids]], -1)
    expected = [*both.mean(0), *both.max(0), *np.zeros(readings.BAG)]
    kept = {int(i) * 2654435769 % 2**32 // 2**21 for i in ids}  # Knuth, TAOCP 6.4, in exact integers
    for entry in kept:
        expected[4 * config.n_embd + entry] = len(kept) ** -0.5
    got = readings.read(params, jnp.asarray(ids)[None], jnp.ones((1, 9), bool), model=gpt2.GPT2(config))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)  # float32, two implementations of three layers
    np.testing.assert_allclose(got[: config.n_embd], plain.mean(0), rtol=1e-4, atol=1e-4)


def test_padding_and_what_it_hides_do_not_move_a_reading(trunk):
    config, params, _ = trunk
    rng = np.random.default_rng(1)
    ids, program = rng.integers(0, config.vocab_size, (3, 6)), jax.jit(readings.read, static_argnames="model")
    bare = program(params, ids, np.ones((3, 6), bool), model=gpt2.GPT2(config))
    for left, right in ((0, 5), (5, 0), (2, 3)):
        garbage = [rng.integers(0, config.vocab_size, (3, n)) for n in (left, right)]
        tokens, mask = np.concatenate([garbage[0], ids, garbage[1]], 1), np.zeros((3, 11), bool)
        mask[:, left : left + 6] = True
        got = program(params, tokens, mask, model=gpt2.GPT2(config))
        np.testing.assert_allclose(got, bare, rtol=1e-4, atol=1e-4)  # sums in another order
    assert not np.asarray(program(params, ids, np.zeros((3, 6), bool), model=gpt2.GPT2(config))).any()


def test_many_readings_are_those_of_each_text_alone(trunk):
    config, params, _ = trunk
    model, rng = gpt2.GPT2(config), np.random.default_rng(2)
    rows = [rng.integers(0, config.vocab_size, n).tolist() for n in (3, 40, 1, 64, 90, 33)]
    got = readings.of_texts(params, rows, model=model)
    for row, reading in zip(rows, got, strict=True):
        kept = jnp.asarray(row[:64])[None]
        alone = readings.read(params, kept, jnp.ones(kept.shape, bool), model=model)[0]
        np.testing.assert_allclose(reading, alone, rtol=1e-4, atol=1e-4)
    assert readings.of_texts(params, [], model=model).shape == (0, got.shape[1])


def test_a_client_is_read_in_context_and_without_the_label(trunk, hidden_states):
    config, params, tokenizer = trunk
    turns = (Turn("client", "I was there."), Turn("therapist", "When was that?"))
    exchange = Exchange("1", turns, Turn("client", "On Sunday.", "joy"), Turn("therapist", "Go on."))
    relabelled = dataclasses.replace(exchange, client=dataclasses.replace(exchange.client, emotion="anger"))
    alone = dataclasses.replace(exchange, context=())
    got = readings.of_clients(params, [exchange, relabelled, alone], tokenizer, model=gpt2.GPT2(config), max_tokens=64)
    np.testing.assert_array_equal(got[0], got[1])
    pieces = [("<|client|>", " I was there."), ("<|therapist|>", " When was that?"), ("<|utterance|>", " On Sunday.")]
    context, now = [], []
    for marker, text in pieces:
        now = tokenizer.encode(text)
        context += [tokenizer.convert_tokens_to_ids(marker), *(now if marker != "<|utterance|>" else [])]
    now.append(tokenizer.convert_tokens_to_ids("<|emotion|>"))
    states = hidden_states(context + now)
    d, half = config.n_embd, 4 * config.n_embd + readings.BAG
    np.testing.assert_allclose(got[0, :d], states[len(context) :].mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[0, half : half + d], states[: len(context)].mean(0), rtol=1e-4, atol=1e-4)
    assert not np.allclose(got[0, :d], got[2, :d])  # what was said before changes how the utterance is read


def test_a_head_is_the_mean_of_its_members_and_learns_by_torchs_loss():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    head = classifiers.Head(classes=4, hidden=6, dropout=0.0, members=3)
    x, labels = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 4, 9)
    params: Any = head.init(jax.random.key(0), x)["params"]
    w = np.asarray([0.5, 2.0, 1.0, 0.25], np.float32)
    layers = {k: {n: torch.tensor(np.asarray(a)) for n, a in v.items()} for k, v in params["member"].items()}
    logits = []
    for m in range(3):
        h = torch.relu(torch.tensor(x) @ layers["hidden"]["kernel"][m] + layers["hidden"]["bias"][m])
        logits.append(h @ layers["classes"]["kernel"][m] + layers["classes"]["bias"][m])
    probabilities = torch.stack([z.softmax(-1) for z in logits]).mean(0)
    got = np.asarray(head.apply({"params": params}, x))
    np.testing.assert_allclose(np.exp(got), probabilities, rtol=1e-5, atol=1e-6)
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor(w))
    expected = np.mean([criterion(z, torch.tensor(labels)).item() for z in logits])
    loss = classifiers.head_loss(
        params, jnp.asarray(x), jnp.asarray(labels), jnp.asarray(w), jax.random.key(0), head=head
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_dropout_is_on_only_with_a_key():
    head = classifiers.Head(classes=3, hidden=8, dropout=0.5, members=2)
    x = np.ones((4, 6), np.float32)
    params = head.init(jax.random.key(0), x)["params"]
    plain, again = head.apply({"params": params}, x), head.apply({"params": params}, x)
    noisy = [head.apply({"params": params}, x, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2]) and not np.allclose(noisy[0], plain)


def clouds(n, rng, spread=1.0):
    """Three classes around three points, far from the origin and of unlike scales: only a standardised head learns them."""
    labels = rng.integers(0, 3, n)
    points = np.asarray([[0, 0, 0], [3, 0, 0], [0, 3, 0]], np.float32)
    x = (points[labels] + spread * rng.normal(size=(n, 3))) * [1e-2, 1.0, 1e2] + [5.0, -300.0, 1e3]
    return np.concatenate([x, np.full((n, 1), 7.0)], 1).astype(np.float32), labels  # and a column that says nothing


@pytest.mark.parametrize("hidden", [0, 8])
def test_fit_keeps_the_pass_it_reports(hidden):
    rng = np.random.default_rng(4)
    x, y, x_held, y_held = *clouds(200, rng), *clouds(100, rng)
    y_held[:10] = -1
    cfg = dataclasses.replace(QUICK, hidden=hidden, epochs=12, learning_rate=1e-2)
    head = classifiers.Head(3, hidden, 0.1, 2)
    params, chosen = classifiers.fit_head(head, x, y, x_held, y_held, cfg, seed=0)
    predicted = np.asarray(head.apply({"params": params}, x_held)).argmax(-1)  # on readings as they are
    score = f1_score(y_held[10:], predicted[10:], average="macro")
    assert chosen["validation_macro_f1"] == pytest.approx(score, abs=0.02)  # folding rounds: a tie may fall differently
    assert score > 0.85  # the best rule errs on about one in twelve
    again, _ = classifiers.fit_head(head, x, y, x_held, y_held, cfg, seed=0)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_more_passes_never_cost_validation_score():
    """The best pass of the first k cannot be worse for a larger k; the last pass can, at a learning rate that leaps about."""
    rng = np.random.default_rng(7)
    x, y, x_held, y_held = *clouds(80, rng, 3.0), *clouds(60, rng, 3.0)
    head = classifiers.Head(3, 0, 0.0, 1)
    found = []
    for epochs in range(1, 9):
        cfg = dataclasses.replace(QUICK, epochs=epochs, learning_rate=3.0)
        params, _ = classifiers.fit_head(head, x, y, x_held, y_held, cfg, seed=0)
        found.append(f1_score(y_held, np.asarray(head.apply({"params": params}, x_held)).argmax(-1), average="macro"))
    assert found == pytest.approx(sorted(found), abs=1e-6) and len(set(found)) > 1


def test_balanced_weights_are_scikit_learns(monkeypatch):
    seen = []
    real = classifiers._epoch
    monkeypatch.setattr(classifiers, "_epoch", lambda s, x, y, w, *a, **k: seen.append(w) or real(s, x, y, w, *a, **k))
    x, y = clouds(60, np.random.default_rng(5))
    cfg = dataclasses.replace(QUICK, epochs=1)
    classifiers.fit_head(classifiers.Head(4, 0, 0.0, 1), x, y, x[:5], y[:5], cfg, seed=0)  # class 3 never occurs
    expected = np.asarray([*compute_class_weight("balanced", classes=np.arange(3), y=y), 0.0])
    np.testing.assert_allclose(seen, [np.ones(4), np.sqrt(expected), expected], rtol=1e-6)


def test_whitening_is_scikit_learns_pca():
    rng = np.random.default_rng(6)
    x = (rng.normal(size=(300, 10)) @ rng.normal(size=(10, 10)) + 5.0).astype(np.float32)
    centre, whiten = classifiers.whitening(x, width=4)
    got, expected = (x - centre) @ whiten, PCA(4, whiten=True, svd_solver="full").fit_transform(x)
    signs = np.sign((got * expected).sum(0))
    # scikit-learn divides by N - 1
    np.testing.assert_allclose(got, expected * signs * np.sqrt(300 / 299), rtol=1e-3, atol=1e-3)
    few = classifiers.whitening(x[:3])[1]
    assert few.shape == (10, 2)  # three points span two directions
    for alike in (x[:1], np.ones((5, 10), np.float32)):
        with pytest.raises(dialogue.DataError, match="alike"):
            classifiers.whitening(alike)


def test_prior_by_hand():
    np.testing.assert_allclose(classifiers.prior(np.asarray([2, 0, -1, 2, 2]), 4), [0.25, 0.0, 0.75, 0.0])
    np.testing.assert_array_equal(classifiers.prior(np.asarray([-1, -1]), 3), np.zeros(3))


@pytest.fixture(scope="module")
def run_dir(trunk, sample, tmp_path_factory):
    """A run folder with classifiers -> (folder, what load_or_train returned)."""
    folder = tmp_path_factory.mktemp("run")
    return folder, classifiers.load_or_train(folder, CONFIG, sample, *trunk)


def test_priors_are_of_the_therapists_turns(run_dir, sample):
    frozen = run_dir[1].frozen
    for got, classes, labels in (
        (frozen.emotion_prior, EMOTIONS, [e.therapist.emotion for e in sample["train"]]),
        (frozen.strategy_prior, STRATEGIES, [e.therapist.strategy for e in sample["train"]]),
    ):
        np.testing.assert_allclose(got, [labels.count(name) / len(labels) for name in classes], rtol=1e-6)


def test_saved_is_loaded_and_a_second_training_is_the_first(run_dir, trunk, sample, tmp_path):
    folder, found = run_dir
    loaded = classifiers.load_or_train(folder, CONFIG, {"train": []}, *trunk)  # no data: it must not train again
    again = classifiers.load_or_train(tmp_path, CONFIG, sample, *trunk)
    for other in (loaded, again):
        jax.tree.map(np.testing.assert_array_equal, found[:2], other[:2])
        assert other.heads == found.heads and other.report == found.report


def test_test_data_has_no_say(run_dir, trunk, sample):
    config, params, tokenizer = trunk
    blind = {**sample, "test": []}
    found = classifiers.train(blind, params, tokenizer, model=gpt2.GPT2(config), config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, found[:2], run_dir[1][:2])


@pytest.mark.parametrize("fault", ["cut", "no json", "trunk", "setting", "shape", "array"])
def test_damaged_or_foreign_classifiers_are_refused(fault, run_dir, trunk, sample, tmp_path):
    from safetensors.numpy import load_file, save_file

    config, params, tokenizer = trunk
    folder, settings = tmp_path / "classifiers", CONFIG
    classifiers.save(folder, run_dir[1], classifiers.belongs_to(CONFIG, params))
    model, report = folder / "model.safetensors", folder / "report.json"
    if fault == "cut":
        model.write_bytes(model.read_bytes()[:-100])
    elif fault == "no json":
        report.write_text("[1]")
    elif fault == "trunk":
        params = {**params, "wpe": params["wpe"] + 1e-3}
    elif fault == "setting":
        settings = dataclasses.replace(CONFIG, classifiers=dataclasses.replace(QUICK, dropout=0.4))
    else:
        arrays = load_file(model)
        changed = {"centre": arrays["centre"][1:]} if fault == "shape" else {}
        kept = {k: v for k, v in arrays.items() if fault == "shape" or k != "client_emotion.member.classes.bias"}
        save_file({**kept, **changed}, model)
    with pytest.raises(ConfigError, match="delete") as error:
        classifiers.load_or_train(tmp_path, settings, sample, config, params, tokenizer)
    assert str(folder) in str(error.value)
    named = {"trunk": "trunk", "setting": "classifiers.dropout", "shape": "centre", "array": "client_emotion"}
    assert named.get(fault, "damaged") in str(error.value)


def test_means_are_the_first_entries_of_readings(trunk):
    config, params, _ = trunk
    rows = [[5, 6, 7], [], list(range(8, 60)), [9]]
    model = gpt2.GPT2(config)
    whole = readings.of_texts(params, rows, model=model)
    np.testing.assert_allclose(
        readings.means(params, rows, model=model), whole[:, : config.n_embd], rtol=1e-5, atol=1e-6
    )


def test_the_reading_of_clients_is_made_when_asked_for_and_what_was_half_saved_is_made_anew(trunk, sample, tmp_path):
    few = {split: part[:12] for split, part in sample.items()}
    found = classifiers.load_or_train(tmp_path, CONFIG, few, *trunk, names=classifiers.REWARDING)
    assert found.client_emotion is None and set(found.report["heads"]) == set(classifiers.REWARDING)
    again = classifiers.load_or_train(tmp_path, CONFIG, {"train": []}, *trunk, names=classifiers.REWARDING)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.frozen, again.frozen))
    other = dataclasses.replace(CONFIG, seed=5)  # chat asks for one head more, with whatever seed it draws replies
    whole = classifiers.load_or_train(tmp_path, other, few, *trunk)
    assert whole.client_emotion is not None
    assert jax.tree.all(
        jax.tree.map(np.array_equal, found.frozen, whole.frozen)
    )  # the heads that reward are what they were
    (tmp_path / "classifiers" / "report.json").unlink()  # as a kill between the two files leaves it
    anew = classifiers.load_or_train(tmp_path, CONFIG, few, *trunk)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.frozen, anew.frozen))


def test_without_annotations_heads_answer_uniformly(trunk, sample, tmp_path):
    def bare(turn: Turn) -> Turn:
        return dataclasses.replace(turn, emotion="sentimental" if turn.speaker == "client" else None, strategy=None)

    data = {
        split: [dataclasses.replace(e, client=bare(e.client), therapist=bare(e.therapist)) for e in part]
        for split, part in sample.items()
    }
    found = classifiers.load_or_train(tmp_path, CONFIG, data, *trunk)
    assert not np.asarray(found.frozen.emotion_prior).any() and not np.asarray(found.frozen.strategy_prior).any()
    pooled = 4 * trunk[0].n_embd
    for name, params, f in (
        ("emotion", found.frozen.emotion, pooled + readings.BAG),
        ("strategy", found.frozen.strategy, pooled + readings.BAG),
        ("client_emotion", found.client_emotion, 2 * pooled + readings.BAG),
    ):
        logits = found.heads[name].apply({"params": params}, jnp.ones((2, f)))
        np.testing.assert_allclose(np.exp(logits), 1 / len(classifiers.CLASSES[name]), rtol=1e-6)
    assert tfidf.fit_evaluator(data, 0) is None


def test_an_empty_train_split_is_named(trunk, tmp_path):
    with pytest.raises(dialogue.DataError, match="train"):
        classifiers.load_or_train(tmp_path, CONFIG, {"train": [], "validation": [], "test": []}, *trunk)


def test_the_evaluator_reads_emotion(sample):
    evaluator = tfidf.fit_evaluator(sample, seed=0)
    assert evaluator is not None
    texts = [t.text for e in sample["train"] for t in (e.client, e.therapist)]
    gold = [t.emotion for e in sample["train"] for t in (e.client, e.therapist)]
    predicted = evaluator.predict(texts)
    assert f1_score(gold, predicted, average="macro") > 0.9  # it was fitted on these
    assert set(map(type, predicted)) == {str} and evaluator.predict([]) == []
    twin = tfidf.fit_evaluator({**sample, "test": []}, seed=0)
    assert twin is not None and twin.predict(texts[::-1]) == predicted[::-1]


def test_the_evaluator_of_one_emotion_always_says_it(sample):
    one = [dataclasses.replace(e, client=dataclasses.replace(e.client, emotion=None)) for e in sample["train"]]
    one = [dataclasses.replace(e, therapist=dataclasses.replace(e.therapist, emotion="joy")) for e in one]
    evaluator = tfidf.fit_evaluator({"train": one}, 0)
    assert evaluator is not None and evaluator.predict(["whatever", ""]) == ["joy", "joy"]


def test_meaning_is_a_point_in_scikit_learns_pca():
    rng = np.random.default_rng(6)
    x = (rng.normal(size=(300, 10)) @ rng.normal(size=(10, 10)) + 5.0).astype(np.float32)
    frozen: Any = SimpleNamespace(
        **dict(zip(("centre", "whiten"), map(jnp.asarray, classifiers.whitening(x, 4)), strict=True))
    )
    reading = np.concatenate(
        [x, rng.normal(size=(300, 7)).astype(np.float32)], 1
    )  # the rest of a reading says nothing here
    reading[3] = 0  # no text
    got = np.asarray(batch.meaning_of(jnp.asarray(reading), frozen))
    expected = PCA(4, whiten=True, svd_solver="full").fit_transform(x) * np.sqrt(300 / 299)
    signs = np.sign((got * expected).sum(0))
    np.testing.assert_allclose(np.delete(got, 3, 0), np.delete(signs * expected, 3, 0), rtol=1e-3, atol=2e-3)
    assert not got[3].any()


def test_references_are_read_from_the_right_texts(trunk, hidden_states):
    config, params, tokenizer = trunk
    long = " ".join(f"I said {i} things to her." for i in range(40))
    context = (Turn("client", long), Turn("therapist", "And then she left."))
    e = Exchange("1", context, Turn("client", "On Sunday."), Turn("therapist", "Go on."))
    refs = batch.make_references([e, dataclasses.replace(e, context=())], params, tokenizer, model=gpt2.GPT2(config))
    ids = [prompts.encode_text(tokenizer, t) for t in ("Go on.", "On Sunday.", f"{long} And then she left.")]
    assert len(ids[2]) > 64
    for got, row in zip((refs.reading, refs.client_reading, refs.context_reading), ids, strict=True):
        np.testing.assert_allclose(got[0], hidden_states(row[-64:]).mean(0), rtol=1e-4, atol=1e-4)
    assert not refs.context_reading[1].any()


def test_meaning_is_centred_on_what_therapists_say(run_dir, trunk, sample, hidden_states):
    said = [prompts.encode_text(trunk[2], e.therapist.text)[:64] for e in sample["train"]]
    means = [hidden_states(ids).mean(0) for ids in said]
    np.testing.assert_allclose(run_dir[1].frozen.centre, np.mean(means, 0), rtol=1e-3, atol=1e-3)
