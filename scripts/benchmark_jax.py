"""Our side of the benchmark: a worker of scripts/benchmark.py; benchmark_worker.py says how they talk. No torch here.

Each `prepare_*` loads the model that both sides start from, writes what the peer must agree with, compiles the program
that will be timed, and gives it back. Programs are those of the training scripts, with their state donated; only
schedules and clipping are set to what the peer has.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_worker as worker
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from therapy_jax import gpt2, ppo, sft, weights
from therapy_jax.attention import Layout
from therapy_jax.batching import Batch, Prompt, without_mask
from therapy_jax.config import PPOConfig, SamplingConfig, TrainingConfig
from therapy_jax.gpt2 import Params
from therapy_jax.rewards import overlap
from therapy_jax.rewards.combine import combine, init_stats
from therapy_jax.sampling import generate

THREADS = worker.threads_asked()  # jax counts the processors when it is first used, below
NO_TOKEN = -1  # as EOS: no reply ends before its length, so that both sides do the same work


def hello() -> worker.Json:
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"versions": versions, "device": device.platform, "device_kind": device.device_kind, "threads": THREADS}


def export(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """The random model of both sides, in Hugging Face's layout. The blocks' matrices are twice GPT-2's usual start: there
    the embedding rules alone, and greedy decoding would only repeat the prompt's last token."""
    config = gpt2.GPT2Config(**task["sizes"])
    params = gpt2.init(config, jax.random.key(0))
    blocks = jax.tree_util.tree_map_with_path(
        lambda path, x: 2.0 * x if path[-1].key == "kernel" else x, params["blocks"]
    )
    weights.save_pretrained(task["folder"], config, {**params, "blocks": blocks})
    return {}, worker.each(lambda: None)


def load_model(task: worker.Json) -> tuple[gpt2.GPT2, Params]:
    """-> (model, params on the device). float32 means float32, also where the hardware would rather round to TF32."""
    config, params = weights.load_pretrained(task["folder"])
    if task["dtype"] == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    config = dataclasses.replace(config, compute_dtype=task["dtype"], eos_token_id=NO_TOKEN)
    return gpt2.GPT2(config), jax.tree.map(jnp.array, params)


def theirs(config: gpt2.GPT2Config, tree: Params, prefix: str) -> dict[str, np.ndarray]:
    """A tree like the parameters (gradients, changes) under Hugging Face's names and in its shapes."""
    with tempfile.TemporaryDirectory() as folder:
        weights.save_pretrained(folder, config, tree)
        return {f"{prefix}/{name}": x for name, x in load_file(Path(folder) / "model.safetensors").items()}


def first_call(program: Callable[[], Any]) -> tuple[Any, float]:
    """-> (its result, seconds of tracing, compiling and one run)."""
    began = time.perf_counter()
    result = jax.block_until_ready(program())
    return result, time.perf_counter() - began


