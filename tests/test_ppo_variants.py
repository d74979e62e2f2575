"""What must hold of PPO whatever the estimator, the critic and the side that rewards are computed on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from therapy_jax import gpt2, ppo, run, sft, sharding
from therapy_jax.batching import Prompt
from therapy_jax.config import MeshConfig, PPOConfig, SamplingConfig
from therapy_jax.rewards.combine import combine, init_stats
from therapy_jax.sampling import generate

B, P, R, STEPS = 16, 5, 6, 3
CONFIG = gpt2.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
MODEL = gpt2.GPT2(CONFIG)
SAMPLING = SamplingConfig(max_new_tokens=R, temperature=0.8)
TERMS = {"table": 1.0, "label": 0.5, "trunk": 2.0}
CFG = PPOConfig(
    batch_size=B, iterations=4, epochs=2, minibatches=2, learning_rate=3e-3, warmup_steps=1, max_update_kl=None
)
VARIANTS = {
    "gae, shared": dataclasses.replace(CFG, weight_decay=0.1),
    "gae, separate": dataclasses.replace(CFG, value_head="separate", critic_warmup=2, weight_decay=0.1),
    "rloo": dataclasses.replace(CFG, estimator="rloo", replies_per_prompt=4),
    "mixed": dataclasses.replace(
        CFG, value_head="detached", replies_per_prompt=2, critic_learning_rate=1e-2, kl_target=1.0, kl_horizon=100.0,
        entropy_coef=0.01, max_update_kl=0.5, gamma=0.9, lam=0.8, whiten=False,
    ),
}  # fmt: skip
# Compiling takes the longest here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
GENERATE = jit(generate, static_argnames=("model", "cfg"))
JUDGE = jit(ppo.judge, static_argnames=("model", "cfg", "temperature"))


def make_state(cfg, config=CONFIG, tx=None, scale=3.0, names=TERMS):
    """A policy with confident opinions (scaled-up weights), so that nothing is trivially uniform."""
    params = jax.tree.map(lambda x: x * scale, gpt2.init(config, jax.random.key(0)))
    return ppo.init_state(params, config, tx or ppo.optimizer(cfg), cfg, init_stats(names))


def make_inputs(prompts):
    """-> prompt, references, fixed. The table holds eighths, so that sums are exact in whatever order."""
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= rng.integers(0, P, (prompts, 1))
    tokens = np.where(mask, rng.integers(1, 50, (prompts, P)), 0).astype(np.int32)
    table = (rng.integers(-8, 9, 50) / 8).astype(np.float32)
    references = {"label": (np.arange(prompts) % 2).astype(np.int32)}
    return jax.tree.map(jnp.asarray, (Prompt(tokens, mask), references, {"table": table}))


def score_fn(trunk, reply, references, fixed):
    """Terms that read all that a reward may read; the references themselves stand in for the RewardBatch."""
    return references, {
        "table": jnp.where(reply.mask, fixed["table"][reply.tokens], 0.0).sum(1),
        "label": (reply.tokens[:, 0] % 2 == references["label"]).astype(jnp.float32),
        "trunk": trunk["wte"][reply.tokens[:, 0], 0],
    }


def score_on_host(trunk, reply, references, fixed, times):
    """The same with numpy, reply by reply, from the references of the prompts."""
    rows = [tokens[mask] for tokens, mask in zip(np.asarray(reply.tokens), np.asarray(reply.mask), strict=True)]
    labels = [label for label in np.asarray(references["label"]) for _ in range(times)]
    terms = {
        "table": [sum(np.asarray(fixed["table"])[row]) for row in rows],
        "label": [float(row[0] % 2 == label) for row, label in zip(rows, labels, strict=True)],
        "trunk": [trunk["wte"][row[0], 0] for row in rows],
    }
    return {name: np.asarray(values, np.float32) for name, values in terms.items()}


def make_programs(cfg, standardise=False, model=MODEL, score=score_fn, sampling=SAMPLING):
    """-> (one program, the two that it splits into), compiled as train_ppo.py does."""

    def combine_fn(raw, stats):
        return combine(raw, TERMS, stats, standardise=standardise)

    roll = {"model": model, "score_fn": score, "sampling": sampling, "cfg": cfg}
    learn = {"model": model, "tx": ppo.optimizer(cfg), "combine_fn": combine_fn, "cfg": cfg}
    return (
        jit(functools.partial(ppo.ppo_iteration, **(roll | learn)), donate_argnums=0),
        jit(functools.partial(ppo.rollout, **roll)),
        jit(functools.partial(ppo.learn, **learn, temperature=sampling.temperature), donate_argnums=0),
    )


@functools.cache
def history(name):
    """STEPS iterations of a variant in one program, and in two with the rewards computed by numpy in between."""
    cfg, times = VARIANTS[name], VARIANTS[name].replies_per_prompt
    whole, roll, learn = make_programs(cfg, standardise=name == "mixed")
    prompt, references, fixed = make_inputs(B // times)
    key = jax.random.key(1)
    state, ones, compiled = make_state(cfg), [], []
    for _ in range(STEPS):
        with run.count_compilations() as count:
            state, metrics = whole(state, prompt, references, fixed, key)
        compiled.append(count())
        ones.append(jax.device_get((state, metrics)))
    state, twos, replies = make_state(cfg), [], []
    trunk = jax.device_get(state.ref_params)
    for _ in range(STEPS):
        reply, batch, raw = roll(state, prompt, references, fixed, key)
        host = score_on_host(trunk, reply, references, fixed, times)
        state, metrics = learn(state, prompt, reply, host, key)
        twos.append(jax.device_get((state, metrics)))
        replies.append(jax.device_get((reply, batch, raw, host)))
    return ones, twos, replies, compiled


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_one_program_equals_the_split_with_rewards_on_the_host(name):
    ones, twos, replies, _ = history(name)
    for _, _, raw, host in replies:
        assert raw.keys() == host.keys() == TERMS.keys()
        for term in TERMS:
            np.testing.assert_array_equal(host[term], raw[term], err_msg=term)
    for (one, metrics), (two, split_metrics) in zip(ones, twos, strict=True):
        # Rewards say which tokens were drawn: equal to the last bit, hence the same replies.
        for term in TERMS:
            np.testing.assert_allclose(metrics[f"reward/{term}"], split_metrics[f"reward/{term}"], rtol=1e-6)
        # Two programs round differently. Adam divides a gradient by its own size, so that where it all but vanishes rounding
        # decides up to a step's worth (3e-3); what is left of that after a few steps is the absolute part.
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=3e-4, err_msg=jax.tree_util.keystr(path))
        assert metrics.keys() == split_metrics.keys()
        for metric, value in metrics.items():
            np.testing.assert_allclose(value, split_metrics[metric], rtol=2e-3, atol=1e-4, err_msg=metric)
    assert [int(state.step) for state, _ in ones] == [1, 2, 3]


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_compiles_after_the_first_iteration(name):
    assert history(name)[3] == [1, 0, 0]


def test_nothing_compiles_after_the_first_iteration_on_a_mesh():
    """The state comes out of the program laid out as it went in."""
    whole, _, _ = make_programs(CFG)
    mesh, key = sharding.make_mesh(MeshConfig(data=8)), jax.random.key(1)
    prompt, references, fixed = make_inputs(B)
    state, fixed = sharding.replicate(mesh, make_state(CFG)), sharding.replicate(mesh, fixed)
    prompt, references = sharding.split_batch(mesh, (prompt, references))
    found = []
    for _ in range(STEPS):
        with run.count_compilations() as count:
            state, _ = whole(state, prompt, references, fixed, key)
        found.append(count())
    assert found == [1, 0, 0]


def test_the_counter_counts_a_program_that_meets_another_shape():
    _, roll, _ = make_programs(CFG)
    state, key = make_state(CFG), jax.random.key(1)
    few, more = make_inputs(2), make_inputs(4)
    found = []
    for inputs in (few, few, more, few, more):
        with run.count_compilations() as count:
            roll(state, *inputs, key)
        found.append(count())
    assert found == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("name", ["rloo", "mixed"])
def test_replies_to_a_prompt_stand_side_by_side_and_differ(name):
    cfg = VARIANTS[name]
    reply, batch, *_ = history(name)[2][0]
    labels = np.arange(B // cfg.replies_per_prompt) % 2
    np.testing.assert_array_equal(batch["label"], [label for label in labels for _ in range(cfg.replies_per_prompt)])
    groups = reply.tokens.reshape(-1, cfg.replies_per_prompt, R)
    assert sum(len(np.unique(group, axis=0)) for group in groups) > 0.75 * B  # keys differ within a group, too
    # The log-probs of the sampler and those of the update agree: both read the reply behind the same prompt.
    assert float(history(name)[1][0][1]["sampler_gap"]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_reward_statistics_are_those_of_all_replies_so_far(name):
    ones, _, replies, _ = history(name)
    for done, (state, _) in enumerate(ones, start=1):
        for term in TERMS:
            values = np.concatenate([raw[term] for _, _, raw, _ in replies[:done]]).astype(float)
            found = [part[term] for part in state.reward_stats]
            expected = [len(values), values.mean(), values.var() * len(values)]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=term)  # float32 sums of 48


def test_a_separate_critic_learns_alone_during_its_warm_up():
    """Not one bit of the policy moves, weight decay or not; then it does, and the reference never."""
    start = jax.device_get(make_state(VARIANTS["gae, separate"]))
    states = [state for state, _ in history("gae, separate")[0]]
    for before, after in zip([start, *states], states[:2], strict=False):
        assert equal(after.params["policy"], start.params["policy"])
        assert not equal(after.params["value"]["head"], before.params["value"]["head"])
    waiting = jax.tree.leaves(states[1].opt_state[1].inner_states["policy"])
    assert not any(np.any(x) for x in waiting)  # nor does Adam remember or count what it did not do
    counts = [x for x in jax.tree.leaves(states[2].opt_state[1].inner_states["policy"]) if x.dtype == np.int32]
    assert counts and {int(x) for x in counts} == {CFG.epochs * CFG.minibatches}
    assert not equal(states[1].params["value"]["trunk"], start.params["value"]["trunk"])
    assert not equal(states[2].params["policy"], start.params["policy"])
    assert equal(states[2].ref_params, start.ref_params)


def test_a_critic_learns_what_scores_depend_on_while_the_policy_waits():
    """Scores that depend on the prompt alone can be foreseen: explained variance goes from nothing towards 1. The head reads
    the policy's own hidden state, and still the policy stays as it is until the warm-up is over."""
    cfg = dataclasses.replace(
        CFG, iterations=31, critic_warmup=30, critic_learning_rate=1e-2, value_clip=100.0, weight_decay=0.1, kl_coef=0.0
    )

    def prompt_decides(_, reply, references, fixed):
        return references, {"label": references["label"].astype(jnp.float32)}

    whole, _, _ = make_programs(cfg, score=prompt_decides)
    _, references, fixed = make_inputs(B)
    tokens = jnp.where(references["label"][:, None] == 1, 3, 40) * jnp.ones((1, P), jnp.int32)
    prompt = Prompt(tokens, jnp.ones((B, P), bool))  # type: ignore[arg-type]
    state = make_state(cfg, names=["label"])
    start, explained = jax.device_get(state.params["policy"]), []
    for _ in range(cfg.critic_warmup):
        state, metrics = whole(state, prompt, references, fixed, jax.random.key(1))
        explained.append(float(metrics["explained_variance"]))
    assert equal(state.params["policy"], start)
    assert explained[0] <= 0.0  # values of 0 explain nothing
    assert np.mean(explained[-3:]) > 0.6
    state, _ = whole(state, prompt, references, fixed, jax.random.key(1))
    assert not equal(state.params["policy"], start)


