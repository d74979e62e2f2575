"""The laws that PPO must obey, each on a tiny model and real rollouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from therapy_jax import gpt2, ppo, sharding
from therapy_jax.batching import Prompt
from therapy_jax.config import ConfigError, MeshConfig, PPOConfig, SamplingConfig
from therapy_jax.rewards.combine import init_stats
from therapy_jax.sampling import generate, reply_hidden

B, P, R = 16, 9, 6
CONFIG = gpt2.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
MODEL = gpt2.GPT2(CONFIG)
CFG = PPOConfig(
    batch_size=B, epochs=2, minibatches=4, learning_rate=3e-3, warmup_steps=1, kl_coef=0.1, max_update_kl=None
)


jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": "0"}
)  # compiling takes the longest
GENERATE = jit(generate, static_argnames=("model", "cfg"))
JUDGE = jit(ppo.judge, static_argnames=("model", "cfg", "temperature"))
UPDATE = jit(ppo.ppo_update, static_argnames=("model", "tx", "cfg", "temperature"))
DONATE = jit(ppo.ppo_update, static_argnames=("model", "tx", "cfg", "temperature"), donate_argnums=0)
optimizer = functools.cache(ppo.optimizer)

KEY_BIAS = (jax.tree_util.DictKey("c_attn"), jax.tree_util.DictKey("bias"))  # [L, (query, key, value), H, K]


def make_state(cfg=CFG, seed=0, scale=3.0):
    """A policy with confident opinions (scaled-up weights), so that nothing is trivially uniform."""
    params = jax.tree.map(lambda x: x * scale, gpt2.init(CONFIG, jax.random.key(seed)))
    return ppo.init_state(params, CONFIG, optimizer(cfg), cfg, init_stats(["term"]))


def make_prompt(seed=0) -> Prompt:
    """Mixed prompt lengths, padded on the left."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, P + 1, (B, 1))
    mask = np.arange(P) >= P - lengths
    return Prompt(jnp.asarray(np.where(mask, rng.integers(1, 50, (B, P)), 0), jnp.int32), jnp.asarray(mask))  # type: ignore[arg-type]


def make_rollout(state, cfg=CFG, temperature=0.8, seed=0, scores=None, model=MODEL):
    prompt = make_prompt(seed)
    sampling = SamplingConfig(max_new_tokens=R, temperature=temperature)
    reply = GENERATE(state.params["policy"], prompt, jax.random.key(seed), model=model, cfg=sampling)
    scores = jnp.linspace(-0.7, 1.9, B) if scores is None else scores
    return JUDGE(state, prompt, reply, scores, model=model, cfg=cfg, temperature=temperature)


def perturbed(params, seed=7, size=0.02):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def update(state, rollout, cfg=CFG):
    return UPDATE(state, rollout, jax.random.key(5), model=MODEL, tx=optimizer(cfg), cfg=cfg, temperature=0.8)


def assert_trees_close(a, b, rtol, atol):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_ratio_is_one_before_any_update_and_kl_is_zero_for_equal_weights():
    state = make_state()
    rollout, metrics = make_rollout(state)
    assert len(set(np.asarray(rollout.mask.sum(1)).tolist())) > 1  # replies of several lengths, some with EOS
    assert float(metrics["kl"]) == 0.0 and float(metrics["kl_k3"]) == 0.0
    assert float(metrics["sampler_gap"]) < 1e-5
    _, updated = update(state, rollout)
    assert float(updated["ratio_gap_start"]) < 1e-5
    assert float(updated["ratio_gap"]) > 1e-3  # and it did move afterwards


