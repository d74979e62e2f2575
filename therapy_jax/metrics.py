"""Text metrics for replies: BLEU, ROUGE, METEOR, Distinct and emotion scores, as nltk and rouge-score compute them.

BLEU and METEOR change by a third to a half with the tokeniser alone, so there is one tokeniser here, `words`, and
`signature()` states everything that a reader needs to compare two numbers. Overlap cannot rank systems on its own, for
a constant reply beats retrieval on ROUGE: report it beside `distinct`, `commonest_share` and the trivial baselines.

An empty reply scores 0 and never raises; an empty list of replies raises ValueError. Nothing here touches the network.

>>> {name: round(score, 3) for name, score in rouge(["I hear you."], ["I hear how sad you are."]).items()}
{'rouge1': 0.667, 'rouge2': 0.286, 'rougeL': 0.667}
>>> distinct(["go on", "go on"], 2)
0.5
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate import bleu_score
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as rouge_tokenize

from therapy_jax import wordnet

ROUGE = ("rouge1", "rouge2", "rougeL")

_treebank = NLTKWordTokenizer()
_porter = PorterStemmer()
_method1 = bleu_score.SmoothingFunction().method1
_stem = lru_cache(maxsize=1 << 16)(_porter.stem)


@lru_cache(maxsize=1 << 16)
def words(text: str) -> tuple[str, ...]:
    """Lower-cased tokens of nltk's NLTKWordTokenizer (Treebank rules, no sentence splitting, no download)."""
    return tuple(_treebank.tokenize(text.lower()))


@lru_cache(maxsize=1 << 16)
def _rouge_words(text: str) -> tuple[str, ...]:
    return tuple(rouge_tokenize(text, SimpleNamespace(stem=_stem)))


_rouge_scorer = RougeScorer(ROUGE, tokenizer=SimpleNamespace(tokenize=_rouge_words))


@lru_cache(maxsize=1 << 16)
def _synsets(reader: WordNetCorpusReader | None, word: str) -> list[Any]:
    """A word's synsets as one that has each name once: nltk asks for names alone, and so for a fifth as many."""
    synsets: list[Any] = [] if reader is None else reader.synsets(word)
    lemmas = list({lemma.name(): lemma for synset in synsets for lemma in synset.lemmas()}.values())
    return [SimpleNamespace(lemmas=lambda: lemmas)]


def meteor_name() -> str:
    """ "meteor", or "meteor_exact_stem" where WordNet is absent: without synonyms it is a lesser, other metric."""
    return "meteor_exact_stem" if wordnet.reader() is None else "meteor"


# ---------------------------------------------------------------------------------------------- one reply, then many


def _bleu(reply: str, reference: str) -> float:
    return float(bleu_score.sentence_bleu([words(reference)], words(reply), smoothing_function=_method1))  # type: ignore


def _rouge(reply: str, reference: str) -> dict[str, float]:
    return {name: float(score.fmeasure) for name, score in _rouge_scorer.score(reference, reply).items()}


def _meteor(reply: str, reference: str) -> float:
    stemmer: Any = SimpleNamespace(stem=_stem)
    lexicon: Any = SimpleNamespace(synsets=partial(_synsets, wordnet.reader()))
    return float(single_meteor_score(words(reference), words(reply), stemmer=stemmer, wordnet=lexicon))


def item_scores(reply: str, reference: str) -> dict[str, float]:
    """bleu, rouge1, rouge2, rougeL and `meteor_name()` of one reply, each in [0, 1]: what a paired bootstrap needs."""
    return {"bleu": _bleu(reply, reference), **_rouge(reply, reference), meteor_name(): _meteor(reply, reference)}