@pytest.mark.parametrize(("head", "reaches"), [("shared", True), ("detached", False), ("separate", False)])
def test_where_the_value_loss_reaches(head, reaches):
    cfg = dataclasses.replace(CFG, value_head=head)
    state = make_state(cfg)
    kernel = jax.random.normal(jax.random.key(3), (CONFIG.n_embd, 1))
    value = {
        **state.params["value"],
        "head": {"value": {"kernel": kernel, "bias": jnp.ones(1)}},
    }  # at 0 none gets through
    prompt, _, _ = make_inputs(B)
    reply = GENERATE(state.params["policy"], prompt, jax.random.key(0), model=MODEL, cfg=SAMPLING)
    zeros = jnp.zeros((B, R))
    batch = ppo.Rollout(prompt, reply.tokens, reply.mask, zeros, zeros, zeros, jnp.cos(jnp.arange(B * R)).reshape(B, R))

    @jit
    def gradient(params):
        return jax.grad(lambda p: ppo.ppo_loss(p, batch, model=MODEL, cfg=cfg, temperature=0.8)[1]["value_loss"])(
            params
        )

    grads = gradient({**state.params, "value": value})
    assert (float(optax.tree.norm(grads["policy"])) > 1e-3) == reaches
    assert reaches or not any(np.any(x) for x in jax.tree.leaves(grads["policy"]))  # exactly 0
    assert float(optax.tree.norm(grads["value"]["head"])) > 1e-3
    assert ("trunk" in grads["value"]) == (head == "separate")
    assert head != "separate" or float(optax.tree.norm(grads["value"]["trunk"]["blocks"])) > 1e-3

    read = jit(functools.partial(ppo.read, model=MODEL, cfg=cfg))
    *policy_says, values = read(state.params, prompt, reply.tokens, reply.mask)
    *still_says, other_values = read({**state.params, "value": value}, prompt, reply.tokens, reply.mask)
    assert equal(policy_says, still_says)
    assert not np.any(values) and np.abs(other_values).max() > 0.1