def test_kl_is_that_of_the_whole_distributions():
    """k1 and k3, averaged over many replies, estimate sum_t KL(policy || reference) along the way, computed in full."""
    state = make_state(scale=2.0)
    state = state._replace(ref_params=perturbed(state.ref_params))
    prompt = make_prompt()

    @jit
    def in_full(policy, reference, reply):
        def logs(params):
            hidden = reply_hidden(params, prompt, reply.tokens, reply.mask, model=MODEL)
            return jax.nn.log_softmax(gpt2.head(CONFIG, params["wte"], hidden)[..., : CONFIG.vocab_size] / 0.8)

        full = (jnp.exp(logs(policy)) * (logs(policy) - logs(reference))).sum(-1)
        return jnp.where(reply.mask, full, 0).sum(1).mean()

    found, exact = [], []
    for seed in range(24):
        sampling = SamplingConfig(max_new_tokens=R, temperature=0.8)
        reply = GENERATE(state.params["policy"], prompt, jax.random.key(seed), model=MODEL, cfg=sampling)
        _, metrics = JUDGE(state, prompt, reply, jnp.zeros(B), model=MODEL, cfg=CFG, temperature=0.8)
        found.append([float(metrics["kl"]), float(metrics["kl_k3"])])
        exact.append(float(in_full(state.params["policy"], state.ref_params, reply)))
    k1, k3 = np.mean(found, 0)
    assert np.mean(exact) > 0.05
    np.testing.assert_allclose(k3, np.mean(exact), rtol=0.1)  # 384 replies; k3 has the smaller variance
    np.testing.assert_allclose(k1, np.mean(exact), rtol=0.35)


def test_shaped_rewards_sum_to_score_minus_beta_kl():
    state = make_state()
    state = state._replace(ref_params=perturbed(state.ref_params), kl_coef=jnp.float32(0.3))
    scores = jnp.linspace(-0.7, 1.9, B)
    _, metrics = make_rollout(state, scores=scores)
    expected = float(scores.mean()) - 0.3 * float(metrics["kl"])
    np.testing.assert_allclose(float(metrics["shaped_reward"]), expected, rtol=1e-5)


def test_garbage_under_the_mask_changes_nothing():
    state = make_state()
    state = state._replace(ref_params=perturbed(state.ref_params))
    rollout, _ = make_rollout(state)
    clean, metrics = update(state, rollout)

    def spoil(x):
        return jnp.where(rollout.mask, x, jnp.asarray(13 if x.dtype == jnp.int32 else 1e3, x.dtype))

    prompt = rollout.prompt._replace(tokens=jnp.where(rollout.prompt.mask, rollout.prompt.tokens, 17))
    names = ("tokens", "old_logprobs", "old_values", "advantages", "returns")
    spoilt = rollout._replace(prompt=prompt, **{name: spoil(getattr(rollout, name)) for name in names})
    assert not rollout.mask.all()
    dirty, dirty_metrics = update(state, spoilt)
    assert_trees_close(dirty.params, clean.params, rtol=0, atol=0)
    assert_trees_close(dirty_metrics, metrics, rtol=0, atol=0)


def test_gradient_of_the_first_step_is_the_policy_gradient():
    """At ratio 1 the clipped objective's gradient is that of -mean(A * logprob): a different formula, by autodiff."""
    state = make_state()
    rollout, _ = make_rollout(state)
    cfg = dataclasses.replace(CFG, value_coef=0.0)

    def vanilla(policy):
        hidden = reply_hidden(policy, rollout.prompt, rollout.tokens, rollout.mask, model=MODEL)
        logs = jax.nn.log_softmax(gpt2.head(CONFIG, policy["wte"], hidden)[..., : CONFIG.vocab_size] / 0.8)
        logprobs = jnp.take_along_axis(logs, rollout.tokens[..., None], -1)[..., 0]
        return -jnp.where(rollout.mask, logprobs * rollout.advantages, 0.0).sum() / rollout.mask.sum()

    def clipped(policy):
        return ppo.ppo_loss({**state.params, "policy": policy}, rollout, model=MODEL, cfg=cfg, temperature=0.8)[0]

    ours = jit(jax.grad(clipped))(state.params["policy"])
    expected = jit(jax.grad(vanilla))(state.params["policy"])
    norm = float(optax.tree.norm(expected))
    assert norm > 1e-3
    assert_trees_close(ours, expected, rtol=0, atol=1e-5 * norm)


