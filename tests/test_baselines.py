"""baselines: small corpora where the answer is known, and the known rows of MESC's official test split."""

import os
import time
from pathlib import Path

import pytest

from therapy_jax import baselines, dialogue, metrics, wordnet
from therapy_jax.dialogue import Exchange, Turn

DATA = Path(os.environ.get("THERAPY_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
MESC = DATA / "mesc" / "MESC.csv"
OVERLAP = ("bleu", "rouge1", "rouge2", "rougeL", "meteor")


def exchange(client: str, therapist: str, emotion: str | None = "neutral", felt: str | None = "fear") -> Exchange:
    return Exchange("1", (), Turn("client", client, felt), Turn("therapist", therapist, emotion, "Approval"))


def nonsense(n: int) -> list[Exchange]:
    return [exchange(f"c{i}", f"x{i} y{i} z{i} w{i} v{i}") for i in range(n)]


def test_constant_is_the_reply_that_fits_most():
    train = [exchange(f"q{i}", "I see what you mean.", "joy") for i in range(20)] + nonsense(30)
    best = baselines.constant(train)
    assert list(best) == list(metrics.item_scores("a", "b")) and len(best) == 5
    assert {turn.text for turn in best.values()} == {"I see what you mean."}
    assert {turn.emotion for turn in best.values()} == {"neutral"}, "the majority of train, not the reply's own"
    assert {turn.speaker for turn in best.values()} == {"therapist"}


def test_constant_looks_beyond_the_commonest_replies():
    others = [exchange("q", f"how do you feel about {a} {b}") for a in "abcde" for b in "fghij"]
    centre = [exchange("q", "how do you feel about")] * 4
    train = [exchange("q", "hm")] * 10 + others + centre
    best = baselines.constant(train, candidates=3)
    assert best["rouge1"].text == best["rougeL"].text == "how do you feel about"
    assert {turn.text for turn in baselines.constant(train, candidates=1).values()} == {"hm"}


def test_constant_differs_by_metric():
    """80 of 100 turns say the first three words, 20 the others: METEOR, which weighs recall, prefers both.

    With three candidates there is one of each kind: the commonest, the best by word F1, the best by recall.
    """
    train = [exchange("q", "one two three")] * 80 + [exchange("q", "four five six")] * 20
    rare = ("one two three four five six", "one two three indeed", "one two")
    train = train * 8 + [exchange("q", text) for text in rare] * 8
    for candidates in (3, 120):
        best = baselines.constant(train, candidates=candidates)
        assert best["rouge1"].text == "one two three"
        assert best[metrics.meteor_name()].text == "one two three four five six"


def test_constant_is_not_judged_by_the_turn_it_was_taken_from():
    """All replies differ, so a reply scored against itself would win; the only real overlap is "so"."""
    train = nonsense(40) + [exchange(f"s{i}", f"so s{i}") for i in range(8)]
    for seed in range(5):
        assert baselines.constant(train, seed=seed)["rouge1"].text.startswith("so ")


def test_constant_depends_on_seed_alone():
    train = [exchange(f"q{i}", f"do you {'abcdefg'[i % 7]} {'hijkl'[i % 5]} {'mno'[i % 3]}") for i in range(60)]
    runs = [baselines.constant(train, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert any(run != runs[0] for run in runs[2:])


def test_constant_of_one_exchange_and_of_none():
    assert baselines.constant([exchange("q", "Go on.", None)])["bleu"] == Turn("therapist", "Go on.", None, "Approval")
    for train in ([], [exchange("q", "  ")]):
        with pytest.raises(ValueError):
            baselines.constant(train)


def test_commonplace_is_what_others_say_too_and_as_varied_as_asked():
    """Of three openings the one that most turns share comes first; how many turns are used follows from the variety."""
    said = {"how do you": 60, "it is only": 20, "well now then": 4}
    train = [exchange("q", f"{opening} {opening[0]}{i}") for opening, count in said.items() for i in range(count)]
    train += nonsense(16) + [exchange("q", "one")] * 10
    one = baselines.commonplace(train, 12, 0, 0.0)
    assert len({turn.text for turn in one}) == 1 and one[0].text.startswith("how do you")
    # k different replies said 12 times in all have 2 + k different word pairs of 36
    for asked, k in ((0.2, 6), (0.25, 7), (0.38, 12)):
        found = baselines.commonplace(train, 12, 0, asked)
        assert len({turn.text for turn in found}) == k and all(turn.text.startswith("how do you") for turn in found)
    assert metrics.distinct([t.text for t in baselines.commonplace(train, 40, 0, 1.0)], 2) < 1.0, "as varied as can be"
    assert baselines.commonplace(train, 12, 0, 0.25) == baselines.commonplace(train, 12, 0, 0.25)
    with pytest.raises(ValueError, match="fewer than two therapist turns"):
        baselines.commonplace([exchange("q", "one")] * 3, 4, 0, 0.3)


def test_majority_emotion():
    train = [exchange("q", "a", label) for label in ("sadness", "joy", "joy", None, None, None)]
    assert baselines.majority_emotion(train) == "joy"
    assert baselines.majority_emotion(train[3:]) is None


def test_retrieval_returns_the_neighbours_answer():
    train = [
        exchange("the weather is fine today", "Enjoy it."),
        exchange("my father never talks to me", "What would you tell him?", "sadness"),
        exchange("i lost my job", "I am sorry.", "sadness"),
        exchange("I lost my job", "The later of two equals."),
    ]
    queries = [exchange(text, "unknown") for text in ("My FATHER, he never talks.", "I lost my job!", "zzz", "")]
    found = baselines.retrieval(train, queries)
    assert found == [train[1].therapist, train[2].therapist, train[0].therapist, train[0].therapist]
    many = baselines.retrieval(train, queries[:2] * 300)
    assert many == found[:2] * 300
    assert baselines.retrieval(train, []) == []


def test_retrieval_hears_the_client_only_and_order_of_words():
    train = [exchange("you left me", "A"), exchange("me left you", "B"), exchange("x y", "you left me")]
    assert [turn.text for turn in baselines.retrieval(train, [exchange("me left you", "A")])] == ["B"]
    assert [turn.text for turn in baselines.retrieval(train, [exchange("x", "you left me")])] == ["you left me"]


def test_random_reply():
    train = nonsense(20)
    replies = baselines.random_reply(train, 400, seed=3)
    assert replies == baselines.random_reply(train, 400, seed=3) != baselines.random_reply(train, 400, seed=4)
    assert {turn.text for turn in replies} == {x.therapist.text for x in train}
    assert len(replies) == 400


def test_echo():
    assert baselines.echo([exchange("I am afraid.", "Of what?")]) == [Turn("therapist", "I am afraid.", "fear", None)]


def test_no_train_raises():
    for call in (
        lambda: baselines.retrieval([], nonsense(1)),
        lambda: baselines.random_reply([], 1, 0),
        lambda: baselines.majority_emotion([]),
    ):
        with pytest.raises(ValueError, match="empty"):
            call()


@pytest.fixture(scope="module")
def mesc() -> dict[str, list[Exchange]]:
    if not MESC.is_file():
        pytest.skip(f"MESC is not at {MESC}: set THERAPY_JAX_DATA")
    if wordnet.reader() is None:
        (pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip)("WordNet is absent")
    return dialogue.read(MESC, format="mesc", splits="official", clean=False)


def row(replies: list[Turn], test: list[Exchange]) -> list[float]:
    scores = metrics.text_metrics([turn.text for turn in replies], [x.therapist.text for x in test])
    return [scores[name] for name in OVERLAP]


def test_retrieval_on_mesc(mesc):
    replies = baselines.retrieval(mesc["train"], mesc["test"])
    assert row(replies, mesc["test"]) == pytest.approx([0.0154, 0.0947, 0.0112, 0.0827, 0.0905], abs=1e-3)


def test_commonplace_on_mesc(mesc):
    """Phrases without listening beat listening without phrases, by word pairs; and they are as varied as we ask."""
    replies = baselines.commonplace(mesc["train"], 454, 0, 0.34)
    _, rouge1, rouge2, *_ = row(replies, mesc["test"])
    assert 0.34 <= metrics.distinct([t.text for t in replies], 2) < 0.36 and rouge2 > 0.0112 and rouge1 > 0.0947


def test_random_and_echo_on_mesc(mesc):
    rows = [row(baselines.random_reply(mesc["train"], 454, seed), mesc["test"]) for seed in range(5)]
    mean = [sum(column) / 5 for column in zip(*rows, strict=True)]
    assert mean == pytest.approx([0.0119, 0.0846, 0.0058, 0.0743, 0.0837], abs=0.006)  # 3 sd of a mean of 5
    echoes = baselines.echo(mesc["test"])
    assert row(echoes, mesc["test"]) == pytest.approx([0.0180, 0.1293, 0.0262, 0.1087, 0.1280], abs=1e-4)
    gold = [x.therapist.emotion for x in mesc["test"]]
    stated = metrics.emotion_scores([turn.emotion for turn in echoes], gold, "stated")
    assert stated["stated_accuracy"] == pytest.approx(0.3943, abs=1e-4)


@pytest.mark.slow
def test_constant_on_mesc(mesc):
    start = time.process_time()
    best = baselines.constant(mesc["train"])
    assert time.process_time() - start < 60, "it runs in every evaluation"
    scores = {name: row([turn] * 454, mesc["test"])[OVERLAP.index(name)] for name, turn in best.items()}
    assert scores["rouge1"] > 0.15 and scores["rougeL"] > 0.13 and scores["meteor"] > 0.16 and scores["bleu"] > 0.02
    assert {turn.emotion for turn in best.values()} == {"neutral"}