def mean_scores(items: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every key over the items."""
    _some(items)
    return {key: sum(item[key] for item in items) / len(items) for key in items[0]}


def paired_bootstrap(
    a: Sequence[dict[str, float]], b: Sequence[dict[str, float]], resamples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """{key: (mean of a - b, its 2.5 and its 97.5 percentile)} over resampled exchanges (Koehn 2004).

    a[i] and b[i] are the item scores of two systems on the same exchange: N exchanges are drawn from the N with
    replacement, the same for both systems and for all keys, `resamples` times. An interval without 0 is a difference that
    other exchanges of the same kind would show too; what another seed of the training would change it does not know.
    Raises ValueError where the lists are empty or of unequal length.
    """
    _some(a)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} items of one system but {len(b)} of the other")
    differences = np.array([[x[key] - y[key] for key in a[0]] for x, y in zip(a, b, strict=True)])
    # How often each exchange is drawn says as much as which ones were drawn, and makes a mean a matrix product.
    drawn = np.random.default_rng(seed).multinomial(len(a), np.full(len(a), 1 / len(a)), size=resamples)
    low, high = np.percentile(drawn @ differences / len(a), [2.5, 97.5], axis=0)
    return dict(zip(a[0], zip(differences.mean(0).tolist(), low.tolist(), high.tolist(), strict=True), strict=True))


def _some(replies: Sequence[Any]) -> None:
    if not replies:
        raise ValueError("nothing to score: the list is empty")


def _pairs(replies: Sequence[str], references: Sequence[str]) -> Iterable[tuple[str, str]]:
    _some(replies)
    if len(replies) != len(references):
        raise ValueError(f"{len(replies)} replies but {len(references)} references")
    return zip(replies, references, strict=True)


def bleu(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{"bleu"}: mean sentence BLEU-4 on `words`, in [0, 1] (Papineni et al. 2002; nltk, smoothing method 1).

    Method 1 (Chen and Cherry 2014) puts 0.1 for a count of 0, so a reply under four words stays below 1 even where it
    equals the reference.
    """
    return mean_scores([{"bleu": _bleu(*pair)} for pair in _pairs(replies, references)])


def corpus_bleu(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{"corpus_bleu"}: BLEU-4 of the whole list, without smoothing, on `words`, in [0, 1] (Papineni et al. 2002)."""
    pairs = list(_pairs(replies, references))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns where an order of n-grams has no match: the score is then 0
        score = bleu_score.corpus_bleu([[words(b)] for _, b in pairs], [words(a) for a, _ in pairs])
    return {"corpus_bleu": float(score)}  # type: ignore[arg-type]


def rouge(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: mean F1 in [0, 1] (Lin 2004), by rouge-score with its own tokens and stemming."""
    return mean_scores([_rouge(*pair) for pair in _pairs(replies, references)])


def meteor(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{`meteor_name()`}: mean METEOR on `words`, in [0, 1) (Lavie and Agarwal 2007; nltk: alpha .9, beta 3, gamma .5).

    Words match exactly, then by Porter stem, then by WordNet synonym; "meteor_exact_stem" lacks the last step. nltk
    hands the last step stems, not words, so "big" meets "large" (stem "larg") in no synset: kept, for comparability.
    """
    name = meteor_name()
    return mean_scores([{name: _meteor(*pair)} for pair in _pairs(replies, references)])


# ------------------------------------------------------------------------------------------------- the replies alone


def distinct(replies: Sequence[str], n: int) -> float:
    """Corpus-level distinct-n in [0, 1]: different n-grams over all n-grams of the whole list, on `words`.

    (Li et al. 2016.) It falls as the list grows and as replies lengthen: compare lists of like size only. 0 where no
    reply has n words. N-grams never run from one reply into the next.
    """
    _some(replies)
    ngrams = [tokens[i : i + n] for tokens in map(words, replies) for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def commonest(replies: Sequence[str]) -> tuple[str, float]:
    """The commonest reply (lower-cased, white space folded) and its share in (0, 1]; the earliest of equals."""
    _some(replies)
    reply, count = Counter(" ".join(reply.lower().split()) for reply in replies).most_common(1)[0]
    return reply, count / len(replies)


def commonest_share(replies: Sequence[str]) -> float:
    """The share of the commonest reply, in (0, 1]: near 1 for a system that always says the same."""
    return commonest(replies)[1]


def reply_words(replies: Sequence[str]) -> float:
    """Mean number of `words` in a reply (punctuation marks count)."""
    _some(replies)
    return sum(map(len, map(words, replies))) / len(replies)


def text_metrics(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Every text metric of this file: overlap with the references, and how varied and how long the replies are."""
    overlap = mean_scores([item_scores(*pair) for pair in _pairs(replies, references)])
    return overlap | {
        "distinct1": distinct(replies, 1),
        "distinct2": distinct(replies, 2),
        "commonest_share": commonest_share(replies),
        "reply_words": reply_words(replies),
    }


# ---------------------------------------------------------------------------------------------------------- emotions


def _labels(labels: Iterable[str | None]) -> list[str]:
    return [(label or "").strip().lower() for label in labels]


def emotion_scores(predicted: Sequence[str | None], gold: Sequence[str | None], prefix: str) -> dict[str, float]:
    """{prefix}_accuracy and {prefix}_macro_f1, in [0, 1]; letter case and outer blanks of a label do not count.

    Items without a gold label are left out; a missing prediction is a wrong one. Macro-F1 is the plain mean of F1 over
    the classes that occur in gold (scikit-learn's `labels=sorted(set(gold))`). Raises ValueError where no gold label is
    left. Where one class rules, accuracy says nothing: put it beside `majority_accuracy`.
    """
    if len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} predictions but {len(gold)} gold labels")
    pairs = [(p, g) for p, g in zip(_labels(predicted), _labels(gold), strict=True) if g]
    if not pairs:
        raise ValueError("nothing to score: no gold label")
    right = Counter(g for p, g in pairs if p == g)
    said, true = Counter(p for p, _ in pairs), Counter(g for _, g in pairs)
    f1 = [2 * right[label] / (said[label] + true[label]) for label in true]
    return {f"{prefix}_accuracy": right.total() / len(pairs), f"{prefix}_macro_f1": sum(f1) / len(f1)}


def majority_accuracy(gold: Sequence[str | None]) -> float:
    """The accuracy, in (0, 1], of always answering the commonest label of `gold`; unlabelled items are left out."""
    return commonest_share([label for label in _labels(gold) if label])


def signature() -> str:
    """One line to print under every table: tokeniser, variants and versions. Equal lines mean comparable numbers."""
    reader = wordnet.reader()
    synonyms = "exact+stem" if reader is None else f"wordnet{reader.get_version()}"
    return (
        f"tok:NLTKWordTokenizer,lower|bleu:sentence,nltk,method1|rouge:rouge-score {version('rouge-score')},stem"
        f"|meteor:nltk,{synonyms}|v1"
    )
