"""Reward terms against rouge-score, nltk, hand-worked tables and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer

from therapy_jax import dialogue, prompts
from therapy_jax.config import PromptConfig, RewardWeights
from therapy_jax.rewards import batch, combine, overlap, words
from therapy_jax.rewards.batch import References, RewardBatch

WIDTH = 12
SCORER = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
SMOOTHING = SmoothingFunction().method1
# Few distinct words, so that repeats, long common subsequences and whole matches are common; rows may be empty.
rows = st.lists(st.lists(st.integers(0, 5), max_size=WIDTH), min_size=4, max_size=4)


def pack(lists, garbage):
    """Lists of word ids -> arrays packed to the left; what the mask hides is garbage."""
    ids = np.full((len(lists), WIDTH), garbage, np.int32)
    mask = np.zeros((len(lists), WIDTH), bool)
    for i, row in enumerate(lists):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return jnp.asarray(ids), jnp.asarray(mask)


@jax.jit
def all_overlaps(hyp, hyp_mask, ref, ref_mask):
    args = hyp, hyp_mask, ref, ref_mask
    return overlap.rouge_n(*args, 1), overlap.rouge_n(*args, 2), overlap.rouge_l(*args), overlap.bleu(*args)


@settings(max_examples=300, deadline=None)
@given(rows, rows, st.integers(0, 5))
def test_overlap_equals_rouge_score_and_nltk(hyps, refs, garbage):
    got = np.asarray(all_overlaps(*pack(hyps, garbage), *pack(refs, garbage))).T
    for hyp, ref, values in zip(hyps, refs, got, strict=True):
        hyp, ref = [f"w{i}" for i in hyp], [f"w{i}" for i in ref]
        rouge = SCORER.score(" ".join(ref), " ".join(hyp))
        # nltk divides by the reference's length; a reply without words scores 0 by its definition and ours.
        bleu = sentence_bleu([ref], hyp, smoothing_function=SMOOTHING) if hyp else 0.0
        expected = [rouge[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")] + [bleu]
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-7)  # float32 against float64


def test_hand_worked_overlap():
    hyp, ref = pack([[1, 2, 1, 3]], 0), pack([[1, 1, 3, 4]], 0)
    # unigrams: 1 twice, 3 once -> 3 of 4 and 4; bigrams: (1,3) -> 1 of 3 and 3; longest common subsequence 1 1 3
    got = [float(x[0]) for x in all_overlaps(*hyp, *ref)]
    np.testing.assert_allclose(got[:3], [3 / 4, 1 / 3, 3 / 4], rtol=1e-6)
    np.testing.assert_allclose(got[3], (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25, rtol=1e-6)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [prompts.plain_text(d.turns) for d in dialogue.read_dialogues(None, "jsonl")["train"]]
    made = prompts.train_tokenizer(texts, 1200)
    prompts.add_special_tokens(made)
    return made


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return words.make_vocabulary(tokenizer, len(tokenizer) + 5)


def fold_texts(texts, tokenizer, vocabulary):
    encoded = [prompts.encode_text(tokenizer, t) for t in texts]
    width = max(map(len, encoded)) + 3
    tokens, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), bool)
    for i, ids in enumerate(encoded):
        tokens[i, 2 : 2 + len(ids)], mask[i, 2 : 2 + len(ids)] = ids, True  # the mask may begin anywhere
    return jax.device_get(jax.jit(words.fold)(tokens, mask, vocabulary))


def test_folded_words_are_those_of_rouge_score(tokenizer, vocabulary):
    """Same words, same ids; other words, other ids; as many as rouge-score finds. On the sample's own sentences."""
    from rouge_score import tokenize

    texts = [t.text for d in dialogue.read_dialogues(None, "jsonl")["test"] for t in d.turns]
    texts += ["", "...", "It's 7:30pm, isn't it?", "well-known (OK) 3rd", "a b-c D.E", "sighs... FINE!"]
    ids, mask = fold_texts(texts, tokenizer, vocabulary)
    meaning: dict[int, str] = {}
    for text, row, counts in zip(texts, ids, mask, strict=True):
        expected = tokenize.tokenize(text, None)
        found = row[counts].tolist()
        assert len(found) == len(expected), text
        for i, word in zip(found, expected, strict=True):
            assert meaning.setdefault(i, word) == word
    assert len(set(meaning.values())) == len(meaning)
    assert len(meaning) > 1000