def test_a_separate_critic_starts_as_the_policy_in_memory_of_its_own():
    state = make_state(VARIANTS["gae, separate"])
    assert equal(state.params["value"]["trunk"], state.params["policy"])
    assert equal(state.ref_params, state.params["policy"])
    addresses = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state.params, state.ref_params))]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("critic", [None, 3e-2, 3e-9, 0.0])
def test_the_critic_has_a_learning_rate_of_its_own(critic):
    """Adam's steps are proportional to the rate: against optax's own chain of clip and AdamW, the policy's are the same and
    the critic's are scaled by the ratio of the rates."""
    cfg = dataclasses.replace(
        CFG, value_head="separate", critic_learning_rate=critic, weight_decay=0.1, max_grad_norm=0.5
    )
    rate = sft.schedule(cfg.learning_rate, cfg.warmup_steps, cfg.iterations * cfg.epochs * cfg.minibatches, final=0.1)
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=0.1, mask=sft.decayed))
    params = make_state(cfg).params
    tx = ppo.optimizer(cfg)
    ours, theirs = tx.init(params), plain.init(params)
    ratio = 1.0 if critic is None else critic / cfg.learning_rate
    for i in range(3):  # the first has rate 0; all gradients are far above the clip
        grads = jax.tree.map(lambda x: jnp.sin(1e3 * x + i), params)  # noqa: B023
        updates, ours = tx.update(grads, ours, params)
        expected, theirs = plain.update(grads, theirs, params)
        expected = {**expected, "value": jax.tree.map(lambda x: x * ratio, expected["value"])}
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=0, err_msg=jax.tree_util.keystr(path))
        assert i == 0 or np.abs(updates["policy"]["wte"]).max() > 1e-4


