"""Systems that do not listen, to keep the table honest: whatever a model scores must be read beside these.

Each is chosen on train alone (how varied `commonplace` is to be, its caller says) and answers with Turns (text, emotion and
strategy), so that stated emotion is scored as well. On MESC a constant reply beats retrieval and random replies on ROUGE, and
"neutral" is right for 98 % of turns.

>>> from therapy_jax.dialogue import Exchange, Turn
>>> known = Exchange("c1", (), Turn("client", "I cannot sleep."), Turn("therapist", "Since when?"))
>>> [turn.text for turn in retrieval([known], [replace(known, client=Turn("client", "Sleep will not come."))])]
['Since when?']
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from therapy_jax.dialogue import DataError, Exchange, Turn
from therapy_jax.metrics import distinct, item_scores, mean_scores, words

SAMPLE = 4000  # of train's turns, where it has more: every reply is held against every other


def constant(train: Sequence[Exchange], seed: int = 0, candidates: int = 120, references: int = 800) -> dict[str, Turn]:
    """The best single answer to everything, one for each overlap metric (the keys of `metrics.item_scores`).

    Train is shuffled and cut in two: `references` therapist turns to score against (at most half of train), and the
    rest, whose replies are the candidates, so none is scored against the very turn that it was taken from. A third of
    the candidates are the commonest replies; the others are those of most word overlap (`_overlap`). All of them meet
    the first quarter of the references; the ten best by each metric meet all. Every answer carries train's
    `majority_emotion`, which makes it the best constant by emotion accuracy too. Same train and seed, same answers;
    about half a minute on MESC. Raises DataError where train has no reply.
    """
    turns = [x.therapist for x in _some(train) if words(x.therapist.text)]
    if not turns:
        raise DataError("no therapist turn of train has any word")
    random.Random(seed).shuffle(turns)
    held = max(1, min(references, len(turns) // 2))
    targets, pool = [t.text for t in turns[:held]], turns[held:] or turns
    quarter = max(1, held // 4)
    replies = [text for text, _ in Counter(t.text for t in pool).most_common()]
    chosen = dict.fromkeys(replies[: -(-candidates // 3)])
    sets = [set(words(text)) for text in targets[:quarter]]
    for alpha, size in ((0.5, -(-candidates * 2 // 3)), (0.9, candidates)):
        ranked = sorted(set(replies) - set(chosen), key=lambda text: (-_overlap(text, sets, alpha), text))
        chosen |= dict.fromkeys(ranked[: size - len(chosen)])

    items = {text: [item_scores(text, target) for target in targets[:quarter]] for text in chosen}
    finalists: dict[str, None] = {}
    names = list(items[replies[0]][0])
    for name in names:
        finalists |= dict.fromkeys(sorted(items, key=lambda text: -mean_scores(items[text])[name])[:10])
    means = {t: mean_scores(items[t] + [item_scores(t, target) for target in targets[quarter:]]) for t in finalists}

    turn_of, emotion = {t.text: t for t in pool}, majority_emotion(train)
    winners = {name: max(means, key=lambda text: means[text][name]) for name in names}
    return {name: replace(turn_of[text], emotion=emotion) for name, text in winners.items()}


def _overlap(reply: str, targets: Sequence[set[str]], alpha: float) -> float:
    """A quick stand-in for the metrics: the sum over targets of P R / (alpha P + (1 - alpha) R) on sets of words.

    alpha = 1/2 is F1, as in ROUGE-1; alpha = 0.9 weighs recall, as METEOR does.
    """
    said = set(words(reply))
    return sum(len(said & target) / (alpha * len(target) + (1 - alpha) * len(said)) for target in targets)


def commonplace(train: Sequence[Exchange], n: int, seed: int, least_distinct: float) -> list[Turn]:
    """n therapist turns of train that share most word pairs with other therapist turns, whoever they answer: the best that
    can be said without listening by someone who may not repeat himself.

    Half of train (shuffled; at most SAMPLE turns) is scored against the other half, by the mean F1 of sets of word pairs,
    as ROUGE-2 is one of counts. The fewest of the best are taken, in turn, whose n replies have a Distinct-2 of at least
    `least_distinct`; all of them where none have. Same train, n and seed, same answers. Raises DataError where no two
    turns of train have word pairs.
    """
    chance = random.Random(seed)
    turns = [x.therapist for x in _some(train) if len(words(x.therapist.text)) > 1]
    chance.shuffle(turns)
    half = min(len(turns) // 2, SAMPLE)
    if not half:
        raise DataError("fewer than two therapist turns of train have two words")
    options: Any = {"analyzer": lambda text: pairwise(words(text)), "binary": True, "dtype": np.float32}
    pairs: Any = CountVectorizer(**options).fit_transform(turn.text for turn in turns[: 2 * half])
    sizes = np.asarray(pairs.sum(1))[:, 0]
    shared = (pairs[:half] @ pairs[half:].T).toarray()
    fit = (2 * shared / (sizes[:half, None] + sizes[half:])).mean(1)
    best = list({turns[i].text.lower(): turns[i] for i in np.argsort(-fit, kind="stable")}.values())

    def answers(size: int) -> list[Turn]:
        return [best[i % size] for i in range(n)]

    few, enough = 1, min(n, len(best))  # Distinct-2 grows with the number, or nearly so: halving finds the fewest
    while few < enough:
        middle = (few + enough) // 2
        varied = distinct([turn.text for turn in answers(middle)], 2) >= least_distinct
        few, enough = (few, middle) if varied else (middle + 1, enough)
    found = answers(few)
    chance.shuffle(found)
    return found


def majority_emotion(train: Sequence[Exchange]) -> str | None:
    """The commonest emotion of train's therapist turns (the earliest of equals); None where none is labelled."""
    counts = Counter(x.therapist.emotion for x in _some(train) if x.therapist.emotion)
    return counts.most_common(1)[0][0] if counts else None


def retrieval(train: Sequence[Exchange], queries: Sequence[Exchange]) -> list[Turn]:
    """The therapist turn of the train exchange whose client turn is nearest to the query's: cosine of TF-IDF vectors.

    Words and word pairs, 1 + log(count), as scikit-learn's TfidfVectorizer weighs them. The earlier of equals; a query
    that shares no word with train gets train's first exchange. Raises DataError where train's clients say no word.
    """
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        known = tfidf.fit_transform([x.client.text for x in _some(train)])
    except DataError:
        raise
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise DataError("no client turn of train has any word, so none can be the nearest") from error
    nearest: list[int] = []
    for start in range(0, len(queries), 256):  # in blocks: memory stays at 256 x train
        block = tfidf.transform([x.client.text for x in queries[start : start + 256]])
        nearest += (block @ known.T).toarray().argmax(axis=1).tolist()
    return [train[i].therapist for i in nearest]


def random_reply(train: Sequence[Exchange], n: int, seed: int) -> list[Turn]:
    """n therapist turns of train, drawn with replacement; the same for the same train, n and seed."""
    return [x.therapist for x in random.Random(seed).choices(_some(train), k=n)]


def echo(exchanges: Sequence[Exchange]) -> list[Turn]:
    """The client's own words and emotion, said back by the therapist."""
    return [replace(x.client, speaker=x.therapist.speaker, strategy=None) for x in exchanges]


def _some(exchanges: Sequence[Exchange]) -> Sequence[Exchange]:
    if not exchanges:
        raise DataError("no exchange to choose from: the train split is empty; check data.path and data.splits")
    return exchanges
