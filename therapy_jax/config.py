"""Every knob once, with its unit and its meaning.

One YAML file describes one experiment for all scripts; each script reads its part. Values are set in three layers, later
ones win: the defaults below, `--config FILE.yaml`, dotted overrides such as `--sft.learning_rate 3e-4`. A name that does
not exist or a value of the wrong type is refused, in the file and on the command line alike.

Nothing here imports jax: `--help` answers at once.

>>> Config(ppo=PPOConfig(kl_coef=0.1)).ppo.kl_coef
0.1
>>> nearest("Option 'ppo.learning_rat' is not accepted", ["ppo.learning_rate", "seed"])
'; do you mean ppo.learning_rate?'
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn


class ConfigError(ValueError):
    """A combination of settings that cannot work; the message says which, and what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class DataConfig:
    format: Literal["mesc", "empathetic", "jsonl"] = "jsonl"
    """How the file is laid out: MESC.csv, the EmpatheticDialogues folder, or our own JSON Lines."""
    path: str | None = None
    """File or folder; null = the sample that ships with the package (jsonl only)."""
    splits: str | None = None
    """`official` (MESC only), a splits.json by path, or null: the file's own, else by seed and conversation."""
    clean: bool = True
    """Mend known defects of the text; what was changed is counted and reported."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A bad row stops the run with its line number, or is counted, listed and left out."""


@dataclass(frozen=True)
class ModelConfig:
    name: str | None = None
    """A GPT-2: Hugging Face folder or hub id, or of ours a run folder, a stage of it, or a checkpoint; null = from scratch with
    the sizes below."""
    n_layer: int = 4
    """Transformer blocks (from scratch only, like the next four)."""
    n_embd: int = 128
    """Width of the residual stream; a multiple of n_head."""
    n_head: int = 4
    """Attention heads."""
    n_positions: int = 512
    """Longest sequence, in tokens, that the position table can hold."""
    dropout: float = 0.0
    """Dropout rate in pre-training and SFT, on embeddings, attention and residuals. PPO always runs without."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matrix products; auto = bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32."""
    remat: bool = False
    """Training computes each block a second time in its backward pass instead of keeping what is inside: larger batches, a
    third more work."""

    def __post_init__(self):
        for name in ("n_layer", "n_embd", "n_head", "n_positions"):
            require(getattr(self, name) > 0, f"model.{name} must be above 0, not {getattr(self, name)}")
        require(
            self.n_embd % self.n_head == 0,
            f"model.n_embd ({self.n_embd}) must be a multiple of model.n_head ({self.n_head})",
        )
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")


@dataclass(frozen=True)
class TokenizerConfig:
    name: str | None = None
    """As model.name; null = the model's own, or for a model from scratch a byte-level BPE trained here."""
    vocab_size: int = 2048
    """Size of the BPE when it is trained here, in tokens, before the prompt's special tokens are added."""

    def __post_init__(self):
        require(self.vocab_size > 256, f"tokenizer.vocab_size must be above 256 (the bytes), not {self.vocab_size}")


