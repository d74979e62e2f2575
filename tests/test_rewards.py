"""What the terms are made of: overlap and words against rouge-score, nltk and brute force; replies; how terms combine."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer, tokenize

from therapy_jax import batching, classifiers, dialogue, gpt2, prompts
from therapy_jax.config import CustomReward, PromptConfig, RewardConfig, RewardWeights
from therapy_jax.rewards import batch, combine, overlap, words

WIDTH = 12
SCORER = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
SMOOTHING = SmoothingFunction().method1
OVERLAPS = ("rouge1", "rouge2", "rouge_l", "bleu", "recall")
CLOSE: dict[str, Any] = {"rtol": 2e-6, "atol": 1e-7}  # float32 against float64


def pack(lists, garbage, width=WIDTH):
    """Lists of word ids -> arrays packed to the left; what the mask hides is garbage."""
    ids, mask = batching.pad(lists, width, "right")
    return jnp.asarray(np.where(mask, ids, garbage)), jnp.asarray(mask)


def expected_overlaps(hyp, ref):
    """Two lists of words -> what rouge-score and nltk say, in the order of OVERLAPS."""
    rouge = SCORER.score(" ".join(ref), " ".join(hyp))
    # nltk divides by the reply's length; a reply without words scores 0 by its definition and ours.
    bleu = sentence_bleu([ref], hyp, smoothing_function=SMOOTHING) if hyp else 0.0
    return [rouge[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")] + [bleu, rouge["rouge1"].recall]


def overlaps(hyp, hyp_mask, ref, ref_mask):
    args = hyp, hyp_mask, ref, ref_mask
    rouge = overlap.rouge_n(*args, 1), overlap.rouge_n(*args, 2), overlap.rouge_l(*args)
    return jnp.stack([*rouge, overlap.bleu(*args), overlap.recall(*args)])


def one_by_one(*args):
    """The same, each pair as a batch of its own under vmap."""
    return jax.vmap(lambda *row: overlaps(*(x[None] for x in row))[:, 0], out_axes=1)(*args)


compiled, mapped = jax.jit(overlaps), jax.jit(one_by_one)


def row(width):
    """Few distinct words, so that repeats, long common subsequences and whole matches are common; also none, one, all one."""
    few = st.lists(st.integers(0, 5), max_size=width)
    return few | st.builds(lambda word, n: [word] * n, st.integers(0, 5), st.integers(0, width))


# Widths of replies and references; beyond 32 words the bits of a text need more than one limb.
@pytest.mark.parametrize("widths", [(12, 12), (12, 4), (3, 17), (1, 1), (40, 70), (70, 33)])
@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 5))
def test_overlap_equals_rouge_score_and_nltk(widths, data, garbage):
    hyps, refs = (data.draw(st.lists(row(width), min_size=16, max_size=16)) for width in widths)
    args = *pack(hyps, garbage, widths[0]), *pack(refs, garbage, widths[1])
    expected = [expected_overlaps([f"w{i}" for i in h], [f"w{i}" for i in r]) for h, r in zip(hyps, refs, strict=True)]
    for got in compiled(*args), mapped(*args):
        np.testing.assert_allclose(got.T, expected, **CLOSE)


def common_by_table(a, b):
    """The classic table (Cormen et al., section on longest common subsequences), one cell at a time."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i in range(len(a)):
        for j in range(len(b)):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@settings(max_examples=100, deadline=None)
@given(st.lists(row(12), min_size=4, max_size=4), st.lists(row(12), min_size=4, max_size=4), st.integers(0, 5))
def test_common_subsequence_equals_the_table(hyps, refs, garbage):
    got = jax.jit(overlap.common_subsequence)(*pack(hyps, garbage), *pack(refs, garbage))
    assert got.tolist() == [common_by_table(h, r) for h, r in zip(hyps, refs, strict=True)]


