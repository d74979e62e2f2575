"""The peers: Hugging Face's GPT-2 in torch, and TRL's PPOTrainer. A worker of scripts/benchmark.py; benchmark_worker.py
says how they talk. Neither jax nor therapy_jax here: this may run in a Python of its own.

Each peer at its best: fused AdamW, gradients set to None, no attention mask where nothing is padded (attention then takes
its fastest path), no cache in training, inference mode in generation.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import benchmark_worker as worker
import numpy as np

try:
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"{error.name} is not installed in this Python; install the extra `bench`, or give --torch_python")

THREADS = worker.threads_asked()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(THREADS)


def hello() -> worker.Json:
    versions = {}
    for name in ("torch", "transformers", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kind = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    return {"versions": versions, "device": DEVICE.type, "device_kind": kind, "threads": torch.get_num_threads()}


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def load_model(task: worker.Json) -> Any:
    """The model that both sides start from: float32, dropout 0 (its config.json says so)."""
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(task["folder"])
    return model.to(DEVICE).train()


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def numpy(x: torch.Tensor) -> np.ndarray:
    """A copy: what is shared with a parameter or a gradient changes with the next step."""
    return x.detach().float().cpu().numpy().copy()


def named(model: Any) -> dict[str, torch.Tensor]:
    """Parameters under the names that the file has; the head is the embedding and counts once."""
    return {name: p for name, p in model.named_parameters() if name != "lm_head.weight"}


def first_call(program: Callable[[], Any]) -> tuple[Any, float]:
    """-> (its result, seconds of the first call, compiling included)."""
    synchronise()
    began = time.perf_counter()
    result = program()
    synchronise()
    return result, time.perf_counter() - began


def trainer_of(task: worker.Json, model: Any) -> tuple[Callable[..., torch.Tensor], Callable[[], None]]:
    """-> (loss of a batch, as Hugging Face computes it: labels of -100 do not count; the optimizer step after backward).
    With task["compile"] the loss and its gradient are compiled; with dtype bfloat16 they run under autocast."""
    hyper = task["hyper"]

    def loss_of(tokens: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=task["dtype"] == "bfloat16"):
            return model(input_ids=tokens, attention_mask=attention_mask, labels=labels, use_cache=False).loss

    # Decay on matrices and embeddings only, as ours.
    plain = [p for name, p in named(model).items() if name.endswith(".bias") or ".ln_" in name]
    decayed = [p for name, p in named(model).items() if not (name.endswith(".bias") or ".ln_" in name)]
    groups = [
        {"params": decayed, "weight_decay": hyper["weight_decay"]},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=hyper["learning_rate"], betas=(0.9, 0.999), eps=1e-8, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(decayed + plain, hyper["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return torch.compile(loss_of) if task["compile"] else loss_of, update


def prepare_sft(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """agree: losses of the first steps, grad/NAME of the first, change/NAME after all; see benchmark_jax.prepare_sft."""
    model = load_model(task)
    before = {name: numpy(p) for name, p in named(model).items()} if task["check"] else {}
    arrays = worker.load(task["batch"])
    tokens = tensor(arrays["tokens"].astype(np.int64))
    labels = tensor(np.where(arrays["loss_mask"], arrays["tokens"], -100).astype(np.int64))
    mask = None if arrays["attention_mask"].all() else tensor(arrays["attention_mask"].astype(np.int64))
    loss_of, update = trainer_of(task, model)

    def backward() -> torch.Tensor:
        loss = loss_of(tokens, mask, labels)
        loss.backward()
        return loss.detach()

    def step() -> torch.Tensor:
        loss = backward()
        update()
        return loss

    loss, seconds = first_call(backward)
    gradients = {}
    if task["check"]:
        gradients = {f"grad/{name}": numpy(p.grad) for name, p in named(model).items() if p.grad is not None}
    seconds += first_call(update)[1]
    if task["check"]:
        losses = [float(loss)] + [float(step()) for _ in range(task["steps"] - 1)]
        change = {f"change/{name}": numpy(p) - before[name] for name, p in named(model).items()}
        worker.save(task["agree"], gradients | change | {"losses": losses})
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(step)


def prepare_conversations(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """SFT on a list of padded batches, one example an exchange: tokens_I, attention_mask_I, labels_I for I = 0, 1, ... in
    the .npz, each [B, T] with a T of its own. A run steps through the whole list. agree: loss, nats per supervised token
    of the list, before any step, and grad/NAME, its gradient."""
    model = load_model(task)
    arrays = worker.load(task["batch"])
    names = ("tokens", "attention_mask", "labels")
    count = sum(name.startswith("tokens_") for name in arrays)
    batches = [[tensor(arrays[f"{name}_{i}"].astype(np.int64)) for name in names] for i in range(count)]
    loss_of, update = trainer_of(task, model)
    if task["check"]:
        counted = [int((labels[:, 1:] != -100).sum()) for _, _, labels in batches]
        total = 0.0
        for batch, n in zip(batches, counted, strict=True):
            loss = loss_of(*batch) * (n / sum(counted))  # the model's is the mean over the batch
            loss.backward()
            total += float(loss.detach())
        gradients = {f"grad/{name}": numpy(p.grad) for name, p in named(model).items() if p.grad is not None}
        worker.save(task["agree"], gradients | {"losses": [total]})
        model.zero_grad(set_to_none=True)
        del gradients

    def step() -> None:
        for batch in batches:
            loss_of(*batch).backward()
            update()

    _, seconds = first_call(step)
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(step)


def prepare_generate(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """agree: tokens i32[B, R], greedy, and tie f32[B]: where a reply parts from ours, by how much the logit of its token is above
    that of ours, as a share of the spread of all. Without an EOS token nothing ends early and no logits are masked to
    prevent it."""
    model = load_model(task).eval()
    tokens = tensor(worker.load(task["batch"])["tokens"].astype(np.int64))
    mask, length = torch.ones_like(tokens), task["new_tokens"]
    chosen: dict[str, Any] = {"do_sample": True, "top_k": task["top_k"]} if task["top_k"] else {"do_sample": False}
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, use_cache=True, eos_token_id=None, pad_token_id=None, **chosen
    )

    def step(**how: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=mask, **how)[:, tokens.shape[1] :]

    reply, seconds = first_call(step)
    assert reply.shape == (len(tokens), length)
    if task["check"]:
        greedy = step(do_sample=False, top_k=None)
        ours = tensor(worker.load(task["ours"])["tokens"].astype(np.int64))
        tie = np.zeros(len(tokens), np.float32)
        for i in (greedy != ours).any(1).nonzero()[:, 0].tolist():
            at = int((greedy[i] != ours[i]).nonzero()[0])
            with torch.inference_mode():
                logits = model(torch.cat((tokens[i], greedy[i, :at]))[None]).logits[0, -1]
            tie[i] = float((logits[greedy[i, at]] - logits[ours[i, at]]) / logits.std())
        worker.save(task["agree"], {"tokens": greedy.cpu().numpy().astype(np.int32), "tie": tie})
    return {"compile_seconds": seconds, "agree": task["agree"]}, worker.each(step)


def prepare_ppo(task: worker.Json) -> tuple[worker.Json, worker.Follow]:
    """TRL's PPOTrainer. agree: what it logs of two iterations on the replies that our side drew, with one minibatch a
    pass, and change/NAME, what the policy has moved by; see benchmark_jax.prepare_ppo."""
    try:
        from trl.experimental.ppo import ppo_trainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        sys.exit(f"trl's PPOTrainer cannot be had ({error}); it left TRL after 1.12: install the extra `bench`")
    arrays = worker.load(task["batch"])
    prompts = tensor(arrays["tokens"].astype(np.int64))

    if task["check"]:
        ours = worker.load(task["ours"])
        given = iter(tensor(replies.astype(np.int64)) for replies in ours["tokens"])

        @torch.no_grad()
        def replay(policy: Any, queries: Any, batch_size: int, pad: int, config: Any) -> Any:
            """In the place of TRL's batch_generation: -> (prompt + the reply that is given, its tempered logits)."""
            rows = torch.cat((prompts, next(given)), 1)
            return rows, policy(rows).logits[:, prompts.shape[1] - 1 : -1] / config.temperature

        drawing = ppo_trainer.batch_generation
        ppo_trainer.batch_generation = replay
        logs: list[dict[str, float]] = []
        policy = ppo(task, arrays, minibatches=1, updates=2, kept=logs)
        ppo_trainer.batch_generation = drawing
        names = {  # ours -> TRL's
            "score": "objective/scores",
            "kl": "objective/kl",
            "surprise": "objective/entropy",
            "entropy": "policy/entropy_avg",
            "policy_loss": "loss/policy_avg",
            "value_loss": "loss/value_avg",
            "update_kl": "policy/approxkl_avg",
        }
        agree = {name: np.asarray([line[logged] for line in logs], np.float32) for name, logged in names.items()}
        before = named(load_model(task))
        change = {f"change/{name}": numpy(p) - numpy(before[name]) for name, p in named(policy).items()}
        worker.save(task["agree"], agree | change | {"tokens": ours["tokens"]})
        del policy, before, change

    def follow(turns: Iterator[None]) -> None:
        ppo(task, arrays, minibatches=task["hyper"]["minibatches"], updates=100_000, turns=turns)

    return {"compile_seconds": None, "agree": task["agree"]}, follow