def test_clipping_stops_the_gradient_where_the_ratio_left_the_band():
    """A hand-made rollout: old log-probs so low that every ratio is far above 1 + clip. Positive advantages then pull no
    further, negative ones push back."""
    state = make_state()
    rollout, _ = make_rollout(state)
    far = rollout._replace(old_logprobs=rollout.old_logprobs - 1.0)
    cfg = dataclasses.replace(CFG, value_coef=0.0)

    @jit
    def norm(sign):
        part = far._replace(advantages=jnp.where(far.mask, sign, 0.0))
        grads = jax.grad(lambda p: ppo.ppo_loss(p, part, model=MODEL, cfg=cfg, temperature=0.8)[0])(state.params)
        return optax.tree.norm(grads)

    assert float(norm(1.0)) == 0.0
    assert float(norm(-1.0)) > 1e-3


def test_update_stops_when_the_policy_has_moved_too_far():
    state = make_state()
    rollout, _ = make_rollout(state)
    _, free = update(state, rollout)
    limited = dataclasses.replace(CFG, max_update_kl=1e-7)
    stopped, metrics = update(state, rollout, cfg=limited)
    assert float(free["skipped"]) == 0
    # Warm-up starts at rate 0: the first step does not move, the second does, and the third sees it and stops.
    assert float(metrics["skipped"]) == CFG.epochs * CFG.minibatches - 2
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, stopped.params, state.params))) > 0


@pytest.mark.parametrize("max_update_kl", [None, 1e9])
def test_minibatches_that_are_not_finite_are_skipped_and_counted(max_update_kl):
    """One prompt's advantages are NaN: of the four minibatches of each pass the one that holds it is left out. All: nothing
    changes."""
    cfg = dataclasses.replace(CFG, max_update_kl=max_update_kl)
    state = make_state(cfg)
    rollout, _ = make_rollout(state, cfg)
    one = rollout._replace(advantages=rollout.advantages.at[3].set(np.nan))
    found, metrics = update(state, one, cfg)
    assert int(metrics["bad_updates"]) == int(found.bad_updates[1]) == cfg.epochs
    counts = [int(x) for _, x in optax.tree.get_all_with_path(found.opt_state, "count")]
    assert counts and set(counts) == {cfg.epochs * (cfg.minibatches - 1)}  # optimizer steps taken
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found.params, metrics)))
    none, metrics = update(state, rollout._replace(advantages=rollout.advantages * np.nan), cfg)
    steps = cfg.epochs * cfg.minibatches
    assert none.bad_updates.tolist() == [steps, steps] and metrics["bad_in_a_row"] == steps
    for a, b in zip(jax.tree.leaves(none[:3]), jax.tree.leaves(state[:3]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_jitted_donated_and_sharded_equals_plain():
    state = make_state()
    state = state._replace(ref_params=perturbed(state.ref_params))
    rollout, _ = make_rollout(state)
    static = {"model": MODEL, "tx": optimizer(CFG), "cfg": CFG, "temperature": 0.8}
    plain, plain_metrics = ppo.ppo_update(state, rollout, jax.random.key(5), **static)
    for devices in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(data=devices))
        placed = sharding.replicate(mesh, state), sharding.split_batch(mesh, rollout)
        new, metrics = DONATE(*placed, jax.random.key(5), **static)
        # Adam divides by the root of a second moment: where gradients vanish, rounding decides; hence the absolute part.
        # A key's bias adds the same to all scores of a query, so that its gradient is nothing but rounding.
        params, expected = (
            jax.tree_util.tree_map_with_path(lambda path, x: x[:, ::2] if path[-2:] == KEY_BIAS else x, p)
            for p in (new.params, plain.params)
        )
        assert_trees_close(params, expected, rtol=1e-4, atol=2e-4)
        for name in ("loss", "policy_loss", "value_loss", "update_kl", "clip_fraction"):
            np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))  # donation took the copies only