def test_rewards_on_text_equal_rouge_score(tokenizer, vocabulary):
    """From tokens of a structured reply to ROUGE-L, against rouge-score on the two texts."""
    exchanges = dialogue.read(None, "jsonl")["test"][:60]
    turns = [e.therapist for e in exchanges]
    others = turns[1:] + turns[:1]
    replies = [prompts.encode_reply(tokenizer, t, None, PromptConfig()) for t in others]
    b = make_batch(replies, [prompts.encode_text(tokenizer, t.text) for t in turns], tokenizer, vocabulary)
    got = np.asarray(combine.TERMS["rouge_l"](b))
    expected = [SCORER.score(t.text, o.text)["rougeL"].fmeasure for t, o in zip(turns, others, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)
    assert np.asarray(b.stated_emotion).tolist() == [dialogue.EMOTIONS.index(o.emotion or "") for o in others]


def make_batch(replies, references, tokenizer, vocabulary, emotion=0) -> RewardBatch:
    def pad(rows):
        tokens, mask = (
            np.zeros((len(rows), max(map(len, rows))), np.int32),
            np.zeros((len(rows), max(map(len, rows))), bool),
        )
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return tokens, mask

    refs = References(*map(jnp.asarray, pad(references)), jnp.full(len(replies), emotion, jnp.int32))
    return batch.make(*map(jnp.asarray, pad(replies)), refs, vocabulary)


def test_structure_of_a_reply(tokenizer, vocabulary):
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
    b = make_batch(replies, [say] * 6, tokenizer, vocabulary, emotion=dialogue.EMOTIONS.index("sadness"))
    sadness = dialogue.EMOTIONS.index("sadness")
    assert b.stated_emotion.tolist() == [sadness, sadness, -1, -1, -1, sadness]
    assert b.words_mask.sum(1).tolist() == [3, 3, 3, 3, 3, 0]
    _, raw = combine.score(b, RewardWeights())
    assert raw["emotion_stated"].tolist() == [1, 1, 0, 0, 0, 1]
    assert raw["rouge_l"].tolist() == [1, 1, 1, 1, 1, 0]
    assert raw["ending"].tolist() == [1, 1, 1, 0, 0.5, 0.5]
    assert raw["length"].tolist() == [0, 0, 0, 0, 0, -1]


def test_unannotated_emotion_earns_nothing(tokenizer, vocabulary):
    eos, text = tokenizer.convert_tokens_to_ids([prompts.EOS, "<|text|>"])
    say = prompts.encode_text(tokenizer, "Yes.")
    b = make_batch([[*say, eos], [text, *say, eos]], [say] * 2, tokenizer, vocabulary, emotion=-1)
    assert combine.TERMS["emotion_stated"](b).tolist() == [0, 0]


def test_repetition_is_the_share_of_repeated_bigrams():
    ids, mask = pack([[1, 2, 1, 2, 1], [1, 2, 3, 4], [5], []], garbage=1)
    b = blank(4)._replace(words=ids, words_mask=mask)
    # bigrams 12 21 12 21: the last two are repeats
    assert combine.TERMS["repetition"](b).tolist() == [-0.5, 0, 0, 0]


def blank(size) -> RewardBatch:
    ids, mask = jnp.zeros((size, WIDTH), jnp.int32), jnp.zeros((size, WIDTH), bool)
    nothing = jnp.full(size, -1)
    return RewardBatch(ids, mask, ids, mask, nothing, nothing, jnp.zeros(size, bool), jnp.zeros(size, bool))


def test_total_is_the_weighted_sum_and_weight_zero_is_still_reported():
    b = blank(3)._replace(ended=jnp.array([True, True, False]), ends_sentence=jnp.array([True, False, True]))
    weights = RewardWeights(rouge_l=0.0, emotion_stated=0.0, repetition=0.3, length=0.7, ending=0.25)
    total, raw = combine.score(b, weights)
    assert set(raw) == set(combine.TERMS) == set(RewardWeights.__dataclass_fields__)
    expected = sum(getattr(weights, name) * np.asarray(value) for name, value in raw.items())
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(total, [0.25, 0.125, 0.0], rtol=1e-6)
    assert all(v.dtype == jnp.float32 and v.shape == (3,) for v in raw.values())


@pytest.mark.parametrize(
    "broken", [lambda b: jnp.ones(1), lambda b: b.emotion, lambda b: jnp.ones((3, 1)), lambda b: jnp.float32(1)]
)
def test_a_term_of_wrong_shape_or_dtype_is_named(broken):
    with pytest.raises(ValueError, match="reward term ending gives"):
        combine.score(blank(3), RewardWeights(), {**combine.TERMS, "ending": broken})


def test_terms_stay_in_their_range_and_ignore_what_the_mask_hides():
    rng = np.random.default_rng(0)
    b = blank(64)
    mask = jnp.asarray(np.arange(WIDTH) < rng.integers(0, WIDTH + 1, (64, 1)))
    refs = jnp.asarray(np.arange(WIDTH) < rng.integers(0, WIDTH + 1, (64, 1)))

    def with_garbage(seed):
        ids = np.random.default_rng(1).integers(0, 6, (2, 64, WIDTH))
        noise = np.random.default_rng(seed).integers(0, 6, (2, 64, WIDTH))
        hyp, ref = (np.where(m, i, n) for m, i, n in zip((mask, refs), ids, noise, strict=True))
        return b._replace(
            words=jnp.asarray(hyp), words_mask=mask, reference_words=jnp.asarray(ref), reference_mask=refs
        )

    first, second = (combine.score(with_garbage(seed), RewardWeights())[1] for seed in (2, 3))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        low, high = (-1, 0) if name in ("repetition", "length") else (0, 1)
        assert float(first[name].min()) >= low and float(first[name].max()) <= high, name