def ppo(
    task: worker.Json,
    arrays: dict[str, np.ndarray],
    *,
    minibatches: int,
    updates: int,
    kept: list[dict[str, float]] | None = None,
    turns: Iterator[None] | None = None,
) -> Any:
    """Train by TRL's own loop -> the policy. Its callbacks are the only way in: `kept` takes what it logs, `turns` stops it
    after each update until the driver asks for the next one."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

    hyper = task["hyper"]
    policy, reference = load_model(task), load_model(task).eval()
    value: Any = transformers.GPT2ForSequenceClassification.from_pretrained(task["folder"], num_labels=1)
    width, vocabulary = value.config.n_embd, value.config.vocab_size
    # Ours starts at zero and has a bias.
    value.score = torch.nn.Linear(width, 1)
    torch.nn.init.zeros_(value.score.weight)
    torch.nn.init.zeros_(value.score.bias)
    prompts = arrays["tokens"]
    batch = len(prompts)

    class Callback(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if kept is not None and "objective/kl" in logs:
                kept.append(dict(logs))

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.on_step_end(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if turns is not None and next(turns, turns) is turns:
                sys.exit(0)  # the driver has gone; the loop knows no other end

    collate: Any = lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=minibatches,
            num_ppo_epochs=hyper["epochs"],
            local_rollout_forward_batch_size=batch,
            total_episodes=batch * updates,
            num_sample_generations=0,
            response_length=task["new_tokens"],
            stop_token=None,  # every reply is full length
            temperature=hyper["temperature"],
            learning_rate=hyper["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            kl_coef=hyper["kl_coef"],
            kl_estimator="k1",
            cliprange=hyper["clip"],
            cliprange_value=hyper["value_clip"],
            vf_coef=hyper["value_coef"],
            gamma=hyper["gamma"],
            lam=hyper["lam"],
            whiten_rewards=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=DEVICE.type == "cpu",
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
        )
        # Ids are all it needs of a tokenizer; these two stand outside the vocabulary, so that no reply holds them.
        ids: Any = types.SimpleNamespace(pad_token_id=vocabulary, eos_token_id=vocabulary + 1)
        trainer = PPOTrainer(
            args=config,
            processing_class=ids,
            model=policy,
            ref_model=reference,
            reward_model=table_reward(arrays["table"]),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
            data_collator=collate,
            callbacks=[Callback()],
        )
        trainer.train()
    return policy


def table_reward(table: np.ndarray) -> Any:
    """f32[V] -> what TRL takes for a reward model: a backbone whose hidden states, [B, T, 1], are the table's entries, and
    a head that is the identity. TRL reads it at the last token of the reply."""

    class Table(torch.nn.Module):
        table: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.from_numpy(table))

        def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
            return types.SimpleNamespace(hidden_states=(self.table[input_ids][..., None],))

    model: Any = torch.nn.Module()
    model.base_model_prefix, model.backbone, model.score = "backbone", Table(), torch.nn.Identity()
    return model


def multiply(shape: tuple[int, int, int], dtype: str) -> float:
    """FLOP/s of [rows, inner] times [inner, out]."""
    rows, inner, out = shape
    x, w = (torch.randn(*size, device=DEVICE).to(getattr(torch, dtype)) for size in ((rows, inner), (inner, out)))

    def product() -> None:
        torch.matmul(x, w)
        synchronise()

    return worker.best_rate(2.0 * rows * inner * out, product)


def make_side() -> worker.Side:
    on_cpu = DEVICE.type == "cpu"
    return worker.Side(
        hello=hello,
        multiply=multiply,
        stream=None,
        works={
            "sft": prepare_sft,
            "conversations": prepare_conversations,
            "generate": prepare_generate,
            "ppo": prepare_ppo,
        },
        synchronise=synchronise,
        reset_peak=worker.reset_peak if on_cpu else torch.cuda.reset_peak_memory_stats,
        peak_bytes=worker.peak_bytes if on_cpu else torch.cuda.max_memory_allocated,
    )


if __name__ == "__main__":
    worker.serve(make_side)
