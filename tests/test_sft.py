"""The supervised step against torch's AdamW, and its laws: what counts in the loss, what accumulation must keep."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import train_sft

from therapy_jax import batching, gpt2, sft, weights
from therapy_jax.config import Config, SFTConfig, TrainingConfig
from therapy_jax.prompts import Example

CONFIG = gpt2.GPT2Config(vocab_size=130, n_positions=24, n_embd=16, n_layer=2, n_head=2)
MODEL = gpt2.GPT2(CONFIG)
SGD = optax.sgd(1.0)
LENGTHS = [(5, 3), (2, 14), (9, 1), (1, 7)]  # prompt and reply: uneven, so that a mean of means would show


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(gpt2.init, CONFIG), jax.random.key(0))
    tree = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    tree["wte"][130:] = 0
    return jax.tree.map(jnp.asarray, tree)


def batch(seed=0, length=20, rows=4):
    random = np.random.default_rng(seed)
    examples = [Example(*(random.integers(0, 130, n).tolist() for n in pair), dropped_turns=0) for pair in LENGTHS]
    return batching.supervised(examples, rows, length)


logits_of = jax.jit(MODEL.apply)
loss_and_grads = jax.jit(jax.value_and_grad(functools.partial(sft.sft_loss, key=None, model=MODEL), has_aux=True))


@functools.cache
def sgd_step(accumulate):
    """Plain SGD of rate 1, so that the step shows the gradient itself: Adam's first steps show little but its sign."""
    return jax.jit(
        functools.partial(sft.sft_step, model=MODEL, tx=SGD, cfg=TrainingConfig(batch_size=4, accumulate=accumulate))
    )


def close(a, b, tolerance):
    """Trees agree to a share of the global norm."""
    assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) <= tolerance * optax.tree.norm(b)


def test_loss_counts_reply_tokens_only(params):
    b = batch()
    (loss, tokens), _ = loss_and_grads(params, b)
    logits = np.asarray(logits_of({"params": params}, b.tokens, b.attention_mask), np.float64)
    expected = 0.0
    for row, (p, r) in enumerate(LENGTHS):
        for t in range(p, p + r):
            z = logits[row, t - 1]
            expected -= z[b.tokens[row, t]] - np.log(np.exp(z).sum())
    assert tokens == sum(r for _, r in LENGTHS) and loss.dtype == tokens.dtype == jnp.float32
    assert loss == pytest.approx(expected, rel=1e-5)

    first, prompt = b.loss_mask.copy(), b.loss_mask.copy()
    first[:, 0] = True  # nothing comes before a first token, so it is no target, whatever the mask says
    prompt[1, 1] = True
    (same, count), _ = loss_and_grads(params, b._replace(loss_mask=first))
    assert (same, count) == (loss, tokens)
    (more, count), _ = loss_and_grads(params, b._replace(loss_mask=prompt))
    assert count == tokens + 1 and more > loss + 0.1


def test_what_padding_holds_changes_nothing(params):
    b = batch()
    garbage = np.where(b.attention_mask, b.tokens, np.random.default_rng(5).integers(0, 130, b.tokens.shape)).astype(
        np.int32
    )
    assert (garbage != b.tokens).any()
    (loss, tokens), grads = loss_and_grads(params, b)
    (other, _), other_grads = loss_and_grads(params, b._replace(tokens=garbage))
    assert loss == other
    close(other_grads, grads, 1e-6)
    (other, count), other_grads = loss_and_grads(
        params, batch(length=24, rows=6)
    )  # empty rows: the last batch of an epoch
    assert count == tokens and other == pytest.approx(float(loss), rel=1e-6)
    close(other_grads, grads, 1e-6)


