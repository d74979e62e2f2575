"""Batches: nothing lost, nothing twice, and the order a pure function of (seed, epoch)."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from therapy_jax import batching
from therapy_jax.prompts import Example


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=150),
    st.integers(1, 9),
    st.sampled_from([1, 8, 32]),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_an_epoch_holds_each_index_once(lengths, batch_size, pad_to, seed, epoch):
    batches = batching.epoch_batches(lengths, batch_size, pad_to, seed, epoch)
    assert sorted(np.concatenate([indices for indices, _ in batches])) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sorted(len(indices) for indices, _ in batches)[1:] == [batch_size] * (len(batches) - 1)  # one may be smaller
    for indices, padded in batches:
        longest = max(lengths[i] for i in indices)
        assert longest <= padded < longest + pad_to and padded % pad_to == 0
    again = batching.epoch_batches(lengths, batch_size, pad_to, seed, epoch)
    assert [(i.tolist(), n) for i, n in again] == [(i.tolist(), n) for i, n in batches]


def test_order_depends_on_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    first = {
        tuple(np.concatenate([i for i, _ in batching.epoch_batches(lengths, 8, 8, *place)]))
        for place in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(first) == 4


def test_like_lengths_lie_together():
    """What the windows are for: far less padding than batches drawn at random, and still no batch order by length."""
    lengths = np.random.default_rng(0).integers(1, 200, 640)
    batches = batching.epoch_batches(lengths.tolist(), 16, 8, 0, 0)
    assert sum(len(i) * n for i, n in batches) < 1.15 * lengths.sum()
    at_random = sum(16 * batching.round_up(int(lengths[k : k + 16].max()), 8) for k in range(0, 640, 16))
    assert at_random > 1.6 * lengths.sum()
    padded = [n for _, n in batches]
    assert padded != sorted(padded)


def test_rollouts_cover_every_prompt_once_a_pass():
    n, size = 10, 4
    walk = np.concatenate([batching.rollout_indices(n, size, seed=3, step=k) for k in range(15)])
    passes = walk.reshape(6, n)
    assert all(sorted(p) == list(range(n)) for p in passes)
    assert len({tuple(p) for p in passes}) == 6  # another order each time
    # Resumable: step k alone is the k-th of the walk; the place is a function of (seed, step).
    np.testing.assert_array_equal(batching.rollout_indices(n, size, 3, 7), walk[28:32])
    assert (batching.rollout_indices(n, 10, 4, 0) != batching.rollout_indices(n, 10, 3, 0)).any()
    more = batching.rollout_indices(3, 7, 0, 1)  # a batch larger than the data runs through several passes
    assert more.shape == (7,) and np.bincount(more, minlength=3).min() >= 2


def test_text_blocks():
    blocks = batching.text_blocks([[5, 6], [], [7, 8, 9], [1]], eos=0, length=3)
    assert (
        blocks.tolist() == [[5, 6, 0], [0, 7, 8], [9, 0, 1]] and blocks.dtype == np.int32
    )  # the last EOS fills no block
    assert batching.text_blocks([[1]], 0, 3).shape == (0, 3)


def test_supervised_and_unsupervised():
    """Masks come from lengths: token 0, which also fills the padding, is a token like any other where it is real."""
    batch = batching.supervised([Example([0, 5], [6, 0], 0), Example([7, 8, 9], [1], 0)], batch_size=3, length=6)
    assert batch.tokens.tolist() == [[0, 5, 6, 0, 0, 0], [7, 8, 9, 1, 0, 0], [0] * 6]
    assert batch.attention_mask.sum(1).tolist() == [4, 4, 0]
    assert np.argwhere(batch.loss_mask).tolist() == [[0, 2], [0, 3], [1, 3]]
    assert batch.tokens.dtype == np.int32 and batch.attention_mask.dtype == batch.loss_mask.dtype == bool
    with pytest.raises(ValueError, match="row 0 has 4 tokens, more than the length 3"):
        batching.supervised([Example([0, 5], [6, 0], 0)], 1, 3)

    plain = batching.unsupervised(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert plain.attention_mask.all() and plain.loss_mask.tolist() == [[False, True, True]] * 2


def test_prompts_are_padded_on_the_left():
    prompt = batching.prompts([[1, 2, 3], [4]], 4)
    assert prompt.tokens.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert prompt.mask.tolist() == [[False, True, True, True], [False, False, False, True]]
    full, mask = batching.pad([[1, 2]], 2, "left")
    assert full.tolist() == [[1, 2]] and mask.all()
    assert [batching.round_up(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]
