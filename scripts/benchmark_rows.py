"""What scripts/benchmark.py measures: the sizes and shapes of the work, what it costs, the rows, and their batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from therapy_jax.flops import (
    Product,
    Size,
    forward_flops,
    generation_flops,
    generation_products,
    ppo_flops,
    ppo_products,
    training_flops,
    training_products,
)

# What the work costs is the same count for both sides of a row, whatever each of them does beyond it.

HYPER_SFT = {"learning_rate": 1e-4, "weight_decay": 0.1, "max_grad_norm": 1.0}
HYPER_PPO = {
    "learning_rate": 1e-4, "kl_coef": 0.05, "clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "gamma": 1.0, "lam": 0.95,
    "temperature": 0.7,
}  # fmt: skip

# ---- sizes and shapes


class Shapes(NamedTuple):
    """Of the work: B sequences or prompts, T tokens each, P of a prompt, R of a reply."""

    sft: tuple[int, int]  # B, T
    generate: tuple[int, int, int]  # B, P, R
    ppo: tuple[int, int, int, int, int]  # B, P, R, epochs, minibatches
    memory: tuple[int, int]  # B, T
    rewards: tuple[int, int] = (256, 64)  # replies, words at most
    long: tuple[int, int] = (32, 1024)  # B, T of an SFT step that fills a GPU


SIZES = {"nano": Size(4, 128, 4), "gpt2": Size(12, 768, 12)}
SHAPES = {
    "nano": Shapes(sft=(16, 128), generate=(32, 64, 64), ppo=(32, 64, 48, 4, 4), memory=(8, 512)),
    "gpt2": Shapes(sft=(8, 128), generate=(32, 64, 64), ppo=(32, 64, 48, 4, 4), memory=(8, 512)),
}
QUICK_SHAPES = Shapes(sft=(8, 64), generate=(8, 32, 32), ppo=(8, 32, 16, 2, 2), memory=(4, 128), long=(4, 128))
TINY = Size(2, 64, 2, 1000), Shapes(  # --sizes tiny: every model is this one, to try the whole thing in a minute
    sft=(4, 32), generate=(4, 8, 8), ppo=(8, 8, 8, 2, 2), memory=(4, 32), long=(4, 64), rewards=(16, 12)
)  # fmt: skip


# ---- rows


class Row(NamedTuple):
    """One comparison."""

    name: str
    model: str
    work: str  # what both workers prepare
    ours: str  # labels of the sides
    peer: str
    script: str  # the peer's worker
    task: dict[str, Any]  # what both are told; "batch" names the arrays
    ours_task: dict[str, Any]
    peer_task: dict[str, Any]
    check: str  # rows of one name share one agreement check, made by the first of them
    useful: int  # tokens of a run that count: supervised ones in training, new ones in generation; 0: no tokens
    flops: tuple[float, float]  # of ours, of theirs
    measure: str = "seconds"  # or "peak_bytes": what the ratio is of
    products: Sequence[Product] = ()  # with parameters, of ours: timed alone, they are the least that we could take


def make_rows(
    what: Sequence[str],
    models: Sequence[str],
    sizes: Mapping[str, Size],
    shapes: Mapping[str, Shapes],
    quick: bool,
    counts: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Every row that the command line asks for. `startup` is none: see benchmark_measure.py. counts: for `conversations`,
    what benchmark_conversations.write said of each model's.

    A row of another kind of work is a block here, a `prepare_*` in each worker, and a name in `make_batch` and in
    `benchmark_sides.write_inputs`.
    """
    rows: list[Row] = []
    counts = counts or {}
    for model in models:
        size, shape = sizes[model], shapes[model]
        torch: dict[str, Any] = {"script": "benchmark_torch.py", "model": model}
        if "sft" in what:
            b, t = shape.sft
            same = {"batch": "sft", "hyper": HYPER_SFT, "steps": 3}
            flops, useful = training_flops(size, b, t), b * (t - 1)
            products = training_products(size, b * t, b * t)
            kinds = [
                ("float32", "eager", False),
                ("float32", "compiled", True),
                ("bfloat16", "autocast, compiled", True),
            ]
            for dtype, how, compiled in kinds[:1] if quick else kinds:
                rows.append(
                    Row(
                        f"sft {model} {b}x{t}, {dtype} against torch {how}", work="sft", ours=f"jax {dtype}",
                        peer=f"torch {how}", task={**same, "dtype": dtype}, ours_task={}, peer_task={"compile": compiled},
                        check=f"sft {model} {dtype} {how}", useful=useful, flops=(flops, flops), products=products, **torch,
                    )
                )  # fmt: skip
            if not quick:  # what train_sft.py learns from: a reply, and before it what is only read
                reply = t // 4
                flops = 3 * forward_flops(size, b * t, b * t * t, b * reply)
                rows.append(
                    Row(
                        f"sft {model} {b}x{t} with a loss on the last {reply}, float32 against torch compiled", work="sft",
                        ours="jax float32", peer="torch compiled", task={**same, "batch": "replies", "dtype": "float32"},
                        ours_task={}, peer_task={"compile": True}, check=f"sft {model} replies", useful=b * reply,
                        flops=(flops, flops), products=training_products(size, b * t, b * reply), **torch,
                    )
                )  # fmt: skip
        if "long" in what:
            b, t = shape.long
            flops = training_flops(size, b, t)
            rows.append(
                Row(
                    f"sft {model} {b}x{t}, bfloat16 against torch autocast, compiled", work="sft", ours="jax bfloat16",
                    peer="torch autocast, compiled", ours_task={}, peer_task={"compile": True},
                    task={"batch": "long", "hyper": HYPER_SFT, "steps": 3, "dtype": "bfloat16"},
                    check=f"long {model}", useful=b * (t - 1), flops=(flops, flops), **torch,
                )
            )  # fmt: skip
        if "conversations" in what:
            c = counts[model]
            ours, theirs = (
                3 * forward_flops(size, read, pairs, c.supervised)
                for read, pairs in ((c.ours, c.our_pairs), (c.theirs, c.their_pairs))
            )
            for how, compiled in (("eager", False), ("compiled", True)):
                rows.append(
                    Row(
                        f"sft {model}, {c.supervised:,} tokens of whole conversations, against torch {how}",
                        work="conversations", ours="jax, packed", peer=f"torch {how}, padded",
                        task={"batch": "conversations", "hyper": HYPER_SFT, "dtype": "float32"}, ours_task={},
                        peer_task={"compile": compiled}, check=f"conversations {model} {how}", useful=c.supervised,
                        flops=(ours, theirs), **torch,
                    )
                )  # fmt: skip
        if "generate" in what:
            b, p, r = shape.generate
            flops, products = generation_flops(size, b, p, r), generation_products(size, b, p, r)
            for how, top_k in [("greedy", 0)] if quick else [("greedy", 0), ("top-k 50", 50)]:
                task = {"batch": "generate", "dtype": "float32", "new_tokens": r, "top_k": top_k}
                rows.append(
                    Row(
                        f"generate {model} {b}x{p}+{r}, {how}", work="generate", ours="jax float32", peer="torch generate",
                        task=task, ours_task={}, peer_task={}, check=f"generate {model}", useful=b * r,
                        flops=(flops, flops), products=products, **torch,
                    )
                )  # fmt: skip
        if "ppo" in what:
            b, p, r, epochs, minibatches = shape.ppo
            hyper = {**HYPER_PPO, "epochs": epochs, "minibatches": minibatches}
            task = {"batch": "ppo", "dtype": "float32", "new_tokens": r, "hyper": hyper}
            separate, shared = (ppo_flops(size, b, p, r, epochs, critic) for critic in (True, False))
            for head, count in [("separate", separate)] if quick else [("separate", separate), ("shared", shared)]:
                rows.append(
                    Row(
                        f"ppo {model} {b}x{p}+{r}, {epochs}x{minibatches} steps, {head} critic", work="ppo",
                        ours=f"jax float32, {head}", peer="TRL, separate", task=task, ours_task={"value_head": head},
                        peer_task={}, check=f"ppo {model}", useful=b * r, flops=(count, separate),
                        products=ppo_products(size, b, p, r, epochs, minibatches, head == "separate"), **torch,
                    )
                )  # fmt: skip
        if "memory" in what:
            b, t = shape.memory
            flops = training_flops(size, b, t)
            for how, compiled in (("eager", False), ("compiled", True)):
                rows.append(
                    Row(
                        f"memory sft {model} {b}x{t}, float32 against torch {how}", work="sft", ours="jax float32",
                        peer=f"torch {how}", ours_task={}, peer_task={"compile": compiled},
                        task={"batch": "memory", "hyper": HYPER_SFT, "steps": 3, "dtype": "float32"},
                        check=f"memory {model} {how}", useful=b * (t - 1), flops=(flops, flops), measure="peak_bytes",
                        **torch,
                    )
                )  # fmt: skip
    if "rewards" in what:
        b, w = shapes[models[0]].rewards
        for how, terms in (("ROUGE-1/2/L, BLEU", ["rouge1", "rouge2", "rouge_l", "bleu"]), ("ROUGE-L", ["rouge_l"])):
            rows.append(
                Row(
                    f"rewards {b}x{w}, {how}", work="rewards", model=models[0], ours="jax", peer="rouge-score, nltk",
                    script="benchmark_loop.py", task={"batch": "rewards", "terms": terms}, ours_task={}, peer_task={},
                    check=f"rewards {how}", useful=0, flops=(0.0, 0.0),
                )
            )  # fmt: skip
    return [row._replace(products=()) for row in rows] if quick else rows


