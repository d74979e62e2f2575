"""SFT, sampling, rewards, PPO and evaluation of one tiny model on one mesh, as numbers to compare with another mesh's.

test_sharding.py calls `work` on 8 virtual devices, and runs this file as two processes of 4:

    python tests/sharded_work.py OUT.npz DATA FSDP TENSOR HOST:PORT PROCESSES PROCESS
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from therapy_jax import batching, classifiers, dialogue, evaluate, gpt2, ppo, prompts, readings, sft, sharding
from therapy_jax.config import ClassifierConfig, MeshConfig, PPOConfig, PromptConfig, SamplingConfig, TrainingConfig
from therapy_jax.rewards import combine, scoring
from therapy_jax.rewards.batch import Fixed, make_references
from therapy_jax.rewards.words import make_vocabulary
from therapy_jax.sampling import Reply

B, P, R = 16, 96, 12
STEPS, ITERATIONS = 10, 3
# What is left out is the first-order law of a mesh: dropout, accumulation and a separate critic are in on purpose.
SFT = TrainingConfig(batch_size=B, accumulate=2, learning_rate=1e-3, warmup_steps=2)
PPO = PPOConfig(batch_size=2 * B, replies_per_prompt=2, value_head="separate", learning_rate=1e-3, warmup_steps=1)


@functools.cache
def given():
    """Exchanges of the built-in sample, a tokenizer trained on them, and the model's sizes: the same in every process."""
    data = [e for d in dialogue.read_dialogues(None, "jsonl")["train"][:12] for e in dialogue.exchanges(d)]
    tokenizer = prompts.train_tokenizer([e.client.text + " " + e.therapist.text for e in data], 600)
    prompts.add_special_tokens(tokenizer)
    sizes = {"n_positions": P + 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return data, tokenizer, gpt2.GPT2Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)


def frozen(n_embd: int) -> classifiers.Frozen:
    """Heads and statistics with numbers of no meaning: what they are trained to is not what is compared here."""
    rng = np.random.default_rng(0)
    heads = classifiers.make_heads(ClassifierConfig())
    params = [
        heads[name].init(jax.random.key(i), jnp.zeros((1, readings.width(name, n_embd))))["params"]
        for i, name in enumerate(("emotion", "strategy"))
    ]
    priors = [np.full(len(classifiers.CLASSES[name]), 0.1, np.float32) for name in ("emotion", "strategy")]
    centre, whiten = rng.normal(size=n_embd), rng.normal(size=(n_embd, 8))
    return classifiers.Frozen(*params, *priors, centre.astype(np.float32), whiten.astype(np.float32))