def test_kl_is_summed_over_tokens_and_averaged_over_replies():
    """By hand, in float64, from the logits of the plain forward pass over prompt and reply."""
    state = make_state(CFG)
    state = state._replace(ref_params=jax.tree.map(lambda x: x + 0.03 * jnp.cos(1e3 * x), state.ref_params))
    prompt, _, _ = make_inputs(B)
    reply = GENERATE(state.params["policy"], prompt, jax.random.key(0), model=MODEL, cfg=SAMPLING)
    _, metrics = JUDGE(state, prompt, reply, jnp.zeros(B), model=MODEL, cfg=CFG, temperature=0.8)
    tokens, mask = np.asarray(reply.tokens), np.asarray(reply.mask)
    text, seen = jnp.concatenate([prompt.tokens, tokens], 1), jnp.concatenate([prompt.mask, mask], 1)
    forward, kl = jit(MODEL.apply), (np.zeros(B), np.zeros(B))
    for b in range(B):
        logprobs = []
        for params in (state.params["policy"], state.ref_params):
            logits = np.asarray(forward({"params": params}, text, seen)[b, P - 1 : P - 1 + mask[b].sum()], float) / 0.8
            chosen = logits[np.arange(len(logits)), tokens[b, : len(logits)]]
            logprobs.append(chosen - np.log(np.exp(logits).sum(-1)))
        k1 = logprobs[0] - logprobs[1]
        kl[0][b], kl[1][b] = k1.sum(), (np.exp(-k1) - 1 + k1).sum()
    assert len(set(mask.sum(1))) > 1 and abs(kl[0].mean()) > 0.05
    np.testing.assert_allclose(metrics["kl"], kl[0].mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["kl_k3"], kl[1].mean(), rtol=1e-4, atol=1e-5)
    assert float(metrics["kl_k3"]) >= 0.0