def test_hand_worked_overlap():
    # unigrams: 1 twice, 3 once -> 3 of 4 and 4; bigrams: (1,3) -> 1 of 3 and 3; longest common subsequence 1 1 3
    got = compiled(*pack([[1, 2, 1, 3]], 0), *pack([[1, 1, 3, 4]], 0))[:, 0]
    np.testing.assert_allclose(
        got, [3 / 4, 1 / 3, 3 / 4, (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25, 3 / 4], rtol=1e-6
    )


def trained(texts, size=1200):
    made = prompts.train_tokenizer(texts, size)
    prompts.add_special_tokens(made)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return trained([prompts.plain_text(d.turns) for d in dialogue.read_dialogues(None, "jsonl")["train"]])


def make_batch(replies, exchanges, tokenizer) -> batch.RewardBatch:
    """Generated ids and what they answer -> RewardBatch, through a trunk with random weights that is as small as can be."""
    size = len(tokenizer) + 5
    config = gpt2.GPT2Config(vocab_size=size, n_positions=512, n_embd=4, n_layer=1, n_head=1, eos_token_id=0)
    model, trunk = gpt2.GPT2(config), gpt2.init(config, jax.random.key(0))

    nothing = jnp.zeros(0)
    frozen = classifiers.Frozen({}, {}, nothing, nothing, jnp.zeros(4), jnp.eye(4))
    fixed = batch.Fixed(words.make_vocabulary(tokenizer, config.padded_vocab_size), frozen)
    references = batch.make_references(exchanges, trunk, tokenizer, model=model)
    made = jax.jit(batch.make, static_argnames="model")
    return made(trunk, *batching.pad(replies, max(map(len, replies)) + 3, "right"), references, fixed, model=model)


def test_folded_words_are_those_of_rouge_score(tokenizer):
    """Same words, same ids; other words, other ids; as many as rouge-score finds. On the sample's own sentences."""
    texts = [t.text for d in dialogue.read_dialogues(None, "jsonl")["test"] for t in d.turns]
    texts += ["", "...", "It's 7:30pm, isn't it?", "well-known (OK) 3rd", "a b-c D.E", "sighs... FINE!"]
    encoded = [prompts.encode_text(tokenizer, t) for t in texts]
    width = max(map(len, encoded)) + 3
    tokens, mask = batching.pad([[0, 0, *ids] for ids in encoded], width, "right")
    mask[:, :2] = False  # a mask may begin anywhere
    vocabulary = words.make_vocabulary(tokenizer, len(tokenizer) + 5)
    ids, mask = jax.device_get(jax.jit(words.fold)(tokens, mask, vocabulary))
    meaning: dict[int, str] = {}
    for text, folded, counts in zip(texts, ids, mask, strict=True):
        expected = tokenize.tokenize(text, None)
        found = folded[counts].tolist()
        assert np.asarray(words.hash_words(text), np.uint32).view(np.int32).tolist() == found, text
        assert len(found) == len(expected), text
        for i, word in zip(found, expected, strict=True):
            assert meaning.setdefault(i, word) == word
    assert len(set(meaning.values())) == len(meaning)
    assert len(meaning) > 1000


def assert_terms_equal_rouge_score(answered, said, tokenizer):
    """Structured replies that say `said`, against the therapists' own in `answered`: from ids, and from the two texts."""
    replies = [prompts.encode_reply(tokenizer, turn, None, PromptConfig()) for turn in said]
    b = make_batch(replies, answered, tokenizer)
    for turn, stated in zip(said, b.stated_emotion.tolist(), strict=True):
        assert stated == (dialogue.EMOTIONS.index(turn.emotion) if turn.emotion else -1)
    split = functools.partial(tokenize.tokenize, stemmer=None)
    expected = np.asarray(
        [expected_overlaps(split(s.text), split(e.therapist.text)) for s, e in zip(said, answered, strict=True)]
    )
    terms = jax.jit(lambda b: {name: combine.TERMS[name](b) for name in OVERLAPS})(b)
    for column, name in enumerate(OVERLAPS):
        got = np.asarray(terms[name], np.float64)
        np.testing.assert_allclose(got, expected[:, column], **CLOSE, err_msg=name)
        assert np.corrcoef(got, expected[:, column])[0, 1] > 1 - 1e-9
    assert b.words_mask.sum(1).tolist() == [len(split(turn.text)) for turn in said]
    return b


def test_terms_on_the_sample_equal_rouge_score(tokenizer):
    exchanges = dialogue.read(None, "jsonl")["test"][:60]
    turns = [e.therapist for e in exchanges]
    b = assert_terms_equal_rouge_score(exchanges, turns[1:] + turns[:1], tokenizer)
    assert b.emotion.tolist() == [dialogue.EMOTIONS.index(t.emotion or "") for t in turns]
    assert b.strategy.tolist() == [dialogue.STRATEGIES.index(t.strategy) if t.strategy else -1 for t in turns]


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
def test_terms_on_mesc_equal_rouge_score(kind, shared_data: Path):
    """Every validation exchange of MESC, answered by some reply of train."""
    if not (shared_data / "mesc" / "MESC.csv").is_file() or not (shared_data / "gpt2_tokenizer").is_dir():
        pytest.skip(f"no MESC.csv or no GPT-2 tokenizer in {shared_data}")
    data = dialogue.read(shared_data / "mesc" / "MESC.csv", "mesc", "official")
    said = [e.therapist for e in data["train"]]
    if kind == "gpt2":
        tokenizer = prompts.load_tokenizer(shared_data / "gpt2_tokenizer")
        prompts.add_special_tokens(tokenizer)
    else:
        tokenizer = trained([turn.text for turn in said], 2048)
    chosen = np.random.default_rng(0).choice(len(said), len(data["validation"]), replace=False)
    assert_terms_equal_rouge_score(data["validation"], [said[i] for i in chosen], tokenizer)


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ("I hear you.", True), ("Do you?", True), ('"Stop."', True), ("You said \u201cstop.\u201d", True), ("I hear you. ", True),
        ("(I do.)", True), ("I hear you", False), ("you.and", False), ("\u201d", False), ("...", True),
    ],
)  # fmt: skip
def test_a_reply_ends_as_a_sentence_whatever_closes_it(said, ends, tokenizer):
    eos, text = tokenizer.convert_tokens_to_ids([prompts.EOS, "<|text|>"])
    exchange = dialogue.Exchange("a", (), dialogue.Turn("client", "No."), dialogue.Turn("therapist", "Yes.", "joy"))
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    b = make_batch([[text, *ids, eos]], [exchange], tokenizer)
    assert b.ends_sentence.tolist() == [ends]