@dataclass(frozen=True)
class PromptConfig:
    format: Literal["utterance", "context", "emotion", "context_emotion"] = "context_emotion"
    """What the model sees beside the client's utterance: nothing, earlier turns, the client's emotion, or both."""
    emotion: Literal["given", "inferred"] = "given"
    """The client's emotion is read from the annotation, or written by the model itself before it answers."""
    max_tokens: int = 128
    """Longest prompt, in tokens: the oldest whole context turns go first, the client's utterance never."""

    def __post_init__(self):
        require(self.max_tokens > 0, f"prompt.max_tokens must be above 0, not {self.max_tokens}")
        require(
            self.emotion == "given" or "emotion" in self.format,
            f"prompt.emotion: inferred needs a format with emotion, not prompt.format: {self.format}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """One supervised stage: AdamW with linear warm-up and decay."""

    epochs: float = 3.0
    """Passes over the training split (fractions allowed)."""
    batch_size: int = 32
    """Sequences per optimizer step."""
    accumulate: int = 1
    """Equal parts that a batch is split into to save memory; the result is that of the whole batch."""
    learning_rate: float = 3e-4
    """Peak of the schedule."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up from 0."""
    final_learning_rate: float = 0.1
    """Where the linear decay ends, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices and embeddings only."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    eval_every: int = 100
    """Optimizer steps between two validation losses, each with a checkpoint; the newest two and the best are kept."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    pad_to: int = 32
    """Batches are padded to a multiple of this many tokens: fewer shapes to compile against less padding. A GPU compiles a
    training step for 10 to 35 s; there a few shapes are better (128, 256)."""
    max_bad_updates: int = 5
    """Updates in a row whose loss or gradients are not finite (each is skipped) after which the run ends, its state saved; looked
    at where a line is logged."""

    def __post_init__(self):
        where = {"SFTConfig": "sft.", "PretrainConfig": "pretrain."}.get(type(self).__name__, "")
        require(
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            f"{where}batch_size ({self.batch_size}) must be a multiple of {where}accumulate ({self.accumulate})",
        )
        for name in (
            "epochs",
            "batch_size",
            "learning_rate",
            "max_grad_norm",
            "eval_every",
            "log_every",
            "pad_to",
            "max_bad_updates",
        ):
            require(getattr(self, name) > 0, f"{where}{name} must be above 0, not {getattr(self, name)}")
        require(math.isfinite(self.epochs), f"{where}epochs must be a number of passes, not {self.epochs}")
        require(self.warmup_steps >= 0, f"{where}warmup_steps must be 0 or above, not {self.warmup_steps}")


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Fine-tuning on exchanges, loss on the therapist's replies."""

    row_tokens: int | None = None
    """Pack whole conversations into rows of this many tokens, a context that exchanges share being read once; batch_size
    then counts rows. None: one exchange a row."""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.row_tokens is None or self.row_tokens > 0, f"sft.row_tokens must be above 0, not {self.row_tokens}"
        )


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Language modelling on plain dialogue, loss on all tokens, so that a model from scratch knows the language."""

    data: list[DataConfig] = field(default_factory=lambda: [DataConfig()])
    """Data sets whose training conversations are read as plain text."""
    block_tokens: int = 128
    """The text is cut into blocks of this many tokens; no padding. At most the model's positions."""

    def __post_init__(self):
        super().__post_init__()
        require(self.block_tokens > 1, f"pretrain.block_tokens must be above 1, not {self.block_tokens}")


@dataclass(frozen=True)
class RewardWeights:
    """Weight of each term in the total reward. A term of weight 0 is still computed and logged."""

    rouge1: float = 0.0
    """Unigram F1 with the therapist's reply, in [0, 1]."""
    recall: float = 0.0
    """Share of the words of the therapist's reply that are said, in [0, 1]."""
    rouge2: float = 0.0
    """Bigram F1 with the therapist's reply, in [0, 1]."""
    rouge_l: float = 1.0
    """Longest-common-subsequence F1 with the therapist's reply, in [0, 1]."""
    bleu: float = 0.0
    """Smoothed sentence BLEU-4 with the therapist's reply, in [0, 1]."""
    semantic: float = 0.0
    """Likeness in meaning to the therapist's reply, in [-1, 1]."""
    context: float = 0.0
    """Likeness in meaning to what the client said and the turns before, less where it is copied, in [0, 1]."""
    emotion_stated: float = 0.5
    """How near the emotion that the model writes is to the annotated one, class-balanced, in [-1, 1]; a constant earns 0."""
    emotion_expressed: float = 0.0
    """The same for the emotion that a frozen classifier reads in the reply, in [-1, 1]."""
    strategy: float = 0.0
    """How well the reply fits the annotated strategy, says a frozen classifier, class-balanced, in [-1, 1]."""
    repetition: float = 0.2
    """Minus the share of repeated word bigrams within the reply, in [-1, 0]."""
    sameness: float = 0.0
    """Minus the share of the reply's word bigrams that other prompts are told, too, in [-1, 0]: against mode collapse."""
    idiom: float = 0.0
    """Mean bigram F1 with the therapists' replies to the batch's other prompts, in [0, 1]: the phrases of the profession."""
    length: float = 0.2
    """Minus the relative gap to the therapist's reply in words, in [-1, 0]."""
    ending: float = 0.2
    """1 where the reply ends (EOS) after a full stop, question or exclamation mark, 0.5 where it merely ends, else 0."""
    manner: float = 0.0
    """-1 where the reply holds a phrase that judges, diagnoses or prescribes, else 0."""