def test_bfloat16_keeps_the_ratio_at_one_and_the_sampler_near():
    model = gpt2.GPT2(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    state, (prompt, _, _) = make_state(CFG), make_inputs(B)
    reply = GENERATE(state.params["policy"], prompt, jax.random.key(0), model=model, cfg=SAMPLING)
    batch, metrics = JUDGE(state, prompt, reply, jnp.linspace(-1, 2, B), model=model, cfg=CFG, temperature=0.8)
    exact, _ = JUDGE(state, prompt, reply, jnp.linspace(-1, 2, B), model=MODEL, cfg=CFG, temperature=0.8)
    assert np.abs(batch.old_logprobs - exact.old_logprobs).max() > 1e-3  # it is bfloat16 indeed
    # A bfloat16 is off by up to 2^-9 of its size. Logits here are a few units, and the roundings of both sides add up.
    assert float(metrics["sampler_gap"]) < 0.02

    # In the update's own program, behind a gradient and on a part of the batch.
    loss = jit(jax.value_and_grad(functools.partial(ppo.ppo_loss, model=model, cfg=CFG, temperature=0.8), has_aux=True))
    (_, found), _ = loss(state.params, jax.tree.map(lambda x: x[: B // 2], batch))
    assert float(found["ratio_gap"]) < 1e-5


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_a_bandit_with_a_known_best_answer_is_solved(estimator):
    """One-token replies; token 7 earns 1, all others 0: the whole iteration must find and prefer it."""
    config = dataclasses.replace(CONFIG, n_embd=16, n_layer=1)
    cfg = PPOConfig(
        batch_size=64, epochs=2, minibatches=2, iterations=60, learning_rate=1e-2, kl_coef=0.0, max_update_kl=None,
        estimator=estimator, replies_per_prompt=1 if estimator == "gae" else 4,
    )  # fmt: skip
    state = make_state(cfg, config, scale=1.0, names=["hit"])
    size = 64 // cfg.replies_per_prompt
    prompt = Prompt(jnp.ones((size, 3), jnp.int32), jnp.ones((size, 3), bool))  # type: ignore[arg-type]

    def hit(_, reply, references, fixed):
        return references, {"hit": (reply.tokens[:, 0] == 7).astype(jnp.float32)}

    whole, _, _ = make_programs(cfg, model=gpt2.GPT2(config), score=hit, sampling=SamplingConfig(max_new_tokens=1))
    scores = []
    for _ in range(cfg.iterations):
        state, metrics = whole(state, prompt, {}, (), jax.random.key(1))
        scores.append(float(metrics["reward/hit"]))
    assert scores[0] < 0.15
    assert np.mean(scores[-5:]) > 0.95
    assert int(state.step) == cfg.iterations


def by_hand(params, prompt, reply):
    """Each reply behind its prompt, one forward without a cache -> log-probs, entropies, values, float64, a triple a reply."""
    tokens, mask = np.asarray(reply.tokens), np.asarray(reply.mask)
    text, seen = jnp.concatenate([prompt.tokens, tokens], 1), jnp.concatenate([prompt.mask, mask], 1)
    states = np.asarray(jit(functools.partial(gpt2.hidden, model=MODEL))(params["policy"], text, seen)[0], float)
    wte, value = np.asarray(params["policy"]["wte"], float)[:50], params["value"]["head"]["value"]
    found = []
    for b, n in enumerate(mask.sum(1)):
        h = states[b, P - 1 : P - 1 + n]
        logs = h @ wte.T / 0.8
        logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
        values = h @ np.asarray(value["kernel"], float)[:, 0] + float(value["bias"][0])
        found.append((logs[np.arange(n), tokens[b, :n]], -(np.exp(logs) * logs).sum(-1), values))
    return found


def with_critic(state, rng):
    kernel = jnp.asarray(0.3 * rng.normal(size=(CONFIG.n_embd, 1)), jnp.float32)
    return {**state.params, "value": {"head": {"value": {"kernel": kernel, "bias": jnp.full(1, 0.1)}}}}


def test_the_loss_is_that_of_the_formulas_on_both_sides_of_both_clips():
    cfg = dataclasses.replace(CFG, clip=0.3, value_clip=0.15, value_coef=0.7, entropy_coef=0.05)
    rng, (prompt, _, _) = np.random.default_rng(0), make_inputs(B)
    params = with_critic(make_state(cfg), rng)
    reply = GENERATE(params["policy"], prompt, jax.random.key(0), model=MODEL, cfg=SAMPLING)
    old, old_values, advantages, returns = rng.normal(size=(4, B, R))  # garbage where nothing counts
    parts = {name: [] for name in ("policy", "value", "entropy", "clipped", "kl", "gap")}
    for b, (logprobs, entropy, values) in enumerate(by_hand(params, prompt, reply)):
        for t, (new, h, v) in enumerate(zip(logprobs, entropy, values, strict=True)):
            old[b, t], old_values[b, t] = new - rng.uniform(-0.8, 0.8), v - rng.uniform(-0.4, 0.4)
            r, a = np.exp(new - old[b, t]), advantages[b, t]
            parts["policy"].append(-min(r, 1.3) * a if a > 0 else -max(r, 0.7) * a)
            near = min(max(v, old_values[b, t] - 0.15), old_values[b, t] + 0.15)
            parts["value"].append(0.5 * max((v - returns[b, t]) ** 2, (near - returns[b, t]) ** 2))
            parts["entropy"].append(h)
            parts["clipped"].append(not 0.7 <= r <= 1.3)
            parts["kl"].append(r - 1 - np.log(r))
            parts["gap"].append(abs(r - 1))
    mean = {name: np.mean(column) for name, column in parts.items()}
    arrays = (jnp.asarray(x, jnp.float32) for x in (old, old_values, advantages, returns))
    rollout = ppo.Rollout(prompt, reply.tokens, reply.mask, *arrays)
    loss, found = jit(functools.partial(ppo.ppo_loss, model=MODEL, cfg=cfg, temperature=0.8))(params, rollout)
    expected = {
        "loss": mean["policy"] + 0.7 * mean["value"] - 0.05 * mean["entropy"], "policy_loss": mean["policy"],
        "value_loss": mean["value"], "clip_fraction": mean["clipped"], "update_kl": mean["kl"], "ratio_gap": max(parts["gap"]),
    }  # fmt: skip
    assert 0.2 < mean["clipped"] < 0.8 and found.keys() == expected.keys() and loss == found["loss"]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_logged_of_a_rollout_is_what_the_readme_says():
    state, rng, (prompt, _, _) = make_state(CFG), np.random.default_rng(0), make_inputs(B)
    state = state._replace(
        params=with_critic(state, rng)
    )  # policy = reference: no KL, a token's return is its reply's score
    reply = GENERATE(state.params["policy"], prompt, jax.random.key(0), model=MODEL, cfg=SAMPLING)
    mask, scores, off = np.asarray(reply.mask), np.linspace(-1, 2, B), rng.uniform(-0.5, 0.5, (B, R))
    shifted = reply._replace(logprobs=jnp.where(mask, reply.logprobs + off, 0.0))
    cfg = dataclasses.replace(CFG, gamma=1.0, lam=1.0)
    _, found = JUDGE(state, prompt, shifted, jnp.asarray(scores), model=MODEL, cfg=cfg, temperature=0.8)
    rows = by_hand(state.params, prompt, reply)
    values, returns = np.concatenate([v for *_, v in rows]), np.repeat(scores, mask.sum(1))
    expected = {
        "score_sd": scores.std(), "reply_tokens": mask.sum(1).mean(), "sampler_gap": np.abs(off[mask]).mean(),
        "stop_rate": np.mean([0 in np.asarray(reply.tokens[b])[mask[b]] for b in range(B)]),
        "entropy": np.concatenate([h for _, h, _ in rows]).mean(),
        "explained_variance": 1 - np.square(returns - values).sum() / np.square(returns - returns.mean()).sum(),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_every_iteration_draws_anew():
    """The same prompts and a policy that has not moved: other replies, since the keys derive from the iteration's number."""
    _, roll, _ = make_programs(CFG)
    state, inputs, key = make_state(CFG), make_inputs(B), jax.random.key(1)
    first, second, again = (
        np.asarray(roll(state._replace(step=jnp.int32(k)), *inputs, key)[0].tokens) for k in (0, 1, 0)
    )
    assert (first != second).any(1).mean() > 0.5
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", VARIANTS)
def test_beta_is_the_configs_and_follows_the_kl_of_the_replies(name):
    cfg, steps = VARIANTS[name], history(name)[0]
    beta = cfg.kl_coef
    for state, metrics in steps:
        np.testing.assert_allclose(metrics["kl_coef"], beta, rtol=1e-5)
        if cfg.kl_target is not None:
            beta *= 1 + min(max(float(metrics["kl"]) / cfg.kl_target - 1, -0.2), 0.2) * B / cfg.kl_horizon
        np.testing.assert_allclose(state.kl_coef, beta, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_iteration_starts_at_ratio_one(name):
    assert max(float(metrics["ratio_gap_start"]) for _, metrics in history(name)[0]) < 1e-4
