"""Conversations in one sequence: every token's loss is what it is in a sequence of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from therapy_jax import batching, dialogue, gpt2, packing, prompts, sft
from therapy_jax.config import PromptConfig
from therapy_jax.prompts import Example

SAMPLE = dialogue.read_dialogues(None, "jsonl", None, True, "error", 0, dialogue.Report())["train"][:6]
ROW = 1000  # the longest conversations do not fit in one tree
TOKENIZER = prompts.train_tokenizer([prompts.plain_text(d.turns) for d in SAMPLE], 1500)
prompts.add_special_tokens(TOKENIZER)
CONFIG = gpt2.GPT2Config(vocab_size=len(TOKENIZER), n_positions=ROW, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
MODEL = gpt2.GPT2(CONFIG)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3.0 * x, gpt2.init(CONFIG, jax.random.key(0)))  # opinions, not uniform guesses


def encode(form: PromptConfig) -> list[list[Example]]:
    return [[prompts.encode(TOKENIZER, e, form, ROW) for e in dialogue.exchanges(d)] for d in SAMPLE]


def losses(params, batch):
    """The log-prob of each supervised token, in the order in which the batch holds them."""
    _, logprobs, counted = jax.jit(lambda p, b: sft.sft_logprobs(p, b, None, model=MODEL))(params, batch)
    return np.asarray(logprobs)[np.asarray(counted)]


@pytest.mark.parametrize(
    ("form", "emotion"),
    [("utterance", "given"), ("context", "given"), ("context_emotion", "given"), ("context_emotion", "inferred")],
)
@pytest.mark.parametrize("max_tokens", [60, 900])  # 60: the oldest turns are cut off, 900: all are kept
def test_every_token_has_the_loss_that_it_has_alone(form, emotion, max_tokens, params):
    conversations = encode(PromptConfig(form, emotion, max_tokens))
    trees = [tree for c in conversations for tree in packing.trees(c, ROW)]
    rows = packing.pack(trees, ROW, seed=1)
    batch = packing.packed(rows, len(rows) + 1, ROW)  # and an empty row
    assert batch.attention_mask.sum() == sum(tree.size() for tree in trees)
    packed = losses(params, batch)

    examples = [e for row in rows for tree in row for e in tree.branches]  # in the order of the rows
    assert sorted(e.prompt + e.reply for e in examples) == sorted(e.prompt + e.reply for c in conversations for e in c)
    longest = max(len(e.prompt) + len(e.reply) for e in examples)
    alone = losses(params, batching.supervised(examples, len(examples), longest))
    assert len(packed) == len(alone) == sum(len(e.reply) for e in examples)
    np.testing.assert_allclose(packed, alone, atol=2e-4)  # log-probs of some -10 nats, from sums in another order
    if max_tokens == 900 and "context" in form:
        assert sum(t.size() for t in trees) < 0.75 * sum(len(e.prompt) + len(e.reply) for e in examples)


def test_gradients_of_a_step_are_those_of_single_exchanges(params):
    conversations = encode(PromptConfig("context_emotion", "given", 900))
    rows = packing.pack([t for c in conversations for t in packing.trees(c, ROW)], ROW, seed=1)
    examples = [e for c in conversations for e in c]
    alone = batching.supervised(examples, len(examples), ROW)
    grads = [
        jax.jit(jax.grad(lambda p, b=b: sft.sft_loss(p, b, None, model=MODEL)[0]))(params)
        for b in (packing.packed(rows, len(rows), ROW), alone)
    ]
    for a, b in zip(*(jax.tree.leaves(g) for g in grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1.0))


def test_nothing_is_seen_across_conversations_and_branches(params):
    """Another conversation, another branch, a later turn of the trunk: changed, and the first branch's losses stay, bit for
    bit. A turn of its own context: changed, and they do not."""
    tree = next(
        t for c in encode(PromptConfig("context", "given", 900)) for t in packing.trees(c, ROW) if len(t.branches) > 3
    )
    batch = packing.packed([[tree, tree]], 1, 2 * tree.size())
    layout = batch.layout
    assert layout is not None
    branch = 2  # the trunk is stretch 0, branches follow
    watched = batch.loss_mask & (layout.stretch == branch)
    starts = layout.start[layout.stretch == branch][0]
    seen = (layout.stretch == branch) | ((layout.stretch == 0) & (layout.position < starts))
    assert starts > 0

    def of_branch(tokens):
        out = sft.sft_logprobs(params, batch._replace(tokens=jnp.asarray(tokens)), None, model=MODEL)
        return np.asarray(out[1])[np.roll(watched, -1, axis=1)]

    before = of_branch(batch.tokens)
    np.testing.assert_array_equal(of_branch(np.where(seen, batch.tokens, 7)), before)
    first = (layout.stretch == 0) & (layout.position == 1)
    assert np.abs(of_branch(np.where(first, 7, batch.tokens)) - before).max() > 1e-3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 99))
def test_packing_loses_nothing_and_never_overfills(sizes, seed):
    trees = [packing.Tree([], [Example([i], [0] * (n - 1), 0)]) for i, n in enumerate(sizes)]
    rows = packing.pack(trees, 40, seed)
    assert sorted(t.branches[0].prompt[0] for row in rows for t in row) == list(range(len(sizes)))
    assert all(0 < sum(t.size() for t in row) <= 40 for row in rows)
    assert len(rows) == 1 or sum(sizes) > 20 * (len(rows) - 1)  # first fit: at most one row is less than half full
    assert rows == packing.pack(trees, 40, seed)


def test_an_exchange_longer_than_a_row_is_named():
    with pytest.raises(dialogue.DataError, match=r"12 tokens, more than sft.row_tokens \(11\)"):
        packing.trees([Example([1] * 10, [2, 0], 0, 4)], 11)


def test_examples_know_where_their_context_ends():
    for form in ("utterance", "context"):
        for conversation in encode(PromptConfig(form, "given", 900)):
            for e in conversation:
                at = e.prompt.index(TOKENIZER.convert_tokens_to_ids("<|utterance|>"))
                assert e.context_tokens == at
