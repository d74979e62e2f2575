"""The reply most like the others: against rouge-score in a loop over all pairs."""

import itertools

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from therapy_jax import consensus, dialogue
from therapy_jax.config import ConfigError, EvaluateConfig

SCORER = RougeScorer(["rouge1", "rouge2"])


def utility(reply, other):
    found = SCORER.score(other, reply)
    return found["rouge1"].fmeasure + 2 * found["rouge2"].fmeasure


def by_hand(replies):
    """Mean utility of each reply with the others, pair by pair."""
    total = np.zeros(len(replies))
    for i, j in itertools.permutations(range(len(replies)), 2):
        total[i] += utility(replies[i], replies[j])
    return total / (len(replies) - 1)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_choice_is_the_best_by_rouge_score_pair_by_pair(n):
    """Real sentences, an empty reply, one of a single word, and repeated ones among them."""
    texts = [turn.text for d in dialogue.read(None, "jsonl")["train"] for turn in (d.client, d.therapist)][: 12 * n]
    texts[1], texts[n], texts[2 * n] = "", "Yes.", texts[2 * n + 1]
    candidates = [texts[k : k + n] for k in range(0, len(texts), n)]
    for replies, i in zip(candidates, consensus.choose(candidates), strict=True):
        scores = by_hand(replies)
        assert scores[i] == pytest.approx(scores.max(), abs=1e-6)  # of equals any: float32 sums in another order
        assert consensus.most_agreed(replies) == i


def test_a_reply_that_two_give_wins_over_one_that_nobody_else_gives():
    assert consensus.choose([["Go on.", "What happened then?", "What happened then?"]])[0] in (1, 2)
    assert consensus.choose([["alone"]]) == [0]


@pytest.mark.parametrize(
    "values, said",
    [
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"candidates": 4}, "candidates 4 needs evaluate.temperature above 0"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"draws": 2}, "draws 2 needs evaluate.temperature above 0"),
    ],
)
def test_impossible_numbers_of_candidates_and_draws_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        EvaluateConfig(**values)