def test_structure_of_a_reply(tokenizer):
    """Emotion, text, end: read from ids in the order in which the model may have written them."""
    eos, text, reply = tokenizer.convert_tokens_to_ids([prompts.EOS, "<|text|>", "<|reply|>"])
    say, sad, joy = (prompts.encode_text(tokenizer, s) for s in ("I hear you.", "sadness", "joy"))
    replies = [
        [*sad, text, *say, eos],  # as taught
        [*joy, reply, *sad, text, *say, eos],  # emotion: inferred
        [*say, eos],  # base: no structure, all of it is text
        [*sad, *sad, text, *say],  # no emotion word; cut before EOS
        [text, *say[:-1], eos],  # no emotion; no full stop
        [*sad, text, eos],  # no text
    ]
    client, therapist = dialogue.Turn("client", "No."), dialogue.Turn("therapist", "I hear you.", "sadness")
    exchange = dialogue.Exchange("a", (), client, therapist)
    b = make_batch(replies, [exchange] * 6, tokenizer)
    sadness = dialogue.EMOTIONS.index("sadness")
    assert b.stated_emotion.tolist() == [sadness, sadness, -1, -1, -1, sadness]
    assert b.emotion.tolist() == [sadness] * 6 and b.strategy.tolist() == [-1] * 6
    assert b.words_mask.sum(1).tolist() == [3, 3, 3, 3, 3, 0]
    assert combine.TERMS["rouge_l"](b).tolist() == [1, 1, 1, 1, 1, 0]
    assert combine.TERMS["ending"](b).tolist() == [1, 1, 1, 0, 0.5, 0.5]
    assert combine.TERMS["length"](b).tolist() == [0, 0, 0, 0, 0, -1]
    np.testing.assert_allclose(combine.TERMS["semantic"](b)[:4], 1.0, rtol=1e-5)  # the same words, whatever frames them
    assert combine.TERMS["semantic"](b)[5] == 0 and not b.meaning[5].any() and not b.context_meaning.any()


# How terms combine: values of any size against numpy.

NAMES = ("a", "b", "c")