def test_a_batch_padded_on_the_right_needs_no_mask(params):
    """Its loss and gradients are those of the mask; a batch padded elsewhere keeps its mask, and would be another one without."""
    b = batch()
    bare = batching.without_mask(b)
    assert bare.attention_mask is None and b.attention_mask is not None
    ((loss, tokens), grads), ((with_mask, count), oracle) = loss_and_grads(params, bare), loss_and_grads(params, b)
    assert float(loss) == pytest.approx(float(with_mask), rel=1e-5) and tokens == count
    close(grads, oracle, 1e-5)

    turned = jax.tree.map(lambda x: x[:, ::-1], b)
    assert batching.without_mask(turned) is turned
    (wrong, _), _ = loss_and_grads(params, turned._replace(attention_mask=None))
    (right, _), _ = loss_and_grads(params, turned)
    assert abs(float(wrong) / float(right) - 1) > 1e-3


def test_unsupervised_batch(params):
    blocks = np.random.default_rng(0).integers(0, 130, (4, 20)).astype(np.int32)
    b = batching.unsupervised(blocks)
    (loss, tokens), _ = loss_and_grads(params, b)
    logprobs = jax.nn.log_softmax(logits_of({"params": params}, blocks, np.ones((4, 20), bool)))
    expected = -np.take_along_axis(np.asarray(logprobs)[:, :-1], blocks[:, 1:, None], -1).sum()
    assert tokens == 4 * 19 and loss == pytest.approx(expected, rel=1e-5)


def test_accumulation_is_the_whole_batch(params):
    results = {parts: sgd_step(parts)(sft.init_state(params, SGD), batch(), jax.random.key(0)) for parts in (1, 2, 4)}
    (whole, metrics), (_, grads) = results[1], loss_and_grads(params, batch())
    assert whole.step == 1 and metrics["tokens"] == 25
    close(jax.tree.map(jnp.subtract, params, whole.params), jax.tree.map(lambda g: g / 25, grads), 1e-5)
    for parts in (2, 4):
        state, other = results[parts]
        close(jax.tree.map(jnp.subtract, params, state.params), jax.tree.map(jnp.subtract, params, whole.params), 1e-5)
        for name in ("loss", "tokens", "grad_norm"):
            assert other[name] == pytest.approx(float(metrics[name]), rel=1e-5), name


