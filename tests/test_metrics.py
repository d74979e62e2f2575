"""metrics: hand-worked tables, laws, and the known rows of MESC's official test split."""

import math
import os
import socket
from functools import lru_cache
from pathlib import Path

import nltk.data
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import single_meteor_score
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from therapy_jax import dialogue, metrics, wordnet

DATA = Path(os.environ.get("THERAPY_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
MESC = DATA / "mesc" / "MESC.csv"
OVERLAP = ("bleu", "rouge1", "rouge2", "rougeL", "meteor")
# A dictionary of one synset, {car, auto}: it lets the road from files to METEOR run where WordNet is not installed.
TINY = {
    "data.adj": "  1 WordNet 9.9 Copyright\n",
    "data.noun": "00000000 06 n 02 car 0 auto 0 000 | with wheels\n",
    "index.noun": "car n 1 0 1 0 00000000\nauto n 1 0 1 0 00000000\n",
}


def need_wordnet() -> None:
    if wordnet.reader() is None:
        reason = "WordNet is absent (Debian: wordnet-base; or nltk's package wordnet)"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"{reason}, and in CI it must be there")
        pytest.skip(reason)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of files as Debian has them, with nothing but {car, auto} in it; every second one is a link."""
    source, real = tmp_path / "source", tmp_path / "real"
    source.mkdir()
    real.mkdir()
    parts = ("adj", "adv", "noun", "verb")
    for i, name in enumerate(f for p in parts for f in (f"data.{p}", f"index.{p}", f"{p}.exc")):
        (real / name).write_text(TINY.get(name, ""))
        (source / name).symlink_to(real / name) if i % 2 else (real / name).rename(source / name)
    return source


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without WordNet and with an empty cache folder."""
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(wordnet, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("THERAPY_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wordnet, "reader", lru_cache(wordnet.reader.__wrapped__))
    return tmp_path


def test_words():
    assert metrics.words("I don't KNOW, (really).") == ("i", "do", "n't", "know", ",", "(", "really", ")", ".")
    assert metrics.words(" \n ") == ()


@pytest.mark.parametrize(
    "reply, reference, expected",
    [
        ("the cat sat on the mat", "The cat is on the mat", (5 / 6 * 3 / 5 * 1 / 4 * 0.1 / 3) ** 0.25),
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "a b c d e f g h", math.exp(1 - 8 / 4)),  # brevity penalty
        ("the the the the", "the cat", (1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25),  # a count is clipped
        ("What?", "what?", (1 * 1 * 0.1 * 0.1) ** 0.25),  # under four words even a copy is not 1
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("yes", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_bleu_by_hand(reply, reference, expected):
    assert metrics.bleu([reply], [reference]) == {"bleu": pytest.approx(expected, abs=1e-12)}


def test_bleu_is_a_mean_and_corpus_bleu_is_not():
    replies, references = ["a b c d e", "f g h"], ["a b c d e", "f x h"]
    second = (2 / 3 * 0.1 / 2 * 0.1 * 0.1) ** 0.25
    assert metrics.bleu(replies, references)["bleu"] == pytest.approx((1 + second) / 2)
    # counts of the two added up: 7/8 words, 4/6 pairs, 3/4 triples (one of "f g h"), 2/3 quadruples (at least 1 each)
    expected = (7 / 8 * 4 / 6 * 3 / 4 * 2 / 3) ** 0.25
    assert metrics.corpus_bleu(replies, references)["corpus_bleu"] == pytest.approx(expected)
    assert metrics.corpus_bleu(["yes"], ["no"])["corpus_bleu"] == 0
    assert metrics.corpus_bleu([""], ["no"])["corpus_bleu"] == 0


@pytest.mark.parametrize(
    "reply, reference, expected",
    [
        ("The dogs ran home!", "a dog ran home quickly", (6 / 9, 4 / 7, 6 / 9)),  # stems; P 3/4 R 3/5, P 2/3 R 2/4
        ("ran dog", "dog ran", (1.0, 0.0, 0.5)),  # order counts for ROUGE-L alone
        ("we talked talked", "we talk", (4 / 5, 2 / 3, 4 / 5)),
        ("no", "yes", (0.0, 0.0, 0.0)),
        ("", "yes", (0.0, 0.0, 0.0)),
        ("?!", "yes", (0.0, 0.0, 0.0)),
        ("", "", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_by_hand(reply, reference, expected):
    assert metrics.rouge([reply], [reference]) == pytest.approx(dict(zip(metrics.ROUGE, expected, strict=True)))


METEOR = [
    ("the cat sat", "The cat sat", 1 - 0.5 * (1 / 3) ** 3),  # three matches in one chunk
    ("sat the cat", "the cat sat", 1 - 0.5 * (2 / 3) ** 3),  # in two chunks
    ("the cat", "the cat sat down", 0.5 / (0.9 * 1 + 0.1 * 0.5) * (1 - 0.5 * (1 / 2) ** 3)),  # P 1, R 1/2
    ("the cat sat down", "the cat", 0.5 / (0.9 * 0.5 + 0.1 * 1) * (1 - 0.5 * (1 / 2) ** 3)),  # P 1/2, R 1
    ("dogs", "dog", 0.5),  # by stem
    ("yes", "no", 0.0),
    ("", "no", 0.0),
    ("", "", 0.0),
]


@pytest.mark.parametrize("reply, reference, expected", METEOR)
def test_meteor_by_hand(reply, reference, expected):
    need_wordnet()
    assert metrics.meteor([reply], [reference]) == {"meteor": pytest.approx(expected)}


def test_meteor_knows_synonyms():
    need_wordnet()
    assert metrics.meteor(["my car"], ["my auto"])["meteor"] == pytest.approx(1 - 0.5 / 8)


def test_meteor_is_nltks_own(mesc_test):
    """Our shortcuts (cached stems, names of synonyms gathered) change no digit of single_meteor_score."""
    need_wordnet()
    for x in mesc_test[:60]:
        a, b = metrics.words(x.client.text), metrics.words(x.therapist.text)
        plain = single_meteor_score(b, a, wordnet=wordnet.reader())  # type: ignore[arg-type]
        assert metrics.item_scores(x.client.text, x.therapist.text)["meteor"] == plain


@pytest.mark.parametrize("reply, reference, expected", [*METEOR, ("car", "auto", 0.0)])
def test_without_wordnet_meteor_has_another_name(reply, reference, expected, elsewhere):
    assert wordnet.reader() is None
    assert metrics.meteor([reply], [reference]) == {"meteor_exact_stem": pytest.approx(expected)}
    assert "meteor" not in metrics.text_metrics([reply], [reference])
    assert "|meteor:nltk,exact+stem|" in metrics.signature()


def test_debian_files_become_a_dictionary_in_the_cache(elsewhere, tiny, monkeypatch):
    monkeypatch.setattr(wordnet, "DEBIAN", tiny)
    old = os.umask(0o002)
    try:
        assert metrics.meteor(["my car"], ["my auto"]) == {"meteor": pytest.approx(1 - 0.5 / 8)}
    finally:
        os.umask(old)
    assert "|meteor:nltk,wordnet9.9|" in metrics.signature()
    made = elsewhere / "cache" / "nltk_data" / "corpora" / "wordnet"
    assert not any(file.is_symlink() or file.stat().st_mode & 0o022 for file in [made, *made.iterdir()])
    assert os.listdir(elsewhere / "cache" / "nltk_data") == ["corpora"]
    monkeypatch.setattr(wordnet, "DEBIAN", elsewhere / "nowhere")
    wordnet.reader.cache_clear()
    assert metrics.meteor_name() == "meteor", "the cache alone is enough the second time"


def test_a_dictionary_in_nltks_path_needs_no_cache(elsewhere, tiny, monkeypatch):
    wordnet.install(elsewhere / "mine", tiny)
    monkeypatch.setattr(nltk.data, "path", [str(elsewhere / "mine")])
    monkeypatch.setattr(wordnet, "DEBIAN", tiny)
    assert metrics.meteor_name() == "meteor" and not (elsewhere / "cache").exists()


def test_install_wordnet(tiny, tmp_path):
    made = wordnet.install(tmp_path / "target", tiny)
    lines = (made / "lexnames").read_text().splitlines()
    assert len(lines) == 45
    rows = {
        0: "00\tadj.all\t3",
        2: "02\tadv.all\t4",
        3: "03\tnoun.Tops\t1",
        28: "28\tnoun.time\t1",
        29: "29\tverb.body\t2",
        43: "43\tverb.weather\t2",
        44: "44\tadj.ppl\t3",
    }
    assert {i: lines[i] for i in rows} == rows
    assert (made / "data.noun").read_text() == TINY["data.noun"]
    assert wordnet.install(tmp_path / "target", tiny) == made
    (tiny / "verb.exc").unlink()
    with pytest.raises(FileNotFoundError, match=r"verb\.exc"):
        wordnet.install(tmp_path / "other", tiny)
    assert not (tmp_path / "other").exists()


def test_a_cache_that_cannot_be_written_is_said_aloud(elsewhere, tiny, monkeypatch):
    (elsewhere / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(wordnet, "DEBIAN", tiny)
    with pytest.warns(UserWarning, match="could not be copied"):
        assert wordnet.reader() is None


def test_distinct_by_hand():
    replies = ["a b A", "a b", ""]
    assert metrics.distinct(replies, 1) == 2 / 5
    assert metrics.distinct(replies, 2) == 2 / 3  # ab, ba, ab: none across replies
    assert metrics.distinct(replies, 4) == 0.0


def test_commonest_and_length():
    replies = ["Go on.", "I see.", " i  SEE.", ""]
    assert metrics.commonest(replies) == ("i see.", 0.5)
    assert metrics.commonest_share(replies) == 0.5
    assert metrics.commonest(["b", "a", "a", "b"]) == ("b", 0.5), "the earliest of equals"
    assert metrics.reply_words(replies) == (3 + 3 + 3 + 0) / 4


def test_emotions_by_hand():
    gold = ["neutral", "neutral", "neutral", "sadness", None]
    predicted = ["neutral", " Neutral", "sadness", "sadness", "joy"]
    scores = metrics.emotion_scores(predicted, gold, "emotion_stated")
    assert scores == {
        "emotion_stated_accuracy": 3 / 4,
        "emotion_stated_macro_f1": pytest.approx((2 * 2 / (2 + 3) + 2 * 1 / (2 + 1)) / 2),
    }
    assert metrics.majority_accuracy(gold) == 3 / 4
    nothing = metrics.emotion_scores([None] * 4, gold[:4], "e")
    assert nothing == {"e_accuracy": 0.0, "e_macro_f1": 0.0}


LABELS = st.sampled_from(["neutral", "sadness", "joy", "fear"])


@settings(deadline=None)
@given(st.lists(st.tuples(LABELS | st.none(), LABELS), min_size=1, max_size=30))
def test_emotion_scores_are_scikit_learns(pairs):
    predicted, gold = [p for p, _ in pairs], [g for _, g in pairs]
    said, classes = [p or "missing" for p in predicted], sorted(set(gold))
    f1 = f1_score(gold, said, labels=classes, average="macro", zero_division=0)  # type: ignore[arg-type]
    expected = {"x_accuracy": accuracy_score(gold, said), "x_macro_f1": f1}
    assert metrics.emotion_scores(predicted, gold, "x") == pytest.approx(expected)
    assert metrics.emotion_scores([*predicted, "joy"], [*gold, None], "x") == pytest.approx(expected)


TEXT = st.text(max_size=30) | st.lists(st.sampled_from("you feel feels feeling sad What ? .".split())).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_laws(pairs):
    replies, references = [a for a, _ in pairs], [b for _, b in pairs]
    scores = metrics.text_metrics(replies, references)
    items = [metrics.item_scores(a, b) for a, b in pairs]
    assert {k: scores[k] for k in items[0]} == pytest.approx(metrics.mean_scores(items))
    apart = metrics.bleu(replies, references) | metrics.rouge(replies, references)
    assert {k: scores[k] for k in items[0]} == pytest.approx(apart | metrics.meteor(replies, references))
    assert all(0 <= value <= 1 + 1e-12 for key, value in scores.items() if key != "reply_words")
    assert metrics.rouge(replies, references) == pytest.approx(metrics.rouge(references, replies)), "F1 is symmetric"
    assert metrics.text_metrics(replies[::-1], references[::-1]) == pytest.approx(scores), "order does not count"


def test_keys_of_text_metrics():
    overlap = [*metrics.ROUGE, "bleu", metrics.meteor_name()]
    rest = ["distinct1", "distinct2", "commonest_share", "reply_words"]
    assert sorted(metrics.text_metrics(["yes"], ["no"])) == sorted(overlap + rest)


@pytest.mark.parametrize(
    "function", [metrics.bleu, metrics.corpus_bleu, metrics.rouge, metrics.meteor, metrics.text_metrics]
)
def test_wrong_lists_raise(function):
    with pytest.raises(ValueError, match="empty"):
        function([], [])
    with pytest.raises(ValueError, match="2 replies but 1 references"):
        function(["a", "b"], ["a"])


def test_wrong_lists_raise_everywhere_else():
    for function in (
        metrics.commonest,
        metrics.commonest_share,
        metrics.reply_words,
        metrics.majority_accuracy,
        metrics.mean_scores,
        lambda replies: metrics.distinct(replies, 1),
    ):
        with pytest.raises(ValueError, match="empty"):
            function([])
    for predicted, gold, reason in (([], [], "no gold label"), (["joy"], [None], "no gold label"), (["joy"], [], "1")):
        with pytest.raises(ValueError, match=reason):
            metrics.emotion_scores(predicted, gold, "x")


def items(rng: np.random.Generator, n: int, shift: float) -> list[dict[str, float]]:
    """Two metrics of n exchanges: one normal, one as skewed as sentence BLEU is."""
    columns = rng.normal(0.3 + shift, 0.1, n), rng.exponential(0.05 + shift, n)
    return [{"rougeL": float(x), "bleu": float(y)} for x, y in zip(*columns, strict=True)]


def test_paired_bootstrap_is_scipys(rng):
    """Both are random: with S resamples a percentile wanders by sqrt(p (1 - p) / S) / density, here 0.027 standard errors
    of the mean at S = 10,000 (normal density at 1.96), so two of them differ by less than 5 * sqrt(2) * 0.027 = 0.19."""
    a, b = items(rng, 80, 0.02), items(rng, 80, 0.0)
    found = metrics.paired_bootstrap(a, b, resamples=10_000, seed=1)
    for key in ("rougeL", "bleu"):
        difference = np.array([x[key] - y[key] for x, y in zip(a, b, strict=True)])
        expected = stats.bootstrap(
            (difference,), np.mean, n_resamples=10_000, method="percentile", confidence_level=0.95, rng=rng
        )
        assert found[key][0] == pytest.approx(difference.mean())
        close = 0.19 * float(expected.standard_error)
        assert found[key][1:] == pytest.approx(tuple(expected.confidence_interval), rel=0, abs=close)
        assert found[key][1] < found[key][0] < found[key][2]


def test_paired_bootstrap_resamples_pairs(rng):
    """A constant difference stays what it is however the exchanges are drawn: drawn apart, the systems would not show it."""
    b = items(rng, 50, 0.0)
    a = [{"rougeL": x["rougeL"] + 0.125, "bleu": x["bleu"] - 0.5} for x in b]
    found = metrics.paired_bootstrap(a, b, resamples=200, seed=0)
    assert found["rougeL"] == pytest.approx((0.125,) * 3, abs=1e-12)  # sums of 50 doubles round at 1e-15
    assert found["bleu"] == pytest.approx((-0.5,) * 3, abs=1e-12)


def test_paired_bootstrap_laws(rng):
    a, b = items(rng, 30, 0.1), items(rng, 30, 0.0)
    found = metrics.paired_bootstrap(a, b, resamples=300, seed=7)
    assert found == metrics.paired_bootstrap(a, b, resamples=300, seed=7)
    assert found != metrics.paired_bootstrap(a, b, resamples=300, seed=8)
    for key, (mean, low, high) in metrics.paired_bootstrap(b, a, resamples=300, seed=7).items():
        assert (-mean, -high, -low) == pytest.approx(found[key]), "the other way round"
    with pytest.raises(ValueError, match="30 items of one system but 29 of the other"):
        metrics.paired_bootstrap(a, b[:-1], resamples=10, seed=0)
    with pytest.raises(ValueError, match="empty"):
        metrics.paired_bootstrap([], [], resamples=10, seed=0)


def test_signature():
    need_wordnet()
    assert metrics.signature() == (
        "tok:NLTKWordTokenizer,lower|bleu:sentence,nltk,method1|rouge:rouge-score 0.1.2,stem|meteor:nltk,wordnet3.0|v1"
    )


def test_nothing_asks_the_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    for module, name in ((wordnet, "reader"), (metrics, "words")):
        monkeypatch.setattr(module, name, lru_cache(getattr(module, name).__wrapped__))  # an empty cache
    scores = metrics.text_metrics(["I feel sad about my car."], ["You feel sad about your auto?"])
    assert scores["rouge1"] == pytest.approx(2 * 3 / 12)


@pytest.fixture(scope="module")
def mesc_test() -> list[dialogue.Exchange]:
    if not MESC.is_file():
        pytest.skip(f"MESC is not at {MESC}: set THERAPY_JAX_DATA")
    return dialogue.read(MESC, format="mesc", splits="official", clean=False)["test"]


ROWS = {  # system: BLEU, ROUGE-1, ROUGE-2, ROUGE-L, METEOR
    "What?": (0.0125, 0.0526, 0.0000, 0.0526, 0.0587),
    "What do you mean?": (0.0254, 0.1388, 0.0209, 0.1316, 0.1066),
    "How do you feel about that?": (0.0216, 0.1404, 0.0164, 0.1278, 0.1068),
    "I don't know.": (0.0167, 0.0655, 0.0183, 0.0642, 0.0622),
    "<echo>": (0.0180, 0.1293, 0.0262, 0.1087, 0.1280),
    "<echo of 15 words>": (0.0180, 0.1203, 0.0222, 0.1047, 0.0953),
}


@pytest.mark.parametrize("system", ROWS)
def test_known_rows_of_mesc(system, mesc_test):
    need_wordnet()
    references, client = [x.therapist.text for x in mesc_test], [x.client.text for x in mesc_test]
    assert len(references) == 454
    echoes = {"<echo>": client, "<echo of 15 words>": [" ".join(text.split()[:15]) for text in client]}
    scores = metrics.text_metrics(echoes.get(system, [system] * 454), references)
    assert {k: scores[k] for k in OVERLAP} == pytest.approx(dict(zip(OVERLAP, ROWS[system], strict=True)), abs=1e-4)


def test_neutral_is_the_majority_of_mesc(mesc_test):
    gold = [x.therapist.emotion for x in mesc_test]
    assert metrics.majority_accuracy(gold) == pytest.approx(451 / 454)
    always = metrics.emotion_scores(["neutral"] * 454, gold, "e")
    assert always == {"e_accuracy": pytest.approx(451 / 454), "e_macro_f1": pytest.approx(451 / (451 + 454))}