def prepare_sft(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """agree: losses of the first steps, nats per supervised token; grad/NAME, the first step's gradient; change/NAME, what the
    parameters have moved by after those steps."""
    model, params = load_model(task)
    arrays = worker.load(task["batch"])
    names = ("tokens", "attention_mask", "loss_mask")
    parts: dict[str, Any] = {name: arrays[name] for name in names}
    batch: Batch = jax.device_put(without_mask(Batch(**parts)))
    key = jax.random.key(0)
    agree: dict[str, Any] = {}
    if task["check"]:

        def mean_loss(params):
            loss, tokens = sft.sft_loss(params, batch, None, model=model)
            return loss / tokens

        agree |= theirs(model.config, jax.device_get(jax.jit(jax.grad(mean_loss))(params)), "grad")
    before = jax.tree.map(np.array, params) if task["check"] else None

    program, state = sft_program(task, model, params, batch.tokens.shape[0])
    del params  # donated with the state

    def step():
        nonlocal state
        state, metrics = program(state, batch, key)
        return metrics["loss"]

    loss, seconds = first_call(step)
    if task["check"]:
        losses = [loss] + [step() for _ in range(task["steps"] - 1)]
        moved = jax.tree.map(np.subtract, jax.device_get(state.params), before)
        worker.save(task["agree"], agree | theirs(model.config, moved, "change") | {"losses": losses})
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(lambda: jax.block_until_ready(step()))


def sft_program(task: worker.Json, model: gpt2.GPT2, params: Params, size: int) -> tuple[Callable, sft.TrainState]:
    """-> (the compiled step, its first state)."""
    hyper = task["hyper"]
    tx = optax.chain(
        optax.clip_by_global_norm(hyper["max_grad_norm"]),
        optax.adamw(hyper["learning_rate"], weight_decay=hyper["weight_decay"], mask=sft.decayed),
    )
    cfg = TrainingConfig(batch_size=size)
    program = jax.jit(functools.partial(sft.sft_step, model=model, tx=tx, cfg=cfg), donate_argnums=0)
    return program, sft.init_state(params, tx)


def prepare_conversations(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """SFT on rows of whole conversations, packed_NAME [S, B, T]; a run takes all S steps. agree: loss, nats per supervised
    token of all of them, before any step, and grad/NAME, its gradient."""
    model, params = load_model(task)
    arrays = worker.load(task["batch"])
    names = ("tokens", "attention_mask", "loss_mask")
    layout = Layout(**{name: arrays[f"packed_{name}"] for name in Layout._fields})
    parts: dict[str, Any] = {name: arrays[f"packed_{name}"] for name in names}
    stacked = Batch(**parts, layout=layout)
    count = len(stacked.tokens)
    batches = [jax.device_put(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(count)]
    if task["check"]:
        loss_of = functools.partial(sft.sft_loss, key=None, model=model)
        loss_and_gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        sums, gradient = np.zeros(2), jax.tree.map(np.zeros_like, jax.device_get(params))
        for batch in batches:
            found, grads = jax.device_get(loss_and_gradient(params, batch))
            sums += np.asarray(found)
            gradient = jax.tree.map(np.add, gradient, grads)
        gradient = jax.tree.map(lambda x: x / sums[1], gradient)
        worker.save(task["agree"], theirs(model.config, gradient, "grad") | {"losses": [sums[0] / sums[1]]})
        del gradient, grads
    program, state = sft_program(task, model, params, stacked.tokens.shape[1])
    key = jax.random.key(0)

    def step():
        nonlocal state
        for batch in batches:
            state, metrics = program(state, batch, key)
        return metrics["loss"]

    _, seconds = first_call(step)
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(lambda: jax.block_until_ready(step()))


def prepare_generate(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """Tokens and mask are what the program gives, as evaluate.py's: no log-probs, which the peer computes no more than it.
    agree: tokens i32[B, R], greedy."""
    model, params = load_model(task)
    tokens = worker.load(task["batch"])["tokens"]
    prompt: Prompt = jax.device_put(Prompt(tokens, np.ones(tokens.shape, bool)))
    top_k = task["top_k"]
    cfg = SamplingConfig(max_new_tokens=task["new_tokens"], temperature=1.0 if top_k else 0.0, top_k=top_k)
    program = jax.jit(lambda *args: generate(*args, model=model, cfg=cfg)[:2])
    calls = 0

    def step():
        nonlocal calls
        calls += 1
        return program(params, prompt, jax.random.key(calls))

    (_, mask), seconds = first_call(step)
    assert bool(mask.all())  # every reply is as long as it may be
    if task["check"]:  # no two samplers draw alike: what must agree is greedy, also where sampling is timed
        plain = dataclasses.replace(cfg, temperature=0.0, top_k=0)
        greedy = jax.jit(functools.partial(generate, model=model, cfg=plain))
        worker.save(task["agree"], {"tokens": greedy(params, prompt, jax.random.key(0)).tokens})
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(lambda: jax.block_until_ready(step()))


def prepare_ppo(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """The reward is one number per token of the vocabulary, and a reply earns that of its last token.

    agree: of each of two iterations with one minibatch a pass, rolled out and learnt from: tokens i32[2, B, R] (the peer
    is given them, since no two samplers draw alike), score, kl, surprise (-sum of log-probs), entropy, losses; and
    change/NAME, what the policy's parameters have moved by. The second iteration is there because in the first policy and
    reference are still equal.
    """
    model, params = load_model(task)
    none: Any = {}  # references: this reward needs none
    arrays, hyper = worker.load(task["batch"]), task["hyper"]
    tokens = arrays["tokens"]
    prompt: Prompt = jax.device_put(Prompt(tokens, np.ones(tokens.shape, bool)))
    fixed, key = jnp.asarray(arrays["table"]), jax.random.key(0)
    sampling = SamplingConfig(max_new_tokens=task["new_tokens"], temperature=hyper["temperature"])
    names = ("epochs", "minibatches", "learning_rate", "kl_coef", "clip", "value_clip", "value_coef", "gamma", "lam")
    cfg = PPOConfig(
        batch_size=tokens.shape[0],
        estimator="gae",
        value_head=task["value_head"],
        max_update_kl=None,
        **{name: hyper[name] for name in names},
    )
    tx = optax.adamw(hyper["learning_rate"], weight_decay=0.0)  # constant, and no clipping: as TRL's loop has it

    def score_fn(trunk: Params, reply: Any, references: Any, table: Any) -> Any:
        return references, {"table": table[reply.tokens[:, -1]]}

    def combine_fn(raw: Any, stats: Any) -> Any:
        return combine(raw, {"table": 1.0}, stats, standardise=False)

    def start(cfg: PPOConfig) -> ppo.PPOState:
        return ppo.init_state(jax.tree.map(jnp.copy, params), model.config, tx, cfg, init_stats(["table"]))

    if task["check"]:
        one = dataclasses.replace(cfg, minibatches=1, value_head="separate")
        roll = jax.jit(functools.partial(ppo.rollout, model=model, score_fn=score_fn, sampling=sampling, cfg=one))
        learn = jax.jit(
            functools.partial(
                ppo.learn, model=model, tx=tx, combine_fn=combine_fn, temperature=sampling.temperature, cfg=one
            ),
            donate_argnums=0,
        )
        state, seen = start(one), []
        for _ in range(2):
            reply, _, raw = roll(state, prompt, none, fixed, key)
            state, metrics = learn(state, prompt, reply, raw, key)
            seen.append({"tokens": reply.tokens, "surprise": -reply.logprobs.sum(1).mean(), **metrics})
        wanted = ("tokens", "score", "kl", "surprise", "entropy", "policy_loss", "value_loss", "update_kl")
        agree = {name: np.stack([np.asarray(metrics[name]) for metrics in seen]) for name in wanted}
        moved = jax.device_get(jax.tree.map(jnp.subtract, state.params["policy"], params))
        worker.save(task["agree"], agree | theirs(model.config, moved, "change"))
        del state, moved, seen
    if not task["timed"]:
        return {"compile_seconds": None, "agree": task["agree"]}, worker.each(lambda: None)

    program = jax.jit(
        functools.partial(
            ppo.ppo_iteration, model=model, tx=tx, score_fn=score_fn, combine_fn=combine_fn, sampling=sampling, cfg=cfg
        ),
        donate_argnums=0,
    )
    state = start(cfg)

    def step():
        nonlocal state
        state, metrics = program(state, prompt, none, fixed, key)
        return {name: metrics[name] for name in ("kl", "entropy")}

    _, seconds = first_call(step)
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(lambda: jax.device_get(step()))


def prepare_rewards(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """agree: rewards f32[terms, B], all terms in one program."""
    arrays = worker.load(task["batch"])
    words = [jnp.asarray(arrays[name]) for name in ("hyp", "hyp_mask", "ref", "ref_mask")]
    functions: dict[str, Callable[..., jax.Array]] = {
        "rouge1": functools.partial(overlap.rouge_n, n=1),
        "rouge2": functools.partial(overlap.rouge_n, n=2),
        "rouge_l": overlap.rouge_l,
        "bleu": overlap.bleu,
    }
    program = jax.jit(lambda *words: jnp.stack([functions[name](*words) for name in task["terms"]]))
    values, seconds = first_call(lambda: program(*words))
    worker.save(task["agree"], {"rewards": values})
    return (
        {"compile_seconds": seconds, "agree": task["agree"]},
        worker.each(lambda: jax.block_until_ready(program(*words))),
    )


def multiply(shape: tuple[int, int, int], dtype: str) -> float:
    """FLOP/s of [rows, inner] times [inner, out], or of the same turned over, which is faster of few rows: the better of the two."""
    rows, inner, out = shape
    x, w = (jax.random.normal(jax.random.key(0), size).astype(dtype) for size in ((rows, inner), (inner, out)))
    product = jax.jit(
        functools.partial(jnp.einsum, precision="highest" if dtype == "float32" else None), static_argnums=0
    )
    forms = [("ri,io->ro", x, w), ("oi,ri->or", w.T.copy(), x)]
    work = 2.0 * rows * inner * out
    return max(worker.best_rate(work, lambda form=form: product(*form).block_until_ready()) for form in forms)


def stream(size: int) -> float:
    """Bytes read and written a second, by adding to `size` bytes in place."""
    add, x = jax.jit(lambda x: x + 1.0, donate_argnums=0), jnp.zeros(size // 4)

    def step():
        nonlocal x
        x = add(x).block_until_ready()

    return worker.best_rate(2.0 * size, step)


def make_side() -> worker.Side:
    on_cpu = jax.default_backend() == "cpu"

    def device_peak() -> int | None:  # of the whole process: there is no way to reset it
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    return worker.Side(
        hello=hello,
        multiply=multiply,
        stream=stream,
        works={
            "export": export,
            "sft": prepare_sft,
            "conversations": prepare_conversations,
            "generate": prepare_generate,
            "ppo": prepare_ppo,
            "rewards": prepare_rewards,
        },
        synchronise=lambda: None,  # each step above waits for its own result
        reset_peak=worker.reset_peak if on_cpu else lambda: None,
        peak_bytes=worker.peak_bytes if on_cpu else device_peak,
    )


if __name__ == "__main__":
    worker.serve(make_side)
