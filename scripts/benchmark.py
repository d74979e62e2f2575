"""How fast, against torch and TRL: the same weights, the same batches, the same work, on this machine.

    python scripts/benchmark.py --what sft,generate,ppo --model nano,gpt2 --compare torch,trl --out bench.json

Each side of a row is a process of its own (benchmark_jax.py; benchmark_torch.py or benchmark_loop.py), and only one works
at a time. First both show that they compute the same: losses, gradients, greedy tokens, PPO losses. What does not agree is
not timed, and the exit code is 1. Then they are timed in turn, A B A B, each once uncounted, and a row tells the medians and
how far the ratios of the pairs lie apart. Written: OUT, and the ratios as a picture beside it (.png).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from therapy_jax import run
from therapy_jax.run import console, escape

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "data" / "bench_baseline.json"
WORKS = ("sft", "generate", "ppo", "rewards", "startup", "memory")
PEERS = ("torch", "trl")
KEPT_SHARE = 0.6  # of the kept ratio; --quick fails below it. Two cores shared with others are that noisy
# glibc's malloc hands freed memory back and faults it in again at the next step; with these it keeps it, in huge pages.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "99999999999",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
HYPER_SFT = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}
HYPER_PPO = {
    "learning_rate": 1e-4, "kl_coef": 0.05, "clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "gamma": 1.0, "lam": 0.95,
    "temperature": 0.7,
}  # fmt: skip


class BenchmarkError(Exception):
    """What keeps the benchmark, or one row of it, from being run; one sentence."""


# ---- sizes and shapes


class Size(NamedTuple):
    """Of a model: L layers, D width, H heads, V words in the vocabulary."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50_257


class Shapes(NamedTuple):
    """Of the work: B sequences or prompts, T tokens each, P of a prompt, R of a reply."""

    sft: tuple[int, int]  # B, T
    generate: tuple[int, int, int]  # B, P, R
    ppo: tuple[int, int, int, int, int]  # B, P, R, epochs, minibatches
    memory: tuple[int, int]  # B, T
    rewards: tuple[int, int] = (256, 64)  # replies, words at most


SIZES = {"nano": Size(4, 128, 4), "gpt2": Size(12, 768, 12)}
SHAPES = {
    "nano": Shapes(sft=(16, 128), generate=(32, 64, 64), ppo=(32, 64, 48, 4, 4), memory=(8, 512)),
    "gpt2": Shapes(sft=(8, 128), generate=(32, 64, 64), ppo=(32, 64, 48, 4, 4), memory=(8, 512)),
}
QUICK_SHAPES = Shapes(sft=(8, 64), generate=(8, 32, 32), ppo=(8, 32, 16, 2, 2), memory=(4, 128))
TINY = Size(2, 64, 2, 1000), Shapes(  # --sizes tiny: every model is this one, to try the whole thing in a minute
    sft=(4, 32), generate=(4, 8, 8), ppo=(8, 8, 8, 2, 2), memory=(4, 32), rewards=(16, 12)
)  # fmt: skip


# ---- what the work costs: the same count for both sides of a row, whatever each of them does beyond it


def forward_flops(size: Size, tokens: int, seen: int, predicted: int) -> float:
    """FLOPs of one forward pass. A multiply-add is two, and nothing but matrix products counts.

    A block has 12 D^2 weights in its matrices (query, key, value and output: 4 D^2; the MLP of width 4 D: 8 D^2), each used
    once a token: 2 * 12 L D^2 a token. Attention takes two products of length D for each pair of a token and a place that
    it sees (q k, and weights v): 4 L D a pair; `seen` is the number of pairs. The head is used where something is
    predicted: 2 V D each.
    """
    blocks = 2 * 12 * size.layers * size.width**2 * tokens
    pairs = 4 * size.layers * size.width * seen
    return float(blocks + pairs + 2 * size.vocabulary * size.width * predicted)


def training_flops(size: Size, batch: int, length: int) -> float:
    """One SFT step. The backward pass makes two products for each of the forward one: 3 times the forward pass, which is
    6 (12 L D^2 + V D) tokens + 12 L T D tokens. Every pair of places counts, though causal attention needs half of them:
    that is how the utilisation of training is usually stated."""
    tokens = batch * length
    return 3 * forward_flops(size, tokens, tokens * length, tokens)