@dataclass(frozen=True)
class CustomReward:
    """A reward of your own, without touching this package."""

    path: str
    """`file.py:function`. On the host: list of rewards.custom.Sample -> {name: list of numbers}. On the device: RewardBatch
    -> {name: f32[B]}, traced into the compiled program."""
    on: Literal["host", "device"] = "host"
    """`host` = plain Python on decoded text (the program is cut in two around it); `device` = jax on arrays."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each name that the function returns; 1 where a name does not stand here."""


@dataclass(frozen=True)
class RewardConfig:
    weights: RewardWeights = field(default_factory=RewardWeights)
    standardise: bool = False
    """Scale each term by its running mean and standard deviation before it is weighed, so that none rules by scale alone."""
    encoder: str | None = None
    """Folder or hub id of a BERT-type sentence encoder for `semantic` and `context` (on the host side); null = the frozen
    SFT model's own hidden states."""
    custom: CustomReward | None = None


@dataclass(frozen=True)
class ClassifierConfig:
    """The heads on the frozen SFT trunk that read emotion and strategy in a text."""

    epochs: int = 12
    """Passes over the annotated training turns, for each of three class weightings; the best by validation macro-F1 is kept."""
    batch_size: int = 128
    """Turns per optimizer step."""
    learning_rate: float = 1e-3
    """AdamW, constant."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay."""
    hidden: int = 0
    """Units between the reading of a text and the classes; 0 = a linear head."""
    dropout: float = 0.5
    """Dropout rate on the reading and on the hidden units while the head is trained."""
    members: int = 4
    """Copies of a head that differ by their random start and dropout; their mean probability is the answer."""

    def __post_init__(self):
        require(0 <= self.dropout < 1, f"classifiers.dropout must be in [0, 1), not {self.dropout}")
        require(self.hidden >= 0, f"classifiers.hidden must be 0 (linear) or above, not {self.hidden}")
        for name in ("epochs", "batch_size", "learning_rate", "members"):
            require(getattr(self, name) > 0, f"classifiers.{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class SamplingConfig:
    max_new_tokens: int = 32
    """Longest reply, in tokens, emotion and EOS included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 = greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability; 1 = all."""

    def __post_init__(self):
        require(self.max_new_tokens > 0, f"max_new_tokens must be above 0, not {self.max_new_tokens}")
        require(
            self.temperature == 0 or self.temperature >= 1e-4,  # logits of less would leave float32
            f"temperature must be 0 (greedy) or at least 1e-4, not {self.temperature}",
        )
        require(self.top_k >= 0, f"top_k must be 0 (off) or above, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")


@dataclass(frozen=True)
class PPOConfig:
    iterations: int = 30
    """Rollout + update rounds."""
    batch_size: int = 32
    """Replies per iteration."""
    replies_per_prompt: int = 1
    """Replies that each prompt gets; rloo and grpo compare them with one another and need at least 2."""
    estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """Advantages from a critic (generalised advantage estimation), or from the other replies to the same prompt."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatches: int = 2
    """Optimizer steps per pass; divides the number of prompts, batch_size / replies_per_prompt."""
    learning_rate: float = 1e-5
    """Peak; after warm-up it decays linearly to a tenth."""
    warmup_steps: int = 4
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    kl_coef: float = 0.05
    """beta: weight of the KL to the frozen SFT policy in the per-token reward."""
    kl_target: float | None = None
    """Adaptive beta steers the KL per reply (nats, summed over tokens) towards this; null = fixed beta."""
    kl_horizon: float = 1000.0
    """Replies over which the adaptive beta reacts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """lambda of generalised advantage estimation; 1 = the whole reward to go. Below 1 an unlearnt critic credits the last
    tokens of a reply most, and short runs learn to stop early instead of to answer well."""
    clip: float = 0.2
    """Ratio clip epsilon of the policy loss."""
    value_clip: float = 0.2
    """Clip of the value around its old value."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (nats per token)."""
    whiten: bool = True
    """Advantages of a rollout are scaled to mean 0, variance 1, over reply tokens."""
    max_update_kl: float | None = 0.1
    """Mean per-token KL (nats, k3) of old to new policy above which the rest of an update is skipped; null = never."""
    max_kl: float | None = None
    """KL per reply to the SFT policy (nats, summed over tokens; k3, which is never negative by chance) above which the run
    ends, with its state saved; null = never."""
    value_head: Literal["shared", "detached", "separate"] = "shared"
    """Where the critic reads: `shared` = a linear head on the policy's last hidden state, `detached` = the same without
    gradients into the policy, `separate` = a GPT-2 of its own that starts as a copy of the SFT model."""
    critic_learning_rate: float | None = None
    """Peak for the critic's own parameters; null = ppo.learning_rate."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns and the policy stays as it is."""
    eval_every: int = 10
    """Iterations between two evaluations on the same validation prompts, each with a checkpoint."""
    eval_prompts: int = 64
    """Validation prompts per evaluation."""
    max_bad_updates: int = 5
    """Updates in a row whose loss or gradients are not finite (each is skipped) after which the run ends, its state saved."""
    keep_best: str = "reward"
    """Validation metric by which the policy that is kept is chosen, such as `rougeL` or `meteor`; `-perplexity`: the lowest (on the
    command line `--ppo.keep_best=-perplexity`)."""

    def __post_init__(self):
        require(
            self.replies_per_prompt >= 1 and self.batch_size % self.replies_per_prompt == 0,
            f"ppo.batch_size ({self.batch_size}) must be a multiple of ppo.replies_per_prompt ({self.replies_per_prompt})",
        )
        require(
            self.estimator == "gae" or self.replies_per_prompt >= 2,
            f"ppo.estimator: {self.estimator} compares replies to one prompt; set ppo.replies_per_prompt to 2 or more",
        )
        require(
            0 <= self.critic_warmup < self.iterations,
            f"ppo.critic_warmup ({self.critic_warmup}) must be at least 0 and below ppo.iterations ({self.iterations})",
        )
        require(
            self.estimator == "gae" or self.critic_warmup == 0,
            f"ppo.critic_warmup needs ppo.estimator: gae; {self.estimator} has no critic",
        )
        require(
            self.minibatches >= 1 and self.batch_size // self.replies_per_prompt % self.minibatches == 0,
            f"ppo.batch_size / ppo.replies_per_prompt ({self.batch_size // self.replies_per_prompt}) must be a multiple "
            f"of ppo.minibatches ({self.minibatches})",
        )
        require(self.kl_target is None or self.kl_target > 0, f"ppo.kl_target must be above 0, not {self.kl_target}")
        require(
            self.kl_target is None or self.kl_coef > 0, "ppo.kl_target multiplies ppo.kl_coef, which must be above 0"
        )
        rate = self.critic_learning_rate
        require(rate is None or rate >= 0, f"ppo.critic_learning_rate must be 0 or above, not {rate}")
        require(self.max_kl is None or self.max_kl > 0, f"ppo.max_kl must be above 0, not {self.max_kl}")
        require(self.kl_horizon > 0, f"ppo.kl_horizon must be above 0, not {self.kl_horizon}")
        require(  # else a step of the adaptive beta could take more than all of it
            self.kl_target is None or self.batch_size < 5 * self.kl_horizon,
            f"ppo.kl_horizon ({self.kl_horizon:g}) must be more than a fifth of ppo.batch_size ({self.batch_size})",
        )
        for name in (
            "iterations",
            "batch_size",
            "epochs",
            "learning_rate",
            "max_grad_norm",
            "eval_every",
            "eval_prompts",
            "max_bad_updates",
            "clip",
            "value_clip",
        ):
            require(getattr(self, name) > 0, f"ppo.{name} must be above 0, not {getattr(self, name)}")
        for name in ("kl_coef", "warmup_steps", "value_coef"):
            require(getattr(self, name) >= 0, f"ppo.{name} must be 0 or above, not {getattr(self, name)}")
        limit = self.max_update_kl
        require(limit is None or limit > 0, f"ppo.max_update_kl must be above 0 or null, not {limit}")
        require(
            0 <= self.gamma <= 1 and 0 <= self.lam <= 1,
            f"ppo.gamma and ppo.lam must be in [0, 1], not {self.gamma} and {self.lam}",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    systems: list[Literal["base", "sft", "ppo", "constant", "commonplace", "retrieval", "random"]] = field(
        default_factory=lambda: ["base", "sft", "ppo", "constant", "retrieval", "random"]
    )
    """What stands in the table; constant, commonplace, retrieval and random are the trivial answers that keep it honest."""
    split: Literal["train", "validation", "test"] = "test"
    """Which exchanges are answered."""
    limit: int | None = None
    """Answer only the first so many exchanges; null = all."""
    batch_size: int = 32
    """Replies written at once: batch_size / candidates prompts, and at least one."""
    temperature: float = 0.0
    """Decoding of every system, here and in the validation during PPO; 0 = greedy."""
    top_k: int = 0
    """As in sampling."""
    top_p: float = 1.0
    """As in sampling."""
    candidates: int = 1
    """Replies that every model samples to a prompt; the one most like the others is its answer (consensus.py). 1 = the only
    one. The validation during PPO always takes one."""
    draws: int = 1
    """Times that every model, and every trivial system that draws, answers all prompts, draw i as seed + i would; metrics are means
    over the draws, and a comparison takes each exchange's mean: less of it is the sampler's luck."""
    language_model: str | None = None
    """Run folder of another seed whose SFT model judges whether replies are language (their perplexity); null = not judged."""
    bootstrap: int = 1000
    """Resamplings of the paired bootstrap that compares the last trained system with every other one."""

    def __post_init__(self):
        SamplingConfig(1, self.temperature, self.top_k, self.top_p)  # what holds there holds here
        for name in ("batch_size", "bootstrap", "limit"):
            value = getattr(self, name)
            require((name == "limit" and value is None) or value > 0, f"evaluate.{name} must be above 0, not {value}")
        for name, value in (("candidates", self.candidates), ("draws", self.draws)):
            require(value >= 1, f"evaluate.{name} must be at least 1, not {value}")
            require(
                value == 1 or self.temperature > 0,
                f"evaluate.{name} {value} needs evaluate.temperature above 0: greedy replies are all the same",
            )


@dataclass(frozen=True)
class JudgeConfig:
    """An LLM that rates the replies which evaluate.py left, over the OpenAI protocol (extra `judge`)."""

    base_url: str | None = None
    """Where the endpoint is, such as http://127.0.0.1:8000/v1; what it rates is sent there."""
    model: str | None = None
    """Name of the judging model at that endpoint; pin a dated version, and of another family than what is judged."""
    key_env: str | None = None
    """NAME of the environment variable that holds the endpoint's key; null = it asks for none. The key itself stands nowhere."""
    systems: list[str] | None = None
    """Systems of answers.json to rate, `constant` and `therapist` (the person) among them; null = all."""
    limit: int | None = 50
    """Exchanges to rate, drawn by seed; null = all that were answered. Calls = limit x systems x 4 qualities x repeats."""
    repeats: int = 3
    """Times that each question is asked."""
    context_turns: int = 8
    """Turns before the client's message that the judge reads."""
    concurrency: int = 4
    """Calls under way at once."""
    timeout: float = 60.0
    """Seconds without a byte after which a call is given up and made again."""
    max_retries: int = 4
    """Further tries of a call, with growing pauses, after a time-out, a lost connection, status 408, 409, 429 or 5xx."""
    max_tokens: int = 256
    """Longest answer of the judge, in its tokens."""

    def __post_init__(self):
        # The value is not repeated in the message: it may be a key that was put in the wrong place.
        require(
            self.key_env is None or re.fullmatch("[A-Z_][A-Z0-9_]*", self.key_env) is not None,
            "judge.key_env must be the NAME of an environment variable (capitals, digits, _), never the key itself",
        )
        url = self.base_url or "http://"
        require(url.startswith(("http://", "https://")), "judge.base_url must start with http:// or https://")
        require(
            not set("@?#") & set(url),
            "judge.base_url must hold no user, password or query; name the key by judge.key_env",
        )
        require(self.systems is None or len(self.systems) > 0, "judge.systems is empty: name systems, or null for all")
        require(self.limit is None or self.limit > 0, f"judge.limit must be above 0 or null, not {self.limit}")
        for name in ("repeats", "concurrency", "timeout", "max_tokens"):
            require(getattr(self, name) > 0, f"judge.{name} must be above 0, not {getattr(self, name)}")
        for name in ("context_turns", "max_retries"):
            require(getattr(self, name) >= 0, f"judge.{name} must be 0 or above, not {getattr(self, name)}")


@dataclass(frozen=True)
class GridConfig:
    """The cells of an experiment that reproduce.py runs; each is a set of overrides of the rest of this file."""

    sft: dict[str, dict[str, Any]] = field(default_factory=dict)
    """SFT cells: name -> {dotted key: value}. All start from one shared pre-training."""
    ppo: dict[str, dict[str, Any]] = field(default_factory=dict)
    """PPO cells, likewise, each from the SFT cell that its key `from` names (default: the first)."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1: what the others leave. And how processes find together."""

    data: int = -1
    """Parts of a batch; each has a copy of the parameters."""
    fsdp: int = 1
    """Parts of a batch that share the parameters, each storing its part of them."""
    tensor: int = 1
    """Parts of every layer: heads, inner units, vocabulary."""
    coordinator: str | None = None
    """HOST:PORT of process 0; `auto` = ask the cluster (TPU pods, Slurm); null = this process is alone."""
    processes: int | None = None
    """How many there are; null with `auto`."""
    process: int | None = None
    """Which one this is, from 0; null with `auto`."""
    timeout: int = 120
    """Seconds after which a process that has not come, or has gone silent, is given up, and the others with it."""

    def __post_init__(self):
        alone = self.coordinator in (None, "auto")
        require(
            alone or (self.processes is not None and self.process is not None),
            f"mesh.coordinator {self.coordinator} needs mesh.processes and mesh.process",
        )
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            require(
                value == -1 or value > 0, f"mesh.{name} must be above 0, or -1 for what the others leave, not {value}"
            )
        require(self.timeout > 0, f"mesh.timeout must be above 0, not {self.timeout}")


@dataclass(frozen=True)
class SafetyConfig:
    """Where a person is sent whose message speaks of a crisis. The gate itself has no switch."""

    emergency_number: str | None = None
    """As a sentence says it and, in YAML, in quotes: "112"; null = "your local emergency number"."""
    crisis_line: str | None = None
    """Likewise, such as "Samaritans on 116 123"; null = findahelpline.com, which lists crisis lines by country."""

    def __post_init__(self):
        for name in ("emergency_number", "crisis_line"):
            value = getattr(self, name)
            require(
                value is None or bool(value.strip()), f"safety.{name} is blank: write a number, or null for the default"
            )


@dataclass(frozen=True)
class Config:
    """One experiment."""

    run_dir: str = "runs/default"
    """Where everything goes that the run leaves behind."""
    seed: int = 0
    """Every random number and the order of the data derive from it."""
    require: Literal["tpu", "gpu", "cpu"] | None = None
    """Stop at once where JAX would run on anything else, such as a CPU in the place of a TPU; null = take what there is."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    pretrain: PretrainConfig | None = None
    sft: SFTConfig = field(default_factory=SFTConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    classifiers: ClassifierConfig = field(default_factory=ClassifierConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    report: bool = True
    """Write report.html when a script ends, 7 to 34 s on a CPU for a model of one layer; `scripts/report.py` writes it at any time."""
    tensorboard: bool = False
    """Write every line of metrics.jsonl as TensorBoard events too, to run_dir/tensorboard (extra `tensorboard`)."""
    compilation_cache: str | None = "~/.cache/therapy_jax/xla"
    """Folder for compiled programs, so that a second start does not compile again; null = off."""

    def __post_init__(self):
        require(self.seed >= 0, f"seed must be 0 or above, not {self.seed}")
        longest = self.prompt.max_tokens + self.sampling.max_new_tokens
        require(
            self.model.name is not None or longest <= self.model.n_positions,
            f"prompt.max_tokens + sampling.max_new_tokens ({longest}) is more than model.n_positions ({self.model.n_positions})",
        )


NUMBER = r"^[-+]?(\.\d+|\d+(\.\d*)?([eE][-+]?\d+)?|\.inf|\.nan)$"


def load_yaml(text: str) -> Any:
    """YAML as version 1.2 reads it: `on` is a word and not `true`, and `1e-4` is a number (PyYAML's 1.1 has it otherwise)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value[::-1]:  # PyYAML would keep the last of them, and say nothing
                if keys.count(key.value) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands there twice", key.start_mark
                    )
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(NUMBER), list("-+.0123456789"))
    return yaml.load(text, Loader)


def parse(argv: list[str] | None = None, description: str | None = None) -> Config:
    """Command line -> Config. A user's mistake ends the program with one message and exit code 2."""
    return parse_with(None, argv, description)[0]


def parse_with(
    options: type | None, argv: list[str] | None = None, description: str | None = None
) -> tuple[Config, Any]:
    """The same for a script with flags of its own, the fields of the dataclass `options` -> (Config, options)."""
    import jsonargparse  # here, so that reading a Config from Python code does not need it
    import yaml

    jsonargparse.set_loader("yaml", load_yaml, (yaml.YAMLError,))
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # allow_abbrev: else `--sft.learning_rat 1` would quietly be taken for learning_rate.
    usage = "%(prog)s [--config FILE.yaml] [--section.name VALUE ...]"  # all names would fill the screen at each error

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            super().error(message + nearest(message, [action.dest for action in self._actions]), ex)

    parser = Parser(description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of one experiment (configs/*.yaml).")
    kinds = (Config,) if options is None else (Config, options)
    for kind in kinds:
        parser.add_class_arguments(kind, None)
    try:
        arguments = parser.parse_args(files_first(sys.argv[1:] if argv is None else argv))
        for name, section in typing.get_type_hints(Config).items():
            if dataclasses.is_dataclass(section) and not isinstance(arguments[name], jsonargparse.Namespace):
                raise ConfigError(
                    f"{name} is a section: give settings of it, or leave it out (it is {arguments[name]!r})"
                )
        values = vars(parser.instantiate(arguments))
        config, *own = (kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for kind in kinds)
        return config, own[0] if own else None
    except UnicodeDecodeError as error:
        parser.error(f"the file of --config is not UTF-8 text ({error})")
    except (
        ValueError
    ) as error:  # ConfigError; of a section that may be null jsonargparse lists what each of its types says
        said = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
        parser.error("; ".join(line for line in said if not line.startswith("Expected a")) or str(error))


def files_first(argv: Sequence[str]) -> list[str]:
    """`--config FILE` before the rest, each in its order, so that a flag outranks the file wherever it stands."""
    files: list[str] = []
    rest: list[str] = []
    for i, word in enumerate(argv):
        is_file = word == "--config" or word.startswith("--config=") or (i > 0 and argv[i - 1] == "--config")
        (files if is_file else rest).append(word)
    return files + rest


def nearest(message: str, known: Sequence[str]) -> str:
    """What to add to jsonargparse's message about a key that does not exist: the name that it is nearest to, if any."""
    groups = r"Group '(\S+)' does not accept option '(\S+)'|Option '(\S+)' is not accepted|unrecognized arguments: --([^\s=]+)"
    found = re.search(groups, message)
    wrong = ".".join(filter(None, found.groups())) if found else ""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; do you mean {close[0]}?" if close else ""


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back."""
    return dump_yaml(dataclasses.asdict(config))


def dump_yaml(tree: Any) -> str:
    """Plain Python as YAML that `load_yaml` reads back: a word that only it takes for a number (`1e-4`) stands in quotes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(NUMBER), list("-+.0123456789"))
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)


def load(path: str | Path) -> Config:
    """A YAML file -> Config; for tests and notebooks."""
    return parse(["--config", str(path)])
