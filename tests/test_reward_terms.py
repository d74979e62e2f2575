"""Each reward term by its laws: hand-worked values, brute force, scipy; and what may never count (masks, constants)."""

import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from therapy_jax import batching, dialogue, prompts
from therapy_jax.classifiers import Frozen, Head
from therapy_jax.dialogue import EMOTIONS, STRATEGIES
from therapy_jax.rewards import combine, emotion, form, meaning, strategy, words
from therapy_jax.rewards.batch import RewardBatch

B, R = 8, 12  # replies, their longest in words
E, S, M = len(EMOTIONS), len(STRATEGIES), 3
PRIOR = np.asarray([0.7, 0.02, 0.05, 0.03, 0.08, 0.1, 0.02], np.float32)
RANGES = dict.fromkeys(combine.TERMS, (0, 1))
RANGES |= dict.fromkeys(("semantic", "emotion_stated", "emotion_expressed", "strategy"), (-1, 1))
RANGES |= dict.fromkeys(("repetition", "sameness", "length", "manner"), (-1, 0))
UNIT = 1e-6  # cosines are rounded: a few float32 eps


def pack(lists, width=R, garbage=0):
    ids, mask = batching.pad(lists, width, "right")
    return jnp.asarray(np.where(mask, ids, garbage), jnp.int32), jnp.asarray(mask)


def head(classes):
    """The parameters of a linear head of two members: class i's logit is entry i of the reading."""
    params: Any = Head(classes, hidden=0, members=2).init(jax.random.key(0), jnp.zeros((1, S)))["params"]
    kernel = jnp.stack([jnp.eye(S, classes)] * 2)
    assert params["member"]["classes"]["kernel"].shape == kernel.shape
    return {"member": {"classes": {"kernel": kernel, "bias": jnp.zeros((2, classes))}}}


def blank(size=B) -> RewardBatch:
    """Replies of which nothing is known and nothing was said."""
    (ids, mask), none = pack([[]] * size), jnp.full(size, -1, jnp.int32)
    no, silent = jnp.zeros(size, bool), jnp.zeros((size, M))
    frozen = Frozen(head(E), head(S), jnp.asarray(PRIOR), jnp.full(S, 1 / S, jnp.float32), jnp.zeros(M), jnp.eye(M))
    reading = jnp.zeros((size, S))
    given: list[Any] = [jnp.arange(size), *[ids, mask] * 4, *[silent] * 4, reading, none, none, none, no, no, frozen]
    return RewardBatch(*given)