def generation_flops(size: Size, batch: int, prompt: int, new: int) -> float:
    """P prompt tokens at once, then each new one but the last, with all places before it in a cache."""
    decoded = sum(prompt + i for i in range(1, new))
    return batch * forward_flops(size, prompt + new - 1, prompt * prompt + decoded, new)


def ppo_flops(size: Size, batch: int, prompt: int, new: int, epochs: int, separate_critic: bool) -> float:
    """Generation, the reference's and the critic's reading of prompt and reply, and `epochs` passes of training. The old
    log-probs come with the sampled tokens and cost nothing more. A critic on the policy's own hidden states is free."""
    tokens = prompt + new
    policy = forward_flops(size, tokens, tokens * tokens, new)
    critic = forward_flops(size, tokens, tokens * tokens, 0) if separate_critic else 0.0
    return generation_flops(size, batch, prompt, new) + batch * (policy + critic + 3 * epochs * (policy + critic))


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


def make_rows(
    what: Sequence[str], models: Sequence[str], sizes: Mapping[str, Size], shapes: Mapping[str, Shapes], quick: bool
) -> list[Row]:
    """Every row that the command line asks for. `startup` is none: see `measure_startup`.

    A row of another kind of work is a block here, a `prepare_*` in each worker and a line in `make_batch`. The next one is
    `conversations`, ours packed against torch padded: benchmark_torch.prepare_conversations is ready for it.
    """
    rows: list[Row] = []
    for model in models:
        size, shape = sizes[model], shapes[model]
        torch = {"script": "benchmark_torch.py", "model": model}
        if "sft" in what:
            b, t = shape.sft
            same = {"batch": "sft", "hyper": HYPER_SFT, "steps": 3}
            flops, useful = training_flops(size, b, t), b * (t - 1)
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
                        check=f"sft {model} {dtype} {how}", useful=useful, flops=(flops, flops), **torch,
                    )
                )  # fmt: skip
        if "generate" in what:
            b, p, r = shape.generate
            flops = generation_flops(size, b, p, r)
            for how, top_k in [("greedy", 0)] if quick else [("greedy", 0), ("top-k 50", 50)]:
                task = {"batch": "generate", "dtype": "float32", "new_tokens": r, "top_k": top_k}
                rows.append(
                    Row(
                        f"generate {model} {b}x{p}+{r}, {how}", work="generate", ours="jax float32", peer="torch generate",
                        task=task, ours_task={}, peer_task={}, check=f"generate {model}", useful=b * r,
                        flops=(flops, flops), **torch,
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
                        peer_task={}, check=f"ppo {model}", useful=b * r, flops=(count, separate), **torch,
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
    return rows


def make_batch(name: str, size: Size, shape: Shapes) -> dict[str, np.ndarray]:
    """Random, from a fixed seed: what both sides read."""
    random = np.random.default_rng(0)
    if name in ("sft", "memory"):
        tokens = random.integers(0, size.vocabulary, shape.sft if name == "sft" else shape.memory).astype(np.int32)
        mask = np.ones(tokens.shape, bool)
        loss_mask = mask.copy()
        loss_mask[:, 0] = False  # as batching.unsupervised: nothing comes before the first
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


# ---- agreement


class Check(NamedTuple):
    row: str
    quantity: str
    gap: float
    tolerance: float
    agrees: bool


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest |ours - theirs|, as a share of the largest |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def absolute(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf


def differing_replies(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of the rows that are not equal throughout: one near tie between two tokens changes all that follows it."""
    return float((ours != theirs).any(1).mean()) if ours.shape == theirs.shape else math.inf


def distance(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], prefix: str) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors named prefix/..., which must be the same ones on both sides."""
    names = sorted(name for name in theirs if name.startswith(f"{prefix}/"))
    if names != sorted(name for name in ours if name.startswith(f"{prefix}/")) or not names:
        return math.inf
    apart = sum(float(np.square(np.float64(ours[n]) - theirs[n]).sum()) for n in names)
    whole = sum(float(np.square(np.float64(theirs[n])).sum()) for n in names)
    return math.sqrt(apart / max(whole, 1e-60))


def compare(row: str, work: str, dtype: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Check]:
    """What both sides wrote, quantity by quantity. NaN agrees with nothing."""
    exact = dtype == "float32"
    if work in ("sft", "conversations"):
        found = [("losses", relative(ours["losses"], theirs["losses"]), 1e-4 if exact else 1e-2)]
        if work == "sft":
            found.append(("gradient", distance(ours, theirs, "grad"), 1e-3 if exact else 5e-2))
    elif work == "generate":
        found = [("replies that differ", differing_replies(ours["tokens"], theirs["tokens"]), 0.1)]
    elif work == "rewards":
        found = [("values", absolute(ours["rewards"], theirs["rewards"]), 1e-5)]
    else:
        assert work == "ppo"
        # TRL whitens with the unbiased variance, n - 1 in the place of n: its advantages are smaller by sqrt((n - 1) / n),
        # and Adam makes the step nearly the same again. Its entropy is the mean over the epochs, ours from before them; its
        # approximate KL is half the square of the log-ratio, ours k3, the same to second order.
        whitening = 0.5 / ours["tokens"][0].size
        found = [
            ("score", relative(ours["score"], theirs["score"]), 1e-5),
            ("surprise of the replies", relative(ours["surprise"], theirs["surprise"]), 1e-4),
            ("entropy", relative(ours["entropy"], theirs["entropy"]), 1e-2),
            ("KL to the reference", relative(ours["kl"], theirs["kl"]), 1e-2 + whitening),
            ("policy loss", relative(ours["policy_loss"], theirs["policy_loss"]), 1e-2 + whitening),
            ("value loss", relative(ours["value_loss"], theirs["value_loss"]), 1e-2),
            ("KL of the update", relative(ours["update_kl"], theirs["update_kl"]), 5e-2),
            ("change of the policy", distance(ours, theirs, "change"), 5e-2),
        ]
    return [Check(row, name, gap, tolerance, bool(gap <= tolerance)) for name, gap, tolerance in found]


# ---- arithmetic


def ratio_and_spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """-> (median, smallest, largest) of theirs / ours over the pairs; above 1 we are faster, or smaller."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def against_baseline(
    now: Mapping[str, float], kept: Mapping[str, float]
) -> list[tuple[str, float, float | None, bool]]:
    """-> (row, ratio now, ratio kept or None, good enough). Only ratios are compared, never seconds: those are the
    machine's. A row that was not kept before cannot fail."""
    return [(name, now[name], kept.get(name), now[name] >= KEPT_SHARE * kept.get(name, 0.0)) for name in now]


# ---- workers

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def start_worker(python: str, script: str, threads: int, environment: Mapping[str, str]) -> Iterator[Ask]:
    """A worker process for as long as the block lasts. Yields ask(question) -> answer; BenchmarkError where it ends
    instead, with the last line that it said."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        command = [python, str(ROOT / "scripts" / script), "--threads", str(threads)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment)
            )
        except OSError as error:
            raise BenchmarkError(f"{python} cannot be started ({error.strerror})") from error
        assert process.stdin is not None and process.stdout is not None
        asking, answers = process.stdin, process.stdout

        def ask(question: dict[str, Any]) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                asking.write(json.dumps(question) + "\n")
                asking.flush()
            if line := answers.readline():
                return json.loads(line)
            process.wait()
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            raise BenchmarkError(f"{script}: {said[-1] if said else f'ended with code {process.returncode}'}")

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                asking.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            answers.close()


class Settings(NamedTuple):
    """What holds for the whole benchmark."""

    folder: Path  # models, batches and what the sides must agree on
    python: str  # of the peers
    threads: int
    repeats: int  # pairs
    seconds: float  # least time of one run: short steps are repeated until they fill it
    malloc: dict[str, str]

    def worker(self, script: str, row: str = "") -> contextlib.AbstractContextManager[Ask]:
        """A compilation cache of its own for each row: what compiling costs is what it costs the first time."""
        ours = script != "benchmark_torch.py"
        environment = {
            **{k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
            **self.malloc,
            "OMP_NUM_THREADS": str(self.threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU has to hold both sides
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor" / row.replace(" ", "_").replace("/", "_")),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if ours:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return start_worker(sys.executable if ours else self.python, script, self.threads, environment)


def write_inputs(settings: Settings, sizes: Mapping[str, Size], shapes: Mapping[str, Shapes]) -> None:
    """folder/MODEL, which both sides load, and folder/MODEL.WORK.npz, the batches."""
    for model, size in sizes.items():
        positions = max(sum(shapes[model].generate[1:]), sum(shapes[model].ppo[1:3]), shapes[model].memory[1])
        config = {
            "vocab_size": size.vocabulary,
            "n_positions": max(1024, positions) if size.width > TINY[0].width else 2 * positions,
            "n_embd": size.width,
            "n_layer": size.layers,
            "n_head": size.heads,
            "eos_token_id": size.vocabulary - 1,
        }
        with settings.worker("benchmark_jax.py") as ask:
            ask({"do": "prepare", "work": "export", "folder": str(settings.folder / model), "sizes": config})
        for work in ("sft", "memory", "generate", "ppo", "rewards"):
            arrays: dict[str, Any] = dict(make_batch(work, size, shapes[model]))
            np.savez(settings.folder / f"{model}.{work}.npz", **arrays)


# ---- measuring


def prepare(row: Row, ask: Ask, settings: Settings, side: str, check: bool, **more: Any) -> dict[str, Any]:
    task = {
        "do": "prepare",
        "work": row.work,
        "check": check,
        **row.task,
        **more,
        "folder": str(settings.folder / row.model),
        "batch": str(settings.folder / f"{row.model}.{row.task['batch']}.npz"),
        "agree": str(settings.folder / f"agree.{side}.npz"),
        "ours": str(settings.folder / "agree.ours.npz"),
    }
    return ask(task)


def measure(row: Row, settings: Settings, known: dict[str, list[Check]], timed: bool) -> dict[str, Any]:
    """Both sides of a row: prepared one after the other, compared, and if they agree timed in turn -> what the JSON keeps.
    `known`: the checks made so far, by Row.check."""
    check = row.check not in known
    result: dict[str, Any] = {"name": row.name, "model": row.model, "sides": [row.ours, row.peer], "state": "timed"}
    with settings.worker("benchmark_jax.py", row.name) as ours, settings.worker(row.script, row.name) as theirs:
        sides = (ours, theirs)
        first = prepare(row, ours, settings, "ours", check, **row.ours_task)
        second = prepare(row, theirs, settings, "peer", check, **row.peer_task)
        if check:
            with (
                np.load(settings.folder / "agree.ours.npz", allow_pickle=False) as a,
                np.load(settings.folder / "agree.peer.npz", allow_pickle=False) as b,
            ):
                known[row.check] = compare(row.name, row.work, row.task.get("dtype", "float32"), a, b)
            show_checks(known[row.check])
        result["agreement"] = [c._asdict() for c in known[row.check]]
        if not all(c.agrees for c in known[row.check]):
            return result | {"state": "not timed: the two sides do not agree"}
        if not timed:
            return result | {"state": "agrees"}

        # One uncounted run each; then as many steps a run as fill the time, the same number on both sides.
        warm = [ask({"do": "run", "times": 1})["seconds"] for ask in sides]
        times = max(1, math.ceil(settings.seconds / statistics.mean(warm)))
        seconds: list[list[float]] = [[], []]
        for _ in range(settings.repeats):
            for ask, taken in zip(sides, seconds, strict=True):
                taken.append(ask({"do": "run", "times": times})["seconds"] / times)
        peaks = [ask({"do": "memory"})["peak_bytes"] for ask in sides]

    medians = [statistics.median(taken) for taken in seconds]
    ratio = ratio_and_spread(*seconds)
    if row.measure == "peak_bytes":
        if None in peaks:
            return result | {"state": "not measured: this system does not tell peak memory"}
        ratio = (peaks[1] / peaks[0],) * 3
    return result | {
        "measure": row.measure,
        "seconds": medians,
        "all_seconds": seconds,
        "steps_a_run": times,
        "ratio": ratio[0],
        "spread": ratio[1:],
        "tokens_per_second": [row.useful / s for s in medians] if row.useful else None,
        "flops": row.flops,
        "flops_per_second": [f / s for f, s in zip(row.flops, medians, strict=True)] if row.useful else None,
        "dtype": row.task.get("dtype"),
        "peak_bytes": peaks,
        "first_call_seconds": [first["compile_seconds"], second["compile_seconds"]],
    }


def measure_peak(settings: Settings, size: int) -> dict[str, float]:
    """{dtype: FLOP/s} of a large square product: the higher of what jax and torch reach, each alone."""
    best: dict[str, float] = {}
    for script in ("benchmark_jax.py", "benchmark_torch.py"):
        with settings.worker(script) as ask:
            for dtype in ("float32", "bfloat16"):
                best[dtype] = max(best.get(dtype, 0.0), ask({"do": "multiply", "size": size, "dtype": dtype})["flops"])
    return best


def measure_startup(settings: Settings) -> dict[str, Any]:
    """scripts/train_ppo.py from its launch until metrics.jsonl has the line of iteration 1: with an empty compilation
    cache, then again with the cache that this start has filled. What both need (the SFT model, the classifiers) is made
    before. A process a start; the ratio is empty / filled."""
    run_dir = settings.folder / "startup"
    log = run_dir / "metrics.jsonl"
    small = {"pretrain.epochs": 1, "sft.epochs": 1, "classifiers.epochs": 2, "ppo.iterations": 4, "run_dir": run_dir}
    flags = [part for name, value in small.items() for part in (f"--{name}", str(value))]

    def launch(script: str, cache: str) -> subprocess.Popen:
        command = [sys.executable, f"scripts/{script}.py", "--config", "configs/quickstart.yaml", *flags]
        command += ["--compilation_cache", str(settings.folder / cache)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def seconds_to_first_iteration(cache: str) -> float:
        shutil.rmtree(run_dir / "ppo", ignore_errors=True)
        run.forget_after(log, "ppo", -1)
        began = time.perf_counter()
        process = launch("train_ppo", cache)
        try:
            while not run.logged(run_dir, "ppo", 1):
                if process.poll() is not None:
                    raise BenchmarkError(
                        f"train_ppo.py ended with code {process.returncode} before its first iteration"
                    )
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()

    if launch("train_sft", "cache.before").wait() != 0:
        raise BenchmarkError("train_sft.py failed, so there is no model that PPO could start from")
    seconds_to_first_iteration("cache.before")  # trains the classifiers
    pairs = [
        (seconds_to_first_iteration(f"cache.{i}"), seconds_to_first_iteration(f"cache.{i}"))
        for i in range(settings.repeats)
    ]
    empty, filled = ([pair[i] for pair in pairs] for i in (0, 1))
    ratio, *spread = ratio_and_spread(filled, empty)
    return {
        "name": "startup, train_ppo.py until iteration 1",
        "model": "quickstart",
        "sides": ["filled cache", "empty cache"],
        "state": "timed",
        "measure": "seconds",
        "agreement": [],
        "seconds": [statistics.median(filled), statistics.median(empty)],
        "all_seconds": [filled, empty],
        "ratio": ratio,
        "spread": spread,
    }


# ---- scaling


def measure_scaling(settings: Settings, size: Size, shape: Shapes) -> list[dict[str, Any]]:
    """Our seconds and peak memory of an SFT step, a generation and a PPO iteration, against batch and against length: half,
    once, twice and four times the usual one. A process a point, so that no point inherits another's memory."""
    points = []
    for work in ("sft", "generate", "ppo"):
        for axis in ("batch", "length"):
            for factor in (0.5, 1, 2, 4):
                grown = list(getattr(shape, work))
                i = 0 if axis == "batch" else (1 if work == "sft" else 2)  # of a reply: its length
                grown[i] = int(grown[i] * factor)
                scaled = shape._replace(**{work: tuple(grown)})
                model = f"scaling.{work}.{axis}.{factor}"
                write_inputs(settings, {model: size}, {model: scaled})
                rows = make_rows([work], [model], {model: size}, {model: scaled}, quick=True)
                row = rows[0]
                ours = {**row.ours_task, **({"value_head": "shared"} if work == "ppo" else {})}
                with settings.worker("benchmark_jax.py") as ask:
                    prepare(row, ask, settings, "ours", False, **ours)
                    seconds = [ask({"do": "run", "times": 1})["seconds"] for _ in range(1 + settings.repeats)][1:]
                    peak = ask({"do": "memory"})["peak_bytes"]
                shutil.rmtree(settings.folder / model)
                point = {"work": work, "axis": axis, "value": grown[i], "shape": grown}
                points.append({**point, "seconds": statistics.median(seconds), "peak_bytes": peak})
                memory = "" if peak is None else f", {peak / 2**20:,.0f} MiB"
                console.print(f"scaling {work}, {axis} {grown[i]}: {points[-1]['seconds']:.4g} s{memory}")
    return points


def plot_scaling(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds and memory of each work over batch and over length, log-log, beside the line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    works = ("sft", "generate", "ppo")
    columns = [(axis, what) for axis in ("batch", "length") for what in ("seconds", "peak_bytes")]
    figure, panels = plt.subplots(len(works), len(columns), figsize=(14, 9), squeeze=False, layout="constrained")
    for line, work in zip(panels, works, strict=True):
        for panel, (axis, what) in zip(line, columns, strict=True):
            found = [(p["value"], p[what]) for p in points if p["work"] == work and p["axis"] == axis and p[what]]
            if not found:
                continue
            x, y = (np.asarray(values, float) for values in zip(*found, strict=True))
            y = y / 2**20 if what == "peak_bytes" else y
            panel.loglog(x, y, "o-", label="measured")
            panel.loglog(x, y[0] * x / x[0], "--", color="grey", label="ideal: in proportion")
            panel.set(xlabel=axis, ylabel="peak memory, MiB" if what == "peak_bytes" else "seconds", title=work)
            panel.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            panel.minorticks_off()
    panels[0][0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- report


def show_checks(checks: Sequence[Check]) -> None:
    for c in checks:
        said = "[green]agrees[/]" if c.agrees else "[bold red]DISAGREES[/]"
        console.print(f"{said}  {escape(c.row)}: {c.quantity}, gap {c.gap:.2g}, tolerance {c.tolerance:.2g}")


def table_of(results: Sequence[Mapping[str, Any]], peak: Mapping[str, float]) -> Table:
    """Two lines a row: ours, theirs."""
    table = Table(title="ours / theirs; ratio above 1: ours is faster (memory: smaller)", show_lines=True)
    for name in ("row", "side", "seconds", "tokens/s", "GFLOP/s", "of peak", "memory", "first call", "ratio"):
        table.add_column(name, justify="left" if name in ("row", "side") else "right")
    for r in results:
        sides = "\n".join(map(escape, r["sides"]))
        if "ratio" not in r:
            table.add_row(escape(r["name"]), sides, escape(r["state"]))
            continue

        def lines(values: Any, form: Callable[[Any], str]) -> str:
            return "\n".join("" if value is None else form(value) for value in values or ())

        rate, top = r.get("flops_per_second"), peak.get(r.get("dtype") or "", 0.0)
        low, high = r["spread"]
        table.add_row(
            escape(r["name"]),
            sides,
            lines(r["seconds"], "{:.4g}".format),
            lines(r.get("tokens_per_second"), "{:,.0f}".format),
            lines(rate, lambda x: f"{x / 1e9:,.1f}"),
            lines([x / top for x in rate] if rate and top else None, "{:.0%}".format),
            lines(r.get("peak_bytes"), lambda x: f"{x / 2**20:,.0f} MiB"),
            lines(r.get("first_call_seconds"), "{:.1f} s".format),
            f"[bold]{r['ratio']:.2f}[/]\n{low:.2f}..{high:.2f}",
        )
    return table


def plot_ratios(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The ratio of each row, with the range over its pairs; the line at 1 is as fast as the peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [r for r in results if "ratio" in r][::-1]
    if not found:
        return
    figure, panel = plt.subplots(figsize=(10, 1 + 0.45 * len(found)), layout="constrained")
    ratios = [r["ratio"] for r in found]
    ranges = [[r["ratio"] - r["spread"][0] for r in found], [r["spread"][1] - r["ratio"] for r in found]]
    panel.barh([r["name"] for r in found], ratios, xerr=np.maximum(ranges, 0.0), color="tab:blue", alpha=0.8)
    panel.axvline(1.0, color="black", linewidth=1)
    panel.set(xscale="log", xlabel="theirs / ours (above 1: ours is faster, or smaller)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def hardware(settings: Settings, peers: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure means nothing without."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "python": platform.python_version(),
        "system": platform.platform(),
        "workers": dict(peers),
        "commit": run.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "malloc": settings.malloc or "default",
        "repeats": settings.repeats,
    }


def threads_here() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            asked = [name for name in text.split(",") if name]
            if unknown := [name for name in asked if name not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
            return asked

        return read

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    everything = ",".join(WORKS)
    parser.add_argument("--what", type=names((*WORKS, "agree")), help=f"of {everything}; agree: the checks alone")
    parser.add_argument(
        "--model", type=names(tuple(SIZES)), default=["nano"], help="nano, gpt2 (ppo: nano alone by default)"
    )
    parser.add_argument("--compare", type=names(PEERS), default=list(PEERS), help="torch, trl")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON; a picture is written beside it")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--seconds", type=float, default=0.5, help="least seconds of a run")
    parser.add_argument("--threads", type=int, default=threads_here(), help="of each side")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="keep: " + " ".join(MALLOC))
    parser.add_argument("--torch_python", default=sys.executable, help="the Python that torch and trl are installed in")
    parser.add_argument("--ppo_model", type=names(tuple(SIZES)), default=["nano"], help="models of the ppo rows")
    parser.add_argument("--sizes", choices=("tiny",), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=f"nano in small, against {BASELINE.relative_to(ROOT)}")
    parser.add_argument("--write_baseline", action="store_true", help="with --quick: keep these ratios instead")
    parser.add_argument("--scaling", action="store_true", help="ours alone, against batch and length")
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.threads < 1 or options.seconds < 0:
        parser.error("--repeats and --threads must be above 0, --seconds 0 or above")
    if options.write_baseline and not options.quick:
        parser.error("--write_baseline keeps what --quick measures; give both")
    if options.what is None:
        options.what = [] if options.scaling else list(WORKS)
        options.what = ["sft", "generate", "ppo", "rewards"] if options.quick else options.what
    for work, peer in (("ppo", "trl"), ("sft", "torch"), ("generate", "torch"), ("memory", "torch")):
        if peer not in options.compare:
            options.what = [name for name in options.what if name != work]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
            return benchmark(options, Path(folder))
    except BenchmarkError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        return 2
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def benchmark(options: argparse.Namespace, folder: Path) -> int:
    malloc = MALLOC if options.malloc == "keep" and sys.platform == "linux" else {}
    repeats, seconds = (3, 0.3) if options.quick else (options.repeats, options.seconds)
    settings = Settings(folder, options.torch_python, options.threads, repeats, seconds, dict(malloc))
    timed = options.what != ["agree"]
    what = [w for w in options.what if w != "agree"] if "agree" in options.what else options.what
    if "agree" in options.what:
        timed, what = False, what or ["sft", "generate", "ppo", "rewards"]
    models = ["nano"] if options.quick else options.model
    sizes = {name: TINY[0] if options.sizes else SIZES[name] for name in dict.fromkeys([*models, *options.ppo_model])}
    shapes = {name: TINY[1] if options.sizes else QUICK_SHAPES if options.quick else SHAPES[name] for name in sizes}
    ppo_models = ["nano"] if options.quick else options.ppo_model
    rows = make_rows([w for w in what if w != "ppo"], models, sizes, shapes, options.quick)
    rows += make_rows(["ppo"] if "ppo" in what else [], ppo_models, sizes, shapes, options.quick)

    workers: dict[str, Any] = {}
    for script in dict.fromkeys(["benchmark_jax.py", *(row.script for row in rows)]):
        with settings.worker(script) as ask:
            workers[script] = ask({"do": "hello"})
    theirs = workers.get("benchmark_torch.py", {}).get("versions", {})
    if any(row.work == "ppo" for row in rows) and "trl" not in theirs:
        raise BenchmarkError(
            "trl is not installed in the peers' Python; install the extra `bench`, or leave out --compare trl"
        )
    report: dict[str, Any] = {"hardware": hardware(settings, workers), "hyper": {"sft": HYPER_SFT, "ppo": HYPER_PPO}}
    console.print(
        f"{report['hardware']['cpu']}: {settings.threads} threads a side; malloc: {settings.malloc or 'default'}"
    )
    for script, said in workers.items():
        console.print(f"{script}: {said['device']}, {', '.join(f'{k} {v}' for k, v in said['versions'].items())}")

    peak: dict[str, float] = {}
    if timed and "benchmark_torch.py" in workers:
        on_cpu = workers["benchmark_jax.py"]["device"] == "cpu"
        peak = measure_peak(settings, 256 if options.sizes else 2048 if on_cpu else 8192)
        told = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in peak.items())
        console.print(f"peak of a square product: {told}")
    write_inputs(settings, {row.model: sizes[row.model] for row in rows}, shapes)

    known: dict[str, list[Check]] = {}
    results = []
    for row in rows:
        try:
            results.append(measure(row, settings, known, timed))
        except BenchmarkError as error:
            results.append({"name": row.name, "sides": [row.ours, row.peer], "state": f"failed: {error}"})
        console.print(f"{escape(row.name)}: {escape(results[-1]['state'])}")
    if timed and "startup" in what:
        results.append(measure_startup(settings))
    report |= {"peak": peak, "rows": results}
    if options.scaling:
        report["scaling"] = measure_scaling(settings, sizes[models[0]], shapes[models[0]])
        plot_scaling(report["scaling"], options.out.with_suffix(".scaling.png"))
    if timed and results:
        console.print(table_of(results, peak), width=max(console.width, 160))  # a log has no width of its own
    try:
        run.write_json(options.out, report)
        plot_ratios(results, options.out.with_suffix(".png"))
    except OSError as error:
        raise BenchmarkError(f"{options.out} cannot be written ({error.strerror})") from error
    failed = [r for r in results if r["state"] not in ("timed", "agrees")]
    for r in failed:
        console.print(f"[bold red]{escape(r['name'])}[/]: {escape(r['state'])}")
    good = judge_quick(options, results, report["hardware"]) if options.quick and timed else True
    return 0 if good and not failed else 1


def judge_quick(options: argparse.Namespace, results: Sequence[Mapping[str, Any]], made_on: Mapping[str, Any]) -> bool:
    """Prints each ratio beside the kept one; False where one has fallen below 60 % of it. With --write_baseline keeps them."""
    now = {r["name"]: r["ratio"] for r in results if "ratio" in r}
    if options.write_baseline:
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        where = {name: made_on[name] for name in ("cpu", "cores", "threads", "commit", "date")}
        run.write_json(BASELINE, {"made_on": where, "ratios": {name: round(ratio, 3) for name, ratio in now.items()}})
        console.print(f"kept in {BASELINE.relative_to(ROOT)}")
        return True
    if not BASELINE.is_file():
        console.print(f"{BASELINE.relative_to(ROOT)} is not there yet; --quick --write_baseline makes it")
        return True
    compared = against_baseline(now, json.loads(BASELINE.read_text(encoding="utf-8"))["ratios"])
    for name, ratio, kept, good in compared:
        before = "not kept before" if kept is None else f"kept {kept:.2f}, {ratio / kept:.0%} of it"
        console.print(f"{'[green]ok[/]  ' if good else '[bold red]SLOW[/]'} {escape(name)}: {ratio:.2f}; {before}")
    return all(good for *_, good in compared)


if __name__ == "__main__":
    sys.exit(main())