def work(mesh_config: MeshConfig, only_sft: bool = False) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """-> numbers by name, and the states whose layout is to be looked at."""
    mesh = sharding.make_mesh(mesh_config)
    data, tokenizer, config = given()
    sharding.check_model(mesh, config.split_sizes)
    params = gpt2.init(config, jax.random.key(0))
    params, loud = jax.tree.map(lambda x: 2 * np.asarray(x), params), jax.tree.map(lambda x: 5 * np.asarray(x), params)
    config = dataclasses.replace(config, mesh=mesh)
    model, found = gpt2.GPT2(config), {}
    noisy = gpt2.GPT2(dataclasses.replace(config, dropout=0.1))
    encoded = [prompts.encode(tokenizer, e, PromptConfig(max_tokens=P), P + 64) for e in data]

    # supervised steps
    tx = sft.optimizer(SFT, STEPS)
    state = sharding.make_state(mesh, functools.partial(sft.init_state, tx=tx), sharding.place(mesh, params))
    step = jax.jit(
        functools.partial(sft.sft_step, model=noisy, tx=tx, cfg=SFT),
        donate_argnums=0,
        out_shardings=(sharding.shardings(mesh, state), None),
    )
    mine = sharding.my_rows(mesh, B)
    losses = []
    for i in range(STEPS):
        rows = [encoded[(i * B + j) % len(encoded)] for j in mine]
        batch = sharding.split_batch(mesh, batching.supervised(rows, len(rows), P + 64))
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    found["sft"] = np.asarray(losses)
    if only_sft:
        return found, {"sft": state}

    # greedy and sampled replies, and the loss of each reply, as the evaluation asks for them
    trunk, talker = (
        sharding.place(mesh, params),
        sharding.place(mesh, loud),
    )  # a model as it starts says always the same
    rows = [e.prompt for e in encoded[: B + 5]]
    for name, temperature in (("greedy", 0.0), ("sampled", 0.9)):
        cfg = SamplingConfig(max_new_tokens=R, temperature=temperature)
        replies = evaluate.answer(talker, rows, jax.random.key(2), model=model, cfg=cfg, batch_size=B, mesh=mesh)
        found[name] = np.asarray([reply + [-1] * (R - len(reply)) for reply in replies])
    found["losses"] = evaluate.losses_of(trunk, encoded[: B + 5], model=model, batch_size=B, mesh=mesh)[0]

    # rewards and PPO, on replies that are given
    fixed = Fixed(make_vocabulary(tokenizer, config.padded_vocab_size), frozen(config.n_embd))
    fixed = sharding.replicate(mesh, fixed)
    score = jax.jit(functools.partial(scoring.score, model=model, device_custom=None))

    def combine_fn(raw, stats):
        return combine.combine(raw, {"rouge_l": 1.0, "semantic": 0.5, "sameness": 0.5}, stats, standardise=False)

    tx = ppo.optimizer(PPO)
    stats = combine.init_stats(combine.TERMS)
    make = functools.partial(ppo.init_state, config=config, tx=tx, cfg=PPO, stats=stats)
    ppo_state = sharding.make_state(mesh, make, sharding.place(mesh, params))
    learn = jax.jit(
        functools.partial(ppo.learn, model=model, tx=tx, combine_fn=combine_fn, cfg=PPO, temperature=0.9),
        donate_argnums=0,
        out_shardings=(sharding.shardings(mesh, ppo_state), None),
    )
    prompt, references = batching.prompts(rows[:B], P), make_references(data[:B], trunk, tokenizer, model=model)
    split = sharding.split_batch(mesh, jax.tree.map(lambda x: x[mine], (prompt, references)))
    rng = np.random.default_rng(1)
    for i in range(ITERATIONS):
        tokens = rng.integers(0, config.vocab_size, (2 * B, R)).astype(np.int32)
        mask = np.arange(R) < rng.integers(1, R + 1, (2 * B, 1))
        twice = (2 * mine[:, None] + np.arange(2)).ravel()  # a prompt's two replies stand side by side
        reply = Reply(tokens[twice], mask[twice], np.zeros((len(twice), R), np.float32))  # pyright: ignore
        reply = sharding.split_batch(mesh, reply)
        both = jax.jit(lambda r: jax.tree.map(lambda x: jnp.repeat(x, 2, 0), r))(split[1])
        raw = score(trunk, reply, both, fixed)[1]
        ppo_state, metrics = learn(ppo_state, split[0], reply, raw, jax.random.key(3))
        found |= {f"ppo/{i}/{name}": np.asarray(value) for name, value in sharding.fetch(metrics).items()}
        found |= {f"terms/{i}/{name}": value for name, value in sharding.fetch(raw).items()}
    return found, {"sft": state, "ppo": ppo_state, "trunk": trunk}


if __name__ == "__main__":
    out, sizes = sys.argv[1], [int(x) for x in sys.argv[2:5]]
    here = MeshConfig(*sizes, coordinator=sys.argv[5], processes=int(sys.argv[6]), process=int(sys.argv[7]))
    sharding.connect(here)
    numbers, _ = work(here)
    np.savez(out, **numbers)  # pyright: ignore[reportArgumentType]