def random_batch(seed, garbage) -> RewardBatch:
    """Everything drawn at random by `seed`, but what masks hide, which `garbage` draws."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng(garbage)

    def some_words():
        lengths = rng.integers(0, R + 1, (B, 1))
        ids, mask = rng.integers(0, 6, (B, R)), np.arange(R) < lengths
        return jnp.asarray(np.where(mask, ids, noise.integers(0, 6, (B, R))), jnp.int32), jnp.asarray(mask)

    def index(n):
        return jnp.asarray(rng.integers(-1, n, B), jnp.int32)

    points = [jnp.asarray(rng.normal(size=(B, M)) * rng.integers(0, 2, (B, 1)), jnp.float32) for _ in range(4)]
    reading = jnp.asarray(3 * rng.normal(size=(B, S)), jnp.float32)
    flags = (jnp.asarray(rng.integers(0, 2, B), bool) for _ in range(2))
    pairs = [x for _ in range(4) for x in some_words()]
    given: list[Any] = [index(3), *pairs, *points, reading, index(E), index(E), index(S), *flags, blank().frozen]
    return RewardBatch(*given)


def all_terms(b: RewardBatch):
    return {name: term(b) for name, term in combine.TERMS.items()}


compiled = jax.jit(all_terms)


def test_terms_keep_their_ranges_and_shapes_and_what_masks_hide_changes_nothing():
    spread = {name: set() for name in combine.TERMS}
    for seed in range(20):
        got, again = compiled(random_batch(seed, 1)), compiled(random_batch(seed, 2))
        for name, (low, high) in RANGES.items():
            assert got[name].shape == (B,) and got[name].dtype == jnp.float32, name
            assert np.isfinite(got[name]).all() and got[name].min() >= low - UNIT and got[name].max() <= high + UNIT, (
                name
            )
            np.testing.assert_array_equal(got[name], again[name], err_msg=name)
            spread[name] |= set(got[name].tolist())
    assert {name for name, seen in spread.items() if len(seen) < 3} == {"manner"}  # its phrases are not among six words


def test_a_reply_earns_the_same_alone_and_under_vmap():
    b = random_batch(3, 1)
    alone = b._replace(**{k: v[:, None] for k, v in b._asdict().items() if k != "frozen"})
    axes: RewardBatch = jax.tree.map(lambda _: 0, b)._replace(frozen=None)
    got, expected = jax.jit(jax.vmap(all_terms, in_axes=(axes,)))(alone), compiled(b)
    for name in set(combine.TERMS) - {"sameness", "idiom"}:  # which are about the batch
        np.testing.assert_allclose(got[name][:, 0], expected[name], rtol=1e-5, atol=UNIT, err_msg=name)


# Meaning.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e4]))
def test_cosine_is_that_of_scipy(seed, scale):
    a, b = (scale * np.random.default_rng(seed).normal(size=(2, B, M))).astype(np.float32)
    expected = [1 - scipy.spatial.distance.cosine(x, y) for x, y in zip(a.astype(float), b.astype(float), strict=True)]
    np.testing.assert_allclose(meaning.cosine(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5, atol=UNIT)
    assert not meaning.cosine(jnp.asarray(a), jnp.zeros((B, M))).any()


def test_semantic_of_the_references_own_meaning_is_one():
    points = jax.random.normal(jax.random.key(0), (B, M))
    b = blank()._replace(meaning=points, reference_meaning=points)
    np.testing.assert_allclose(meaning.semantic(b), 1.0, atol=UNIT)
    np.testing.assert_allclose(meaning.semantic(b._replace(reference_meaning=-3 * points)), -1.0, atol=UNIT)
    assert meaning.semantic(blank()).tolist() == meaning.context(blank()).tolist() == [0] * B  # no text


def common(a, b):
    """Longest common subsequence by trying all subsequences of the shorter list, longest first."""
    a, b = sorted((a, b), key=len)

    def inside(part):
        rest = iter(b)
        return all(word in rest for word in part)

    return next(n for n in range(len(a), -1, -1) if any(inside(part) for part in itertools.combinations(a, n)))


copied, sameness, stated = jax.jit(meaning.copied), jax.jit(form.sameness), jax.jit(emotion.stated)
few = st.lists(st.lists(st.integers(0, 3), max_size=7), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(few, few, st.integers(0, 3))
def test_copied_is_the_share_of_words_that_python_finds(replies, clients, garbage):
    ids, mask = pack(replies, 7, garbage)
    client, client_mask = pack(clients, 7, garbage)
    b = blank(4)._replace(words=ids, words_mask=mask, client_words=client, client_mask=client_mask)
    expected = [common(r, c) / max(len(r), 1) for r, c in zip(replies, clients, strict=True)]
    np.testing.assert_allclose(copied(b), expected, rtol=1e-6)


def test_an_echo_earns_nothing_however_relevant():
    said = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    replies = [said, [*said, 7], [7, 7, 7], [7, 7, 7]]
    ids, mask = pack(replies)
    client, client_mask = pack([said] * 4)
    point = jnp.asarray([[1.0, 2.0, 2.0]] * 4)
    b = blank(4)._replace(words=ids, words_mask=mask, client_words=client, client_mask=client_mask, meaning=point)
    b = b._replace(client_meaning=jnp.asarray([[1.0, 2.0, 2.0]] * 3 + [[-1.0, -2.0, -2.0]]))
    np.testing.assert_allclose(meaning.context(b), [0, 1 / 10, 1, 0], atol=UNIT)  # the last: off the topic, not below 0
    turned = jnp.asarray([[2.0, 1.0, -2.0]] * 4)  # at right angles to the reply: the mean of 1 and 0
    np.testing.assert_allclose(meaning.context(b._replace(context_meaning=turned)), [0, 1 / 20, 1 / 2, 0], atol=UNIT)


# Emotion and strategy.

SADNESS, DEPRESSION, JOY, NEUTRAL, FEAR, ANGER, DISGUST = (
    EMOTIONS.index(name) for name in ("sadness", "depression", "joy", "neutral", "fear", "anger", "disgust")
)


def test_likeness_is_the_wheel():
    got = np.asarray(emotion.likeness())
    np.testing.assert_array_equal(got, got.T)
    np.testing.assert_array_equal(np.diag(got), 1)
    assert got.min() >= -UNIT and got.max() <= 1
    right, eighth = 1 - np.sqrt(2) / 2, 1 - np.sin(np.pi / 8)  # chords of 90 and 45 degrees
    by_hand = {
        (JOY, DEPRESSION): 0, (FEAR, ANGER): 0, (JOY, SADNESS): 0.15, (SADNESS, DEPRESSION): 0.85,
        (NEUTRAL, SADNESS): 0.65, (NEUTRAL, JOY): 0.5, (NEUTRAL, FEAR): 0.5, (NEUTRAL, ANGER): 0.5,
        (NEUTRAL, DISGUST): 0.5, (NEUTRAL, DEPRESSION): 0.5, (JOY, FEAR): right, (JOY, ANGER): right,
        (FEAR, DEPRESSION): right, (ANGER, DEPRESSION): right, (DISGUST, DEPRESSION): eighth, (DISGUST, ANGER): eighth,
        (FEAR, SADNESS): 1 - np.sqrt(1.49) / 2, (DISGUST, JOY): 1 - np.cos(np.pi / 8),
    }  # fmt: skip
    for (a, b), value in by_hand.items():
        np.testing.assert_allclose(got[a, b], value, atol=UNIT, err_msg=f"{EMOTIONS[a]} {EMOTIONS[b]}")


@st.composite
def priors(draw, n):
    """Shares of n classes, some of which may be missing, from counts of very different sizes."""
    counts = draw(st.lists(st.integers(0, 5) | st.integers(0, 10**5), min_size=n, max_size=n))
    return np.asarray(counts, np.float32) / np.float32(max(sum(counts), 1))


balanced = jax.jit(emotion.balanced)


@settings(max_examples=100, deadline=None)
@given(priors(5), st.integers(0, 2**32 - 1))
def test_balanced_rewards_every_constant_answer_with_nothing(prior, seed):
    likeness = np.random.default_rng(seed).uniform(size=(5, 5)).astype(np.float32)
    table, counts = np.asarray(balanced(likeness, prior), np.float64), prior >= emotion.RARE
    # Each of five summands is at most the smallest share, at most 1/2, and rounded to some float32 eps (6e-8) of that.
    np.testing.assert_allclose(table @ prior, 0, atol=5e-7)
    assert table.min() >= -1 and table.max() <= 1
    assert not table[:, ~counts].any()  # never seen, or too rarely to be made up for
    assert table.any() == (counts.sum() > 1)


@settings(max_examples=100, deadline=None)
@given(priors(E))
def test_on_the_wheel_the_right_answer_is_never_beaten(prior):
    """By the triangle inequality, whatever the shares; where all seven count, it is better than every other."""
    table = np.asarray(balanced(emotion.likeness(), prior))
    for gold in range(E):
        others = np.delete(table[:, gold], gold)
        assert table[gold, gold] >= others.max() - UNIT
        if (prior >= emotion.RARE).all():
            assert table[gold, gold] > others.max()


def test_stated_prefers_the_right_one_then_the_near_ones():
    def earned(said, gold, **changes):
        said, gold = jnp.asarray(said, jnp.int32), jnp.asarray(gold, jnp.int32)
        return np.asarray(stated(blank(len(said))._replace(stated_emotion=said, emotion=gold, **changes)))

    right, near, far, unreadable = earned([DEPRESSION, SADNESS, JOY, -1], [DEPRESSION] * 4)
    assert right > near > 0 > far and unreadable == far  # joy is depression's opposite, so nothing is worse
    for gold in range(E):
        everything = earned([*range(E), -1], [gold] * (E + 1))
        assert everything.argmax() == gold and everything[-1] == everything[:E].min()
    assert not earned([*range(E), -1], [-1] * (E + 1)).any()  # not annotated
    # With the shares of PRIOR, each constant earns nothing over golds that come in those shares.
    golds = np.repeat(np.arange(E), np.round(100 * PRIOR).astype(int))
    for said in range(E):
        np.testing.assert_allclose(earned([said] * len(golds), golds).mean(), 0, atol=UNIT)


@pytest.mark.parametrize(("name", "classes"), [("emotion", E), ("strategy", S)])
def test_a_classifier_earns_what_it_reads_does_by_its_probabilities(name, classes):
    """Certain of a class: what saying it earns. In doubt: the mean of that under its probabilities."""
    term = jax.jit(emotion.expressed if name == "emotion" else strategy.strategy)
    gold, said = (
        jnp.asarray(x.ravel()) for x in np.meshgrid(np.arange(-1, classes), np.arange(classes), indexing="ij")
    )
    prior = jnp.asarray(0.8 * np.random.default_rng(0).dirichlet(np.ones(classes)) + 0.2 / classes, jnp.float32)
    b = blank(len(gold))
    b = b._replace(**{name: gold}, stated_emotion=said, frozen=b.frozen._replace(**{f"{name}_prior": prior}))
    certain = term(b._replace(reading=1e3 * jax.nn.one_hot(said, S)))
    if name == "emotion":
        expected = emotion.stated(b)
    else:  # right or wrong: 1 less the share of a guess, and minus that share; rare ones count for more
        right = (said == gold) - 1 / classes
        expected = jnp.where(gold >= 0, right * prior.min() / prior[gold], 0.0)
    np.testing.assert_allclose(certain, expected, rtol=1e-5, atol=UNIT)
    p = np.random.default_rng(1).dirichlet(np.ones(classes), len(gold))
    doubtful = term(b._replace(reading=jnp.pad(jnp.log(p), ((0, 0), (0, S - classes)))))
    of_class = np.asarray(certain).reshape(classes + 1, classes)[np.asarray(gold) + 1]
    np.testing.assert_allclose(doubtful, (p * of_class).sum(1), rtol=1e-4, atol=UNIT)


# Form.


def distinct2(replies):
    """Distinct-2 (Li et al. 2016) by sets: distinct bigrams / bigrams, a mark before each reply."""
    pairs = [pair for reply in replies for pair in itertools.pairwise([None, *reply])]
    return len(set(pairs)) / len(pairs)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 3, 16]).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), max_size=R), min_size=n, max_size=n)
    )
)
def test_sameness_is_distinct_2_shared_out(replies):
    """1 + the mean weighed by bigrams = Distinct-2; words are hashes in the real thing, so here too."""
    codes = np.random.default_rng(0).integers(-(2**31), 2**31, 5)
    b = blank(len(replies))
    for garbage in (int(codes[0]), 0):
        ids, mask = pack([[codes[word] for word in reply] for reply in replies], garbage=garbage)
        got = np.asarray(sameness(b._replace(words=ids, words_mask=mask)), np.float64)
        sizes = np.asarray([len(reply) for reply in replies])
        assert not got[sizes == 0].any()
        if sizes.any():
            np.testing.assert_allclose(1 + (got * sizes).sum() / sizes.sum(), distinct2(replies), rtol=1e-5)
        # One reply by itself, too: how often does the batch hold each of its bigrams?
        count = Counter(pair for reply in replies for pair in itertools.pairwise([None, *reply]))
        expected: Any = [
            np.mean([1 / count[p] - 1 for p in itertools.pairwise([None, *r])]) if r else 0.0 for r in replies
        ]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=UNIT)


@pytest.mark.parametrize(("size", "reply"), [(1, [11]), (2, [11, 12, 13, 14]), (64, [11, 12])])
def test_a_policy_that_always_says_the_same_loses_nearly_all(size, reply):
    ids, mask = pack([reply] * size)
    got = sameness(blank(size)._replace(words=ids, words_mask=mask))
    np.testing.assert_allclose(got, -(1 - 1 / size), rtol=1e-6)


@pytest.mark.parametrize("prompts", [[0, 1, 2, 3, 4], [3, 3, 5, 5, 5], [1, 1, 1, 1, 1], [2]])
def test_idiom_is_the_mean_rouge_2_with_the_other_prompts_references(prompts):
    random, size = np.random.default_rng(0), len(prompts)
    spoken, references = (
        [random.integers(1, 4, n).tolist() for n in random.integers(0, R + 1, size)] for _ in range(2)
    )
    ids, mask = pack(spoken, garbage=1)
    ref, ref_mask = pack(references, garbage=1)
    b = blank(size)._replace(words=ids, words_mask=mask, reference_words=ref, reference_mask=ref_mask)
    got = jax.jit(form.idiom)(b._replace(prompt=jnp.asarray(prompts)))

    scorer = rouge_scorer.RougeScorer(["rouge2"])
    text = lambda words: " ".join(f"w{word}" for word in words)  # noqa: E731
    for i, p in enumerate(prompts):
        others = [text(ref) for ref, q in zip(references, prompts, strict=True) if q != p]
        scores = [scorer.score(other, text(spoken[i]))["rouge2"].fmeasure for other in others]
        assert float(got[i]) == pytest.approx(np.mean(scores) if scores else 0.0, abs=1e-6)
    assert len(set(prompts)) == 1 or np.asarray(got).any()


def test_replies_to_one_prompt_may_be_alike():
    """Two prompts, two replies each. Bigrams: mark-1 stands in all four replies, 1-2 in both of the first prompt alone, 1-3
    in one reply of the second. Expected counts where each prompt is answered once: 1 + 2/2, 1, 1."""
    ids, mask = pack([[1, 2], [1, 2], [1, 3], [1]])
    b = blank(4)._replace(words=ids, words_mask=mask, prompt=jnp.asarray([7, 7, 0, 0]))
    np.testing.assert_allclose(sameness(b), [-0.25, -0.25, -0.25, -0.5], rtol=1e-6)
    order = jnp.asarray([2, 0, 3, 1])  # whatever the order of the replies
    mixed = b._replace(words=ids[order], words_mask=mask[order], prompt=b.prompt[order])
    np.testing.assert_allclose(sameness(mixed), [-0.25, -0.25, -0.5, -0.25], rtol=1e-6)


def test_repetition_length_and_ending_by_hand():
    ids, mask = pack([[1, 2, 1, 2, 1], [1, 2, 3, 4], [5], []], garbage=1)
    b = blank(4)._replace(words=ids, words_mask=mask)
    assert form.repetition(b).tolist() == [-0.5, 0, 0, 0]  # bigrams 12 21 12 21: the last two are repeats
    b = b._replace(reference_mask=pack([[1] * 10, [1] * 4, [1] * 4, []])[1])
    assert form.length(b).tolist() == [-0.5, 0, -0.75, 0]
    b = b._replace(ended=jnp.asarray([1, 1, 0, 0], bool), ends_sentence=jnp.asarray([1, 0, 1, 0], bool))
    assert form.ending(b).tolist() == [1, 0.5, 0, 0]


BAD = (
    "It is your own fault.", "YOUR OWN FAULT", "well,your own fault", "(your own fault)", "You're weak!", "you are  weak",
    "Take 20 mg tonight", "mg", "I'll prescribe these.", "What's wrong with you?", "Oh, SHAME ON YOU", "shame, on... you",
)  # fmt: skip
GOOD = (
    "", "I hear you.", "20 mgs", "omg", "mg3", "your own faults", "your own", "fault your own", "youre weak", "own fault",
    "ashamed on you", "shame on yours", "It is not your fault.", "Where did you grow up?", "You need to take your time.",
)  # fmt: skip


@pytest.mark.parametrize("size", [None, 400])  # of a trained vocabulary; None: GPT-2's own
def test_manner_finds_phrases_of_whole_words_in_real_tokens(size, request):
    if size is None:
        tokenizer = prompts.load_tokenizer(request.getfixturevalue("shared_data") / "gpt2_tokenizer")
    else:
        texts = [prompts.plain_text(d.turns) for d in dialogue.read_dialogues(None, "jsonl")["train"]]
        tokenizer = prompts.train_tokenizer(texts, size)
    prompts.add_special_tokens(tokenizer)
    encoded = [prompts.encode_text(tokenizer, text) if text else [] for text in (*BAD, *GOOD)]
    tokens, mask = batching.pad(encoded, max(map(len, encoded)) + 2, "right")
    ids, mask = jax.jit(words.fold)(
        jnp.asarray(tokens), jnp.asarray(mask), words.make_vocabulary(tokenizer, len(tokenizer))
    )
    manner, b = jax.jit(form.manner), blank(len(encoded))._replace(words=ids, words_mask=mask)
    got = manner(b).tolist()
    assert not manner(b._replace(words_mask=jnp.zeros_like(mask))).any()
    for text, value, wanted in zip((*BAD, *GOOD), got, [-1] * len(BAD) + [0] * len(GOOD), strict=True):
        assert value == wanted, text


def test_on_mescs_shares_nothing_is_rewarded():
    """What is rarer than 1 % is too rare to reward (README); MESC's therapists are neutral in 98 of 100 turns."""

    def table(*few):
        shares = jnp.asarray([1 - sum(few), *few, 0, 0, 0, 0], jnp.float32)
        return np.asarray(emotion.balanced(emotion.likeness(), shares))

    assert not table(0.0095, 0.0085).any() and table(0.0105, 0.0105)[:, :3].any()