@st.composite
def batches(draw):
    """A few batches of three terms, each with a scale and an offset of its own."""
    sizes = draw(st.lists(st.sampled_from([1, 3, 8]), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = {name: (draw(st.sampled_from([1e-2, 1.0, 1e3])), draw(st.sampled_from([0.0, -3.0, 1e3]))) for name in NAMES}
    return [
        {name: (rng.normal(size=n) * scale + offset).astype(np.float32) for name, (scale, offset) in shape.items()}
        for n in sizes
    ]


@functools.partial(jax.jit, static_argnames="standardise")
def combined(raw, weights, stats, standardise):
    return combine.combine(raw, weights, stats, standardise=standardise)


def combine_all(raws, weights, standardise):
    """Batch after batch, as PPO does -> what the last one gives: scores, statistics, metrics; on the host."""
    scores, stats, metrics = None, combine.init_stats(NAMES), {}
    for raw in raws:
        scores, stats, metrics = combined(raw, weights, stats, standardise)
    return jax.device_get((scores, stats, metrics))


@settings(max_examples=60, deadline=None)
@given(batches())
def test_running_statistics_are_those_of_all_values_at_once(raws):
    _, stats, _ = combine_all(raws, {}, False)
    for name in NAMES:
        everything = np.concatenate([raw[name] for raw in raws]).astype(np.float64)
        assert stats.count[name] == len(everything)
        size = np.abs(everything).max()  # what float32 rounds is relative to the largest value: 6e-8 of it, a few times
        np.testing.assert_allclose(stats.mean[name], everything.mean(), rtol=0, atol=1e-6 * size)
        sd = np.sqrt(stats.m2[name] / stats.count[name])
        np.testing.assert_allclose(sd, everything.std(), rtol=1e-5, atol=1e-6 * size)


@settings(max_examples=60, deadline=None)
@given(batches(), st.lists(st.sampled_from([0.0, 1.0, 2.0, 0.7, 1.9, -0.3]), min_size=3, max_size=3), st.booleans())
def test_scores_are_the_weighted_sum_and_shares_sum_to_one(raws, weights, standardise):
    """Also with a weight of 0, whose term is reported all the same."""
    by_name = dict(zip(NAMES, weights, strict=True))
    scores, _, metrics = combine_all(raws, by_name, standardise)
    expected, error = np.zeros(len(scores)), 1e-6
    for name in NAMES:
        column = raws[-1][name].astype(np.float64)
        np.testing.assert_allclose(metrics[f"reward/{name}"], column.mean(), rtol=0, atol=1e-6 * np.abs(column).max())
        np.testing.assert_allclose(
            metrics[f"reward_sd/{name}"], column.std(), rtol=1e-5, atol=1e-6 * np.abs(column).max()
        )
        size = np.abs(column).max()
        if standardise:
            everything = np.concatenate([raw[name] for raw in raws]).astype(np.float64)
            sd = everything.std() if len(everything) > 1 else np.inf
            column, size = (column - everything.mean()) / sd, np.abs(everything).max() * (1 + 3 / sd) / sd
        np.testing.assert_allclose(
            metrics[f"weighted/{name}"], by_name[name] * column.mean(), atol=4e-6 * size, rtol=1e-5
        )
        expected, error = expected + by_name[name] * column, error + 4e-6 * size
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=error)
    shares, sd = sum(metrics[f"share/{name}"] for name in NAMES), np.std(expected)
    if sd > 100 * error:  # where the scores differ by more than rounding: to first order in error / sd
        np.testing.assert_allclose(shares, 1, atol=float(1e-5 + 2 * error / sd))


@pytest.mark.parametrize("size", [2, 7, 32])
def test_shares_are_0_where_scores_differ_by_rounding_alone(size):
    raw = {name: jnp.full(size, value) for name, value in zip(NAMES, (0.1, -1.7, 3.3), strict=True)}
    scores, _, metrics = combined(raw, {"a": 0.7, "b": 1.9, "c": -0.3}, combine.init_stats(raw), False)
    np.testing.assert_allclose(scores, 0.7 * 0.1 - 1.9 * 1.7 - 0.3 * 3.3, rtol=1e-6)
    assert [metrics[f"share/{name}"] for name in NAMES] == [0, 0, 0]


def test_terms_that_come_and_go_are_named():
    stats = combine.init_stats(["a"])
    with pytest.raises(combine.RewardError, match="b is there for some only"):
        combine.combine({"a": jnp.ones(2), "b": jnp.ones(2)}, {}, stats, standardise=False)


def test_fractions_survive_whatever_the_weights_are():
    raw = {"a": jnp.asarray([0.7, 1.9]), "b": jnp.asarray([1.0, 0.0])}
    stats = combine.init_stats(raw)
    for weights in {"a": 1, "b": 0}, {"a": np.int64(1), "b": 0.0}, {"b": 0}:  # a name without a weight has weight 1
        scores, _, metrics = combine.combine(raw, weights, stats, standardise=False)
        np.testing.assert_allclose(scores, [0.7, 1.9], rtol=1e-6)
        np.testing.assert_allclose([metrics["reward/b"], metrics["weighted/b"], metrics["share/b"]], [0.5, 0, 0])
        np.testing.assert_allclose(metrics["share/a"], 1, rtol=1e-5)


@pytest.mark.parametrize("constant", [0.0, -1.0, 0.1, 12345.678])
@pytest.mark.parametrize("scale", [1.0, 1e-7])  # a term may be small
def test_standardised_terms_have_mean_0_and_sd_1_and_a_constant_says_nothing(constant, scale):
    raw = {"a": scale * jnp.asarray([-0.7, 0.7, 0.1, 1.9]), "b": jnp.full(4, constant)}
    scores, stats, metrics = combine.combine(raw, {"a": 2.0, "b": 5.0}, combine.init_stats(raw), standardise=True)
    np.testing.assert_allclose([scores.mean(), scores.std()], [0, 2], atol=1e-6)
    np.testing.assert_allclose([metrics["weighted/b"], metrics["share/b"]], 0, atol=1e-12)
    np.testing.assert_allclose(metrics["reward/b"], constant, rtol=1e-6)  # reported as it was
    # Later batches are measured by all values so far, not by themselves.
    later, _, _ = combine.combine({"a": raw["a"] + scale, "b": raw["b"]}, {"b": 5.0}, stats, standardise=True)
    everything = np.concatenate([raw["a"], raw["a"] + scale])
    np.testing.assert_allclose(later, (raw["a"] + scale - everything.mean()) / everything.std(), rtol=1e-5)


def test_every_weight_has_its_term():
    weights = combine.weights_of(RewardConfig(custom=CustomReward("my.py:f", weights={"mine": 3.0})))
    assert set(weights) == {*combine.TERMS, "mine"} and set(combine.TERMS) == set(RewardWeights.__dataclass_fields__)
    assert weights["mine"] == 3.0 and weights["rouge_l"] == RewardWeights().rouge_l


BROKEN = {
    "int32[3]": lambda b: b.emotion, "float32[1]": lambda b: jnp.ones(1), "float32[3, 1]": lambda b: jnp.ones((3, 1)),
    "float32[]": lambda b: jnp.float32(1), "float": lambda b: 1.0, "list": lambda b: [1.0] * 3, "bool[3]": lambda b: b.ended,
    "float16[3]": lambda b: jnp.ones(3, jnp.float16),
}  # fmt: skip


@pytest.mark.parametrize(("what", "broken"), BROKEN.items(), ids=BROKEN)
def test_a_term_of_wrong_shape_or_dtype_is_named(what, broken):
    b: Any = SimpleNamespace(
        tokens=jnp.zeros((3, 5), jnp.int32), emotion=jnp.zeros(3, jnp.int32), ended=jnp.zeros(3, bool)
    )
    kwargs: Any
    for kwargs in {"terms": {"ending": broken}}, {"terms": {}, "custom": lambda b: {"ending": broken(b)}}:
        with pytest.raises(ValueError, match="reward term ending gives") as error:
            combine.raw_terms(b, **kwargs)
        assert f"gives {what}, it must give float32[3]" in str(error.value)
    with pytest.raises(ValueError, match="gives rouge_l, which is a term of ours"):
        combine.raw_terms(b, lambda b: {"rouge_l": jnp.ones(3)}, {"rouge_l": lambda b: jnp.ones(3)})
    with pytest.raises(ValueError, match="gives a list, it must give a dict"):
        combine.raw_terms(b, lambda b: [1.0], {})  # type: ignore


def test_a_share_is_the_covariance_with_the_score(rng):
    scales = (("a", 1.0), ("b", 0.5), ("c", 2.0))
    raw = {name: (scale * rng.normal(size=64)).astype(np.float32) for name, scale in scales}
    raw["b"] -= 0.4 * raw["a"]
    weights = {"a": 1.0, "b": 3.0, "c": -0.5}
    _, _, found = combined({k: jnp.asarray(v) for k, v in raw.items()}, weights, combine.init_stats(NAMES), False)
    parts = {k: weights[k] * raw[k].astype(float) for k in NAMES}
    total = sum(parts.values())
    for k in NAMES:
        covariance = np.cov(parts[k], total, bias=True)[0, 1]
        np.testing.assert_allclose(found[f"share/{k}"], covariance / total.var(), rtol=1e-4)
    assert found["share/a"] < 0  # it pulls against the rest