def test_a_batch_without_targets_moves_nothing(params):
    empty = batch()._replace(loss_mask=np.zeros((4, 20), bool))
    state, metrics = sgd_step(1)(sft.init_state(params, SGD), empty, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert metrics["loss"] == metrics["grad_norm"] == 0


def test_schedule():
    ours = sft.schedule(0.5, 4, 14, 0.1)
    by_hand = [0.0, 0.125, 0.25, 0.375, 0.5, 0.455, 0.41, 0.365, 0.32, 0.275, 0.23, 0.185, 0.14, 0.095, 0.05, 0.05]
    np.testing.assert_allclose(np.asarray([ours(i) for i in range(16)], float), by_hand, rtol=1e-5)
    assert sft.schedule(0.5, 20, 1, 0.1)(0) == 0.5  # a single step that stood still would be no training
    assert sft.schedule(0.5, 20, 6, 0.1)(3) == 0.5  # a warm-up longer than half the run is cut to half of it


def test_decay_spares_biases_and_layer_norms(params):
    """Only matrices and embeddings decay: told by Hugging Face's own names and ranks, layer by layer."""
    marked = jax.tree_util.tree_leaves_with_path(sft.decayed(params))
    yes = {"/".join(k.key for k in path) for path, decays in marked if decays}
    assert yes == {"wte", "wpe", *(f"blocks/{name}/kernel" for name in ("c_attn", "attn_proj", "c_fc", "mlp_proj"))}
    assert len(marked) == 16
    tx = sft.optimizer(TrainingConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), steps=2)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (_, update), (_, decays), leaf in zip(
        jax.tree_util.tree_leaves_with_path(updates), marked, jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(update, -0.1 * 0.5 * leaf if decays else 0 * leaf, rtol=1e-5, atol=1e-9)


def test_ten_steps_are_torchs(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits, for minutes where cores are busy
    torch.manual_seed(0)
    sizes = {"vocab_size": 130, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(0.1 * torch.randn_like(p))
    oracle.save_pretrained(tmp_path / "start")
    config, start = weights.load_pretrained(tmp_path / "start")
    start = jax.tree.map(jnp.asarray, start)

    cfg = TrainingConfig(
        learning_rate=0.03,
        warmup_steps=3,
        final_learning_rate=0.2,
        weight_decay=0.3,
        max_grad_norm=1.2,
        batch_size=4,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-6,
    )
    peak, warmup, last, steps = cfg.learning_rate, 3, 0.2, 10
    tx = sft.optimizer(cfg, steps)
    step = jax.jit(functools.partial(sft.sft_step, model=gpt2.GPT2(config), tx=tx, cfg=cfg))
    state = sft.init_state(start, tx)

    groups = [
        {"params": [p for p in oracle.parameters() if (p.ndim == 2) is two], "weight_decay": 0.3 * two}
        for two in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=peak, betas=(0.8, 0.95), eps=1e-6)
    factor = lambda i: i / warmup if i < warmup else 1 - (1 - last) * (i - warmup) / (steps - warmup)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, factor)
    norms = []
    for i in range(steps):
        b = batch(seed=i % 3)
        state, metrics = step(state, b, jax.random.key(0))
        mask = torch.tensor(b.attention_mask).long()
        labels = torch.tensor(np.where(b.loss_mask, b.tokens, -100)).long()
        adamw.zero_grad()
        loss = oracle(torch.tensor(b.tokens).long(), attention_mask=mask, labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(oracle.parameters(), cfg.max_grad_norm).item())
        adamw.step()
        scheduler.step()
        # Rounding grows from step to step through Adam's division; a wrong epsilon or decay is past 1e-3 by step 10.
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-3), f"step {i}"
        assert metrics["grad_norm"] == pytest.approx(norms[-1], rel=1e-2), f"step {i}"
    assert min(norms) < cfg.max_grad_norm < max(norms)  # clipping acted in some steps, not in all
    assert state.step == steps

    oracle.save_pretrained(tmp_path / "end")
    _, end = weights.load_pretrained(tmp_path / "end")
    # A key bias has gradient 0 but for rounding, and Adam makes a full step of that. It changes no output: left out.
    ours, theirs, before = (
        {
            **t,
            "blocks": {
                **t["blocks"],
                "c_attn": {**t["blocks"]["c_attn"], "bias": t["blocks"]["c_attn"]["bias"][:, [0, 2]]},
            },
        }
        for t in (state.params, end, start)
    )
    moved = jax.tree.map(jnp.subtract, theirs, before)
    for a, b, way in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), jax.tree.leaves(moved), strict=True):
        assert jnp.linalg.norm(a - b) < 1e-2 * jnp.linalg.norm(way)


@pytest.mark.parametrize("row_tokens", [None, 40])
def test_an_epoch_of_the_script_holds_each_exchange_once_in_another_order(row_tokens):
    rng = np.random.default_rng(0)
    talks = [
        [Example(list(range(1, 4 + k)), [100 + 10 * c + k, 0], 0, k) for k in range(rng.integers(1, 6))]
        for c in range(23)
    ]
    examples = [e for talk in talks for e in talk]
    config = Config(seed=3, sft=SFTConfig(batch_size=4, row_tokens=row_tokens))
    if row_tokens is None:
        batch_of, per_epoch = train_sft.one_exchange_a_row(config, examples)
    else:
        batch_of, per_epoch = train_sft.whole_conversations(config, row_tokens, talks)

    def walk(epoch, *parts):  # replies' first tokens of each step; `parts`: the rows that each process supplies
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        made = [[batch_of(step, np.asarray(mine)) for mine in parts] for step in steps]
        return [[t for b in step for t in b.tokens[b.loss_mask].tolist() if t] for step in made]

    epochs = [walk(k, range(4)) for k in range(3)]
    for epoch in epochs:
        assert sorted(t for step in epoch for t in step) == sorted(e.reply[0] for e in examples)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] == walk(0, range(4))
    assert [sorted(s) for s in walk(0, range(2), range(2, 4))] == [sorted(s) for s in epochs[0]]  # two processes