def make_batch(name: str, size: Size, shape: Shapes) -> dict[str, np.ndarray]:
    """Random, from a fixed seed: what both sides read."""
    random = np.random.default_rng(0)
    if name in ("sft", "replies", "memory", "long"):
        tokens = random.integers(0, size.vocabulary, getattr(shape, name, shape.sft)).astype(np.int32)
        mask = np.ones(tokens.shape, bool)
        loss_mask = mask.copy()
        first = tokens.shape[1] - tokens.shape[1] // 4 if name == "replies" else 1
        loss_mask[:, :first] = False  # as batching.unsupervised: nothing comes before the first
        return {"tokens": tokens, "attention_mask": mask, "loss_mask": loss_mask}
    if name in ("generate", "ppo"):
        b, p = shape.generate[:2] if name == "generate" else shape.ppo[:2]
        table = random.normal(size=size.vocabulary).astype(np.float32)
        return {"tokens": random.integers(0, size.vocabulary, (b, p)).astype(np.int32), "table": table}
    assert name == "rewards"
    b, w = shape.rewards
    arrays: dict[str, np.ndarray] = {}
    for side in ("hyp", "ref"):  # common words are common: some overlap, as replies have
        arrays[side] = random.zipf(1.5, (b, w)).clip(1, 5000).astype(np.int32)
        arrays[f"{side}_mask"] = np.arange(w) < random.integers(w // 4, w + 1, (b, 1))
    return arrays