def test_donated_state_is_gone_and_the_reference_is_a_copy():
    mesh = sharding.make_mesh(MeshConfig(data=1))
    fresh = make_state()
    state, rollout = sharding.replicate(mesh, fresh), sharding.split_batch(mesh, make_rollout(fresh)[0])
    policy = state.params["policy"]["wte"]
    new, _ = DONATE(state, rollout, jax.random.key(5), model=MODEL, tx=optimizer(CFG), cfg=CFG, temperature=0.8)
    assert policy.is_deleted()
    assert not new.ref_params["wte"].is_deleted()
    assert (
        float(jnp.abs(new.ref_params["wte"] - new.params["policy"]["wte"]).max()) > 0
    )  # reference stays, policy moves


def test_adaptive_kl_coefficient_in_closed_form():
    cfg = dataclasses.replace(CFG, kl_target=6.0, kl_horizon=1000.0)
    adapt = functools.partial(ppo.adapt_kl_coef, jnp.float32(0.2), replies=50, cfg=cfg)
    np.testing.assert_allclose(adapt(kl=jnp.float32(6.0)), 0.2, rtol=1e-6)
    np.testing.assert_allclose(
        adapt(kl=jnp.float32(60.0)), 0.2 * (1 + 0.2 * 50 / 1000), rtol=1e-6
    )  # error clipped at 0.2
    np.testing.assert_allclose(adapt(kl=jnp.float32(0.0)), 0.2 * (1 - 0.2 * 50 / 1000), rtol=1e-6)  # and below
    np.testing.assert_allclose(adapt(kl=jnp.float32(5.4)), 0.2 * (1 - 0.1 * 50 / 1000), rtol=1e-6)
    assert float(ppo.adapt_kl_coef(jnp.float32(0.2), jnp.float32(60.0), 50, cfg=CFG)) == np.float32(
        0.2
    )  # fixed without a target


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(top_k=5), SamplingConfig(top_p=0.9), SamplingConfig(temperature=0.0)]
)
def test_rollouts_that_cannot_be_trained_on_are_refused(sampling):
    with pytest.raises(ConfigError, match="PPO rollouts"):
        ppo.check(sampling)


def test_value_head_starts_at_zero_and_learns_the_returns():
    cfg = dataclasses.replace(CFG, value_coef=1.0, value_clip=100.0, epochs=40, learning_rate=1e-2, iterations=10)
    state = make_state(cfg)
    rollout, first = make_rollout(state, cfg)
    assert float(jnp.abs(rollout.old_values).max()) == 0.0
    frozen = rollout._replace(advantages=jnp.zeros_like(rollout.advantages))  # no pull on the policy
    state, _ = update(state, frozen, cfg=cfg)
    _, values = ppo.read(state.params, rollout.prompt, rollout.tokens, rollout.mask, model=MODEL, cfg=cfg)
    before = float(jnp.square(rollout.returns).sum())
    after = float(jnp.where(rollout.mask, jnp.square(values - rollout.returns), 0).sum())
    assert after < 0.1 * before
    assert float(first["explained_variance"]) <= 0.0


def test_what_stops_an_update_stops_the_rest_of_it_and_each_pass_deals_anew():
    """One prompt whose replies have become far likelier than they were: the minibatch that holds it stops the update, and so
    says at which place of the first pass it stood. One prompt of NaN: whether it stood at the last place of the last pass."""
    cfg = dataclasses.replace(CFG, learning_rate=1e-9, max_update_kl=0.02)
    state = make_state(cfg)
    rollout, _ = make_rollout(state, cfg)
    assert (cfg.epochs, cfg.minibatches) == (2, 4)
    places, last = [], []
    for row in range(B):
        far = rollout._replace(old_logprobs=rollout.old_logprobs.at[row].add(-1.5))
        _, metrics = update(state, far, cfg=cfg)
        places.append(8 - int(metrics["skipped"]))
        assert float(metrics["update_kl"]) < 1e-6, "a mean over the steps that were taken"
        _, metrics = update(state, rollout._replace(advantages=rollout.advantages.at[row].set(np.nan)), cfg=cfg)
        last.append(int(metrics["bad_in_a_row"]) == 1)
    assert sorted(places) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, (
        "no step of the second pass; every prompt dealt once"
    )
    assert sum(last) == 4 and last != [place == 3 for place in places], "the second pass is another deal"
